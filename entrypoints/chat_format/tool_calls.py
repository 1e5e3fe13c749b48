"""How a family writes its tools and its calls: Python code (ChatGLM3) or JSON (GLM-4). Nothing is executed."""

import ast
import json
import keyword
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from entrypoints.chat_format.builtin_tools import BUILTIN_TOOLS, GLM4_FUNCTION_NOTE, GLM4_INTRODUCTION
from entrypoints.errors import UserError
from entrypoints.families import Family

if TYPE_CHECKING:
    from entrypoints.chat_format.prompt import Message

SAFE_NESTING = 50  # Python parses 200 levels of brackets
TOOLS_INTRODUCTION = "Answer the following questions as best as you can. You have access to the following tools:"
_ENCODE = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
# the closing fence is at the beginning of a line or at the end of the text: an argument may contain ``` too
CODE_BLOCK = re.compile(r"```[a-zA-Z]*\n(.*?)(?:\n```|(?:```\s*)?\Z)", re.DOTALL)


@dataclass(frozen=True)
class ToolCall:
    """A tool call of the model: `arguments` hold only JSON values, `source` is the text that the model generated."""

    name: str
    arguments: dict[str, Any]
    source: str = ""


class ToolFormat(Protocol):
    """The tools and calls of one family."""

    body_prefix: str  # before the body of an answer, after its header

    def own_turns(self, turns: Sequence["Message"]) -> list["Message"]:
        """The turns as the family was trained on them, given turns of any family."""

    def system_text(self, turn: "Message") -> str:
        """The text of a turn with its tool definitions."""

    def may_start(self, body: str) -> bool:
        """Whether a body that starts like this can become a call."""

    def parse(self, name: str, body: str) -> ToolCall | None:
        """The call in a body; None for anything else."""


class PythonCalls:
    """ChatGLM3: tools as a JSON list in the system turn, a call as `tool_call(key=literal)` in a code block."""

    body_prefix = " "  # SentencePiece's dummy prefix

    def own_turns(self, turns: Sequence["Message"]) -> list["Message"]:
        """The turns unchanged."""
        return list(turns)

    def system_text(self, turn: "Message") -> str:
        """The text of a turn, followed by its tool definitions."""
        if not turn.tools:
            return turn.content
        return f"{turn.content}\n{json.dumps(list(turn.tools), indent=4, ensure_ascii=False)}"

    def may_start(self, body: str) -> bool:
        """Whether the body starts a code block."""
        start = body.lstrip(" ")
        return start.startswith("```") or "```".startswith(start)

    def parse(self, name: str, body: str) -> ToolCall | None:
        """The call in a code block."""
        return parse_tool_call(name, body)


class JsonCalls:
    """GLM-4: tools in a system turn of their own, a call as a JSON object of its arguments."""

    body_prefix = ""

    def own_turns(self, turns: Sequence["Message"]) -> list["Message"]:
        """Tools in a turn before the text of their turn, calls as JSON, and no turn without text."""
        return [own for turn in turns for own in self._split(turn) if own.content]

    def _split(self, turn: "Message") -> list["Message"]:
        if turn.tools:
            text = "" if turn.content == TOOLS_INTRODUCTION else turn.content
            return [replace(turn, content=self.system_text(turn), tools=()), replace(turn, content=text, tools=())]
        call = parse_tool_call(turn.metadata, turn.content) if turn.metadata else None
        return [replace(turn, content=write_json_call(call.arguments)) if call else turn]

    def system_text(self, turn: "Message") -> str:
        """The text that offers the tools of a turn."""
        return turn.content if not turn.tools else GLM4_INTRODUCTION + "".join(map(_glm4_tool, turn.tools))

    def may_start(self, body: str) -> bool:
        """Whether the body starts an object."""
        start = body.lstrip()
        return not start or start.startswith("{")

    def parse(self, name: str, body: str) -> ToolCall | None:
        """The call whose arguments are a JSON object."""
        return parse_json_call(name, body)


