"""What one visitor does with a conversation: ask, edit, regenerate, continue, stop; and the settings of a request."""

import json
from dataclasses import dataclass, field

from annotated_types import Ge, Le

from entrypoints.api.openai_schema import ChatRequest
from entrypoints.chat_format.sampling import Sampling
from entrypoints.web.client import (
    AnswerTask,
    ApiClient,
    CompletionRequest,
    Message,
    StreamedAnswer,
)
from entrypoints.web.conversation import Attachment, Conversation, Node, title_of
from entrypoints.web.conversation_list import ConversationList
from entrypoints.web.documents import Document
from entrypoints.web.request_errors import ErrorMessage
from entrypoints.web.tool_use import EXAMPLE_TOOLS, parse_tools, run_tool

DEFAULT_CONTEXT_LENGTH = 32768  # if the server does not report one
STOP_TIMEOUT_SECONDS = 5
MAX_TOOL_RESULTS = 8  # of demo tools for one question


@dataclass(frozen=True)
class SliderRange:
    """Bounds, step and default of a sampling parameter."""

    minimum: float
    maximum: float
    step: float
    default: float


@dataclass
class ChatOptions:
    """What a visitor chose in the settings; the field names are the keys of the widgets."""

    model: str | None = None
    system: str = ""
    max_tokens: int = Sampling.max_new_tokens
    temperature: float = Sampling.temperature
    top_p: float = Sampling.top_p
    tool_mode: bool = False
    tools: str = EXAMPLE_TOOLS
    compare_model: str | None = None  # answers beside `model`, not in tool mode
    key: str = ""

    def models(self) -> list[str]:
        """The models that answer, by side: one or two."""
        other = self.compare_model if not self.tool_mode and self.compare_model != self.model else None
        return [self.model or "", *([other] if other else [])]

    def to_request(self, side: int = 0) -> CompletionRequest | ErrorMessage:
        """The request of one side without its messages, or what is wrong with the tools."""
        tools = parse_tools(self.tools) if self.tool_mode else None
        if isinstance(tools, ErrorMessage):
            return tools
        return CompletionRequest(self.models()[side], self.max_tokens, self.temperature, self.top_p, tools)


@dataclass
class RunningAnswer:
    """An answer in progress below the node `parent`, or the continuation of the node `continued`."""

    task: AnswerTask
    parent: int
    model: str
    system: str
    continued: int | None = None


