"""One visitor's conversation: what was said, raw, as the API takes it; and the rows it makes for training."""

import json
from dataclasses import dataclass, field
from typing import Any

from annotated_types import Ge, Gt, Le
from pydantic import TypeAdapter, ValidationError

from entrypoints.api.openai_schema import ChatRequest, Tool
from entrypoints.sampling import Sampling
from entrypoints.web.client import Answering, Api, Growth, Problem

EXAMPLE_TOOLS = """\
[{
  "name": "get_weather",
  "description": "查询城市天气",
  "parameters": {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"]
  }
}]"""


@dataclass(frozen=True)
class Slider:
    """Bounds and default of a parameter."""

    lowest: float
    highest: float
    step: float
    default: float


@dataclass
class Options:
    """What a visitor chose in the settings."""

    model: str | None = None
    system: str = ""
    max_tokens: int = Sampling.max_new_tokens
    temperature: float = Sampling.temperature
    top_p: float = Sampling.top_p
    tool_mode: bool = False
    tools: str = EXAMPLE_TOOLS
    key: str = ""

    def request(self) -> dict[str, Any] | Problem:
        """The fields of the request beside its messages, or what is wrong with the tools."""
        fields = {name: getattr(self, name) for name in ("max_tokens", "temperature", "top_p")}
        fields["model"] = self.model or ""
        if not self.tool_mode:
            return fields
        tools = parse_tools(self.tools)
        return tools if isinstance(tools, Problem) else {**fields, "tools": tools}


@dataclass
class Talk:
    """The turns without the system prompt, and the answer that is growing or grew last."""

    messages: list[dict] = field(default_factory=list)
    answering: Answering | None = None  # until its answer is taken
    last: Growth | None = None
    last_stopped: bool = False

    def say(self, text: str) -> None:
        """The visitor's next turn: the result of a call that waits for one, otherwise a question."""
        waiting = self.waiting_calls()
        if waiting:
            self.messages.append({"role": "tool", "tool_call_id": waiting[0]["id"], "content": text})
        else:
            self.messages.append({"role": "user", "content": text})

    def waiting_calls(self) -> list[dict]:
        """Calls of the last answer that have no result yet."""
        results = []
        for message in reversed(self.messages):
            if message["role"] == "tool":
                results.append(message["tool_call_id"])
            else:
                return [call for call in message.get("tool_calls", ()) if call["id"] not in results]
        return []

    def start(self, api: Api, options: Options) -> Problem | None:
        """Ask for the next answer; the Problem if it cannot be asked for."""
        fields = options.request()
        if isinstance(fields, Problem):
            return fields
        system = [{"role": "system", "content": options.system}] if options.system.strip() else []
        self.answering = Answering(api.with_key(options.key), [*system, *self.messages], fields)
        return None

    def take(self) -> Growth | None:
        """End the growing answer, stopped if it still grows, and make it a turn; None if there is none.

        Of several threads one takes it, and the others return when it is a turn.
        """
        answering = self.answering
        if answering is None:
            return None
        answering.stop()
        answering.done.wait(5)
        with answering.taking:
            if self.answering is not answering:
                return None
            self.last, self.last_stopped = answering.growth, answering.stopped
            if self.last.text or self.last.calls:
                calls = {"tool_calls": self.last.calls} if self.last.calls else {}
                self.messages.append({"role": "assistant", "content": self.last.text, **calls})
            self.answering = None
            return self.last

    def stop(self) -> None:
        """Stop the growing answer, if any; what it said so far stays."""
        if answering := self.answering:
            answering.stop()

    def forget_answer(self) -> bool:
        """Take the last answer back, so that it can be asked for again; False if nothing can be asked."""
        while self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        return bool(self.messages)

    def forget_question(self) -> str | None:
        """Take the last question back with all that followed; its text, None if there is none."""
        while self.messages:
            message = self.messages.pop()
            if message["role"] == "user":
                return message["content"]
        return None

    def clear(self) -> None:
        """Start anew."""
        self.take()
        self.messages, self.last = [], None

    def training_rows(self) -> str:
        """JSON lines for glm train: columns content, summary, history; rounds with tool calls are left out.

        One line, of the last answered round, whose history holds the earlier ones; empty if there is none.
        """
        rounds = []
        for question, answer in zip(self.messages, self.messages[1:], strict=False):
            said = answer["role"] == "assistant" and not answer.get("tool_calls") and answer["content"].strip()
            if question["role"] == "user" and said:
                rounds.append([question["content"], answer["content"]])
        if not rounds:
            return ""
        *history, (content, summary) = rounds
        return json.dumps({"content": content, "summary": summary, "history": history}, ensure_ascii=False) + "\n"


def sliders(window: int | None = None) -> dict[str, Slider]:
    """The sliders: bounds of the request schema, defaults of Sampling; no answer is longer than the window."""
    longest = min(_bounds("max_tokens")[1], window or 32768)
    default = Sampling()
    return {
        "max_tokens": Slider(1, longest, 1, min(default.max_new_tokens, longest)),
        "temperature": Slider(*_bounds("temperature"), 0.05, default.temperature),
        "top_p": Slider(*_bounds("top_p", 0.01), 0.01, default.top_p),
    }


def _bounds(name: str, above: float = 0) -> tuple[float, float]:
    """Lowest and highest value the schema allows; `above` is the least step above a bound that is itself excluded."""
    limits = {type(limit): limit for limit in ChatRequest.model_fields[name].metadata}
    lowest = limits[Ge].ge if Ge in limits else limits[Gt].gt + above
    return lowest, limits[Le].le


def parse_tools(text: str) -> list[dict] | Problem:
    """Tools in OpenAI's form or ChatGLM3's plain one, as OpenAI's."""
    try:
        given = json.loads(text)
        if not isinstance(given, list) or not given or not all(isinstance(tool, dict) for tool in given):
            return Problem("bad_tools", {"detail": '[{"name": …, "description": …, "parameters": {…}}]'})
        wrapped = [tool if "function" in tool else {"type": "function", "function": tool} for tool in given]
        return [tool.model_dump(exclude_none=True) for tool in TypeAdapter(list[Tool]).validate_python(wrapped)]
    except ValidationError as error:
        first = error.errors()[0]
        return Problem("bad_tools", {"detail": f"{'.'.join(map(str, first['loc']))}: {first['msg']}"})
    except (ValueError, RecursionError) as error:
        return Problem("bad_tools", {"detail": str(error)})