class NoCalls(PythonCalls):
    """Families without tools: every answer is text."""

    def may_start(self, body: str) -> bool:
        """Never."""
        return False

    def parse(self, name: str, body: str) -> ToolCall | None:
        """Never a call."""
        return None


_FORMATS: dict[str | None, ToolFormat] = {"python": PythonCalls(), "json": JsonCalls(), None: NoCalls()}


def tool_format(family: Family) -> ToolFormat:
    """How this family writes tools and calls."""
    return _FORMATS[family.tool_format]


def _glm4_tool(tool: Any) -> str:
    """The section of one tool: a function, in OpenAI's form or alone, or one of BUILTIN_TOOLS."""
    kind = tool.get("type", "function") if isinstance(tool, dict) else None
    if kind in BUILTIN_TOOLS:
        return f"\n\n## {kind}\n\n{BUILTIN_TOOLS[kind]}"
    function = tool.get("function", tool) if isinstance(tool, dict) else {}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"the tool {str(tool)[:60]!r} has no name", "give it a name, a description and parameters")
    definition = json.dumps(function, indent=4, ensure_ascii=False)
    return f"\n\n## {function['name']}\n\n{definition}\n{GLM4_FUNCTION_NOTE}"


def parse_any_call(name: str, body: str) -> ToolCall | None:
    """The call in a body of any family."""
    return parse_tool_call(name, body) or parse_json_call(name, body)


def parse_json_call(name: str, body: str) -> ToolCall | None:
    """Parse a JSON object of arguments; None for anything else."""
    try:
        arguments = json.loads(body)
        if not isinstance(arguments, dict):
            return None
        _as_json(arguments)  # the API returns the call as JSON
        return ToolCall(name, arguments, body)
    except (ValueError, RecursionError):
        return None


def write_json_call(arguments: dict[str, Any]) -> str:
    """The JSON object from which `parse_json_call` reads exactly these arguments."""
    return json.dumps(arguments, ensure_ascii=False)


def parse_tool_call(name: str, body: str) -> ToolCall | None:
    """Parse `tool_call(key=literal, **{"a key": literal})` inside a code block; None for anything else.

    Nothing is executed.
    """
    code = CODE_BLOCK.search(body)
    try:
        call = ast.parse((code.group(1) if code else body).strip(), mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "tool_call"):
            return None
        arguments: dict[str, Any] = {}
        for argument in call.keywords:
            value = ast.literal_eval(argument.value)
            named = value if argument.arg is None else {argument.arg: value}  # None: **{"a name": value}
            if not isinstance(named, dict) or any(not isinstance(key, str) or key in arguments for key in named):
                return None
            arguments.update(named)
        if call.args:
            return None
        _as_json(arguments)  # the API returns the call as JSON
        return ToolCall(name, arguments, body)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return None


def write_tool_call(arguments: dict[str, Any]) -> str:
    """The code block of a call from which `parse_tool_call` reads exactly these arguments.

    Names are written as keywords, as ChatGLM3 was trained. If one of them cannot be a keyword in Python, such as
    `max-results` or `from`, all of them are written as `**{'max-results': 5}`.
    Raises ValueError, TypeError or RecursionError: not JSON (NaN, half a character), or nested too deeply to be read.
    """
    text = _as_json(arguments)
    if all(is_keyword_name(name) for name in arguments):
        written = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    else:
        written = f"**{arguments!r}"
    code = f"```python\ntool_call({written})\n```"
    if text.count("[") + text.count("{") > SAFE_NESTING:  # fewer brackets cannot be nested deeper
        call = parse_tool_call("", code)
        if call is None or _as_json(call.arguments) != text:
            raise ValueError("nested too deeply")
    return code


def is_keyword_name(name: str) -> bool:
    """Whether Python reads the name of a keyword argument as it is written; it normalizes identifiers to NFKC."""
    return name.isidentifier() and not keyword.iskeyword(name) and unicodedata.normalize("NFKC", name) == name


def _as_json(value: Any) -> str:
    """Text of a JSON value; raises ValueError for NaN, infinity and half a character (a lone surrogate)."""
    text = _ENCODE(value)
    text.encode()
    return text