@dataclass
class ChatSession:
    """The conversation that is shown, its answers in progress by side, and the error that the banner shows."""

    conversation: Conversation = field(default_factory=Conversation)
    running: dict[int, RunningAnswer] = field(default_factory=dict)  # until `finish_answers`
    last_answer: StreamedAnswer | None = None
    error: ErrorMessage | None = None
    edited: int | None = None  # id of the message whose text is being edited or corrected
    opened_edit: int | None = None  # the same, as soon as the page shows the text in a field
    confirmed: int | None = None  # id of the message whose deletion must be confirmed
    user: str | None = None  # name of the signed-in user, empty without one; None until the page is loaded
    user_key: str = ""  # API key of the signed-in user
    document: Document | None = None  # part of the next question
    kept: ConversationList = field(default_factory=ConversationList)

    def ask(self, api: ApiClient, options: ChatOptions, text: str) -> bool:
        """Append the visitor's input and request the answers; False if the settings allow no request.

        The input is the result of the first pending tool call if there is one, else a question.
        """
        conversation = self.conversation
        pending = conversation.pending_tool_calls()
        if not self._is_possible(options):
            return False
        if pending:
            self._add({"role": "tool", "tool_call_id": pending[0]["id"], "content": text})
        else:
            self._show_sides(conversation.leaves, options)
            self._add_question(text, self.document.attachment if self.document else None)
            self.document = None
        return self.start_answers(api, options)

    def start_answers(self, api: ApiClient, options: ChatOptions) -> bool:
        """Request an answer to the last message of each side; False if the settings allow no request."""
        if not self._is_possible(options):
            return False
        for side, leaf in enumerate(self.conversation.leaves):
            self.conversation.nodes[leaf].error = None
            self._start(api, options, side, self.conversation.prompt(side))
        return True

    def regenerate(self, api: ApiClient, options: ChatOptions, node: Node) -> bool:
        """Add a version of an answer, or ask a question without an answer again, at the end of the conversation."""
        if not self._is_possible(options):
            return False
        if node.message["role"] == "assistant":
            self._show_sides([node.parent], options)
        elif node.id not in self.conversation.leaves:
            self.conversation.splice(node)
            self._add(node.message, node.attachment)
        return self.start_answers(api, options)

    def edit(self, api: ApiClient, options: ChatOptions, node: Node, text: str) -> bool:
        """Add a version of a question or of a result of a tool, and request its answer."""
        if not self._is_possible(options):
            return False
        self._show_sides([node.parent], options)
        if node.message["role"] == "user":
            self._add_question(text, node.attachment)
        else:
            message = node.message.copy()
            message["content"] = text
            self._add(message)
        return self.start_answers(api, options)

    def run_demo_tools(self, api: ApiClient, options: ChatOptions) -> bool:
        """Append the results of the pending calls of demo tools, and request the next answer.

        False if another call is pending, whose result the visitor types, or if the model has called tools too often.
        """
        results = [(call, run_tool(call)) for call in self.conversation.pending_tool_calls()]
        num_results = 0
        for node in reversed(self.conversation.path()):
            num_results += node.message["role"] == "tool"
            if node.message["role"] == "user":
                break
        if not results or num_results >= MAX_TOOL_RESULTS:
            return False
        for call, result in results:
            if result is None:
                return False
            leaf = self.conversation.leaves[0]
            node = self.conversation.add({"role": "tool", "tool_call_id": call["id"], "content": result}, leaf)
            node.model = "demo"
        return self.start_answers(api, options)

    def continue_answer(self, api: ApiClient, options: ChatOptions, node: Node, request: str) -> bool:
        """Let the model write on at a cut answer, the last one; `request` is the question that asks for it."""
        if not self._is_possible(options):
            return False
        side = self.conversation.leaves.index(node.id)
        prompt: list[Message] = [*self.conversation.prompt(side), {"role": "user", "content": request}]
        self._start(api, options, side, prompt, node.id)
        return True

    def is_done(self) -> bool:
        """Whether no answer is being generated."""
        return all(running.task.done.is_set() for running in list(self.running.values()))

    def finish_answers(self) -> bool:
        """Stop the answers in progress if they still run, and append them; False if there is none.

        If several threads call it, one of them appends an answer, and the others do nothing after that.
        """
        self.stop_answers()
        found = False
        for side, running in sorted(self.running.items()):
            running.task.done.wait(STOP_TIMEOUT_SECONDS)
            with running.task.finish_lock:
                if self.running.get(side) is running:
                    self._append(side, running)
                    del self.running[side]
                    found = True
        if found and not self.kept.save(self.conversation):
            self.error = self.error or ErrorMessage("not_stored")
        return found

    def stop_answers(self) -> None:
        """Stop the answers in progress, if any; the text so far is kept."""
        for running in list(self.running.values()):
            running.task.stop()

    def open(self, conversation: Conversation | None = None) -> None:
        """Show another conversation, by default a new one."""
        self.finish_answers()
        self.kept.put(self.conversation)
        self.conversation = conversation or Conversation()
        self.last_answer = self.error = self.edited = self.confirmed = self.document = None

    def delete(self) -> None:
        """Delete the conversation that is shown, here and where it is kept."""
        deleted = self.conversation.id
        self.open()
        if not self.kept.remove(deleted):
            self.error = ErrorMessage("not_stored")

    def changes(self) -> str:
        """What the browser has to write, as JSON; empty while an answer is in progress."""
        return "" if self.running else json.dumps(self.kept.changes(self.conversation), ensure_ascii=False)

    def api_for(self, api: ApiClient, key: str) -> ApiClient:
        """The server with the key that the visitor entered, else that of the signed-in user, else that of the page."""
        return api.with_key(self.user_key).with_key(key)

    def _is_possible(self, options: ChatOptions) -> bool:
        self.finish_answers()
        request = options.to_request()
        self.error = request if isinstance(request, ErrorMessage) else None
        return self.error is None

    def _show_sides(self, leaves: list[int], options: ChatOptions) -> None:
        """As many sides as models answer; a side that is new starts with the messages of the first one."""
        count = len(options.models())
        self.conversation.leaves = [leaves[side] if side < len(leaves) else leaves[0] for side in range(count)]

    def _add_question(self, text: str, attachment: Attachment | None) -> None:
        self.conversation.title = self.conversation.title or title_of(text)
        self._add({"role": "user", "content": attachment.before(text) if attachment else text}, attachment)

    def _add(self, message: Message, attachment: Attachment | None = None) -> None:
        """Append a message to each side, one node if both sides show the same messages."""
        for leaf in dict.fromkeys(self.conversation.leaves):
            self.conversation.add(message.copy(), leaf).attachment = attachment

    def _start(
        self, api: ApiClient, options: ChatOptions, side: int, prompt: list[Message], continued: int | None = None
    ) -> None:
        request = options.to_request(side)
        assert isinstance(request, CompletionRequest)
        system: list[Message] = [{"role": "system", "content": options.system}] if options.system.strip() else []
        task = AnswerTask(self.api_for(api, options.key), [*system, *prompt], request)
        self.running[side] = RunningAnswer(
            task, self.conversation.leaves[side], request.model, options.system, continued
        )

    def _append(self, side: int, running: RunningAnswer) -> None:
        answer, conversation = running.task.answer, self.conversation
        self.error = answer.error or (self.error if side else None)
        if side == 0:
            self.last_answer = answer
        if running.continued is not None:
            node = conversation.nodes[running.continued]
            node.message["content"] += answer.text
            conversation.set_outcome(node, answer)
        elif has_content(answer) or len(conversation.leaves) > 1 or not (answer.error or running.task.stopped):
            node = conversation.add_answer(running.parent, answer, running.model, running.system)
            conversation.leaves[side] = node.id
        else:
            conversation.nodes[running.parent].error = answer.error or ErrorMessage("stopped_early")


def has_content(answer: StreamedAnswer) -> bool:
    """Whether the model wrote or called anything."""
    return bool(answer.text.strip() or answer.tool_calls)


def slider_ranges(context_length: int | None = None) -> dict[str, SliderRange]:
    """Bounds of the request schema and defaults of Sampling; max_tokens does not exceed the context length."""
    longest = min(int(_bounds("max_tokens")[1]), context_length or DEFAULT_CONTEXT_LENGTH)
    default = Sampling()
    return {
        "max_tokens": SliderRange(1, longest, 1, min(default.max_new_tokens, longest)),
        "temperature": SliderRange(*_bounds("temperature"), 0.05, default.temperature),
        "top_p": SliderRange(*_bounds("top_p"), 0.01, default.top_p),
    }


def _bounds(name: str) -> tuple[float, float]:
    """Minimum and maximum that the schema allows."""
    limits = {type(limit): limit for limit in ChatRequest.model_fields[name].metadata}
    return limits[Ge].ge, limits[Le].le
