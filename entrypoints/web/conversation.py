"""A conversation as a tree of messages: editing or regenerating adds a version, nothing is overwritten.

The messages from the root to a leaf are what a page shows and what the model reads. A conversation has one leaf, or two
while two models answer side by side. Its JSON form is what the browser keeps and what is exported and imported.
"""

import itertools
import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from entrypoints.web.client import Message, StreamedAnswer, ToolCall
from entrypoints.web.request_errors import ErrorMessage

MAX_IMPORT_CHARACTERS = 2_000_000
MAX_TITLE_CHARACTERS = 40
ROOT = 0  # parent of the first messages; no node has this id


@dataclass
class Usage:
    """What an answer took; `is_estimate` if the stream ended before the server reported its tokens."""

    answer_tokens: int
    prompt_tokens: int | None
    seconds: float
    is_estimate: bool = False
    dropped_rounds: int = 0


@dataclass(frozen=True)
class Attachment:
    """A document whose text stands before a question in its message."""

    name: str
    text: str

    def before(self, question: str) -> str:
        """The content of the message."""
        return f"{self.name}:\n\n{self.text}\n\n{question}"


@dataclass
class Node:
    """One version of a message. A question with an error has no answer and is not part of any prompt."""

    id: int
    parent: int
    message: Message
    model: str = ""
    system: str = ""  # system prompt of an answer
    finish_reason: str | None = None
    usage: Usage | None = None
    error: ErrorMessage | None = None
    rating: Literal[-1, 1] | None = None
    correction: str | None = None
    attachment: Attachment | None = None

    def text(self) -> str:
        """What was written: of a question with a document only the question."""
        content = self.message["content"]
        return content.removeprefix(self.attachment.before("")) if self.attachment else content


@dataclass
class Conversation:
    """The nodes by their ids, which count up, and the leaves that are shown."""

    id: str = field(default_factory=lambda: secrets.token_hex(8))
    title: str = ""
    updated: float = field(default_factory=time.time)
    nodes: dict[int, Node] = field(default_factory=dict)
    leaves: list[int] = field(default_factory=lambda: [ROOT])

    def path(self, side: int = 0) -> list[Node]:
        """The messages that one side shows, oldest first."""
        found, at = [], self.leaves[min(side, len(self.leaves) - 1)]
        while at != ROOT:
            found.append(self.nodes[at])
            at = self.nodes[at].parent
        return found[::-1]

    def add(self, message: Message, parent: int) -> Node:
        """Append a version below `parent`, or below ROOT; leaves at the parent move to it."""
        node = Node(max(self.nodes, default=ROOT) + 1, parent, message)
        self.nodes[node.id] = node
        self.leaves = [node.id if leaf == parent else leaf for leaf in self.leaves]
        self.updated = time.time()
        return node

    def add_answer(self, parent: int, answer: StreamedAnswer, model: str, system: str) -> Node:
        """Append an answer; an empty one too, so that it is visible."""
        message: Message = {"role": "assistant", "content": answer.text}
        if answer.tool_calls:
            message["tool_calls"] = answer.tool_calls
        node = self.add(message, parent)
        node.model, node.system = model, system
        self.set_outcome(node, answer)
        return node

    def set_outcome(self, node: Node, answer: StreamedAnswer) -> None:
        """Record how an answer ended."""
        node.finish_reason, node.error = answer.finish_reason, answer.error
        is_estimate = answer.completion_tokens is None
        node.usage = Usage(
            answer.num_tokens(), answer.prompt_tokens, answer.seconds, is_estimate, answer.dropped_rounds
        )
        self.updated = time.time()

    def versions(self, node: Node) -> list[Node]:
        """All versions of a message in the order of their creation; the message itself is one of them."""
        return [other for other in self.nodes.values() if other.parent == node.parent]

    def show(self, node: Node, side: int = 0) -> None:
        """Show this version, with the newest messages below it."""
        at = node.id
        while below := [other.id for other in self.nodes.values() if other.parent == at]:
            at = max(below)
        self.leaves[min(side, len(self.leaves) - 1)] = at

    def remove(self, node: Node) -> None:
        """Remove a message and all messages below it; another version takes its place, if there is one."""
        gone = {node.id}
        for other in self.nodes.values():  # a parent precedes its children
            if other.parent in gone:
                gone.add(other.id)
        self.nodes = {id_: other for id_, other in self.nodes.items() if id_ not in gone}
        left = [other for other in self.nodes.values() if other.parent == node.parent]
        for side, leaf in enumerate(self.leaves):
            if leaf in gone:
                self.leaves[side] = node.parent
                if left:
                    self.show(left[-1], side)
        self.updated = time.time()

    def splice(self, node: Node) -> None:
        """Remove one message; the messages below it stay."""
        del self.nodes[node.id]
        for other in self.nodes.values():
            other.parent = node.parent if other.parent == node.id else other.parent
        self.leaves = [node.parent if leaf == node.id else leaf for leaf in self.leaves]

    def branch(self, node: Node) -> "Conversation":
        """A new conversation that consists of the messages up to this one."""
        copy, at, path = Conversation(title=self.title), node.id, []
        while at != ROOT:
            path.append(self.nodes[at])
            at = self.nodes[at].parent
        for original in reversed(path):
            added = copy.add(original.message, copy.leaves[0])
            added.model, added.system = original.model, original.system
            added.finish_reason, added.usage = original.finish_reason, original.usage
            added.attachment = original.attachment
            added.error = original.error
        return copy

    def prompt(self, side: int = 0) -> list[Message]:
        """The messages that the model reads: without failed questions and without rounds of an empty answer."""
        kept: list[Node] = []
        for node in self.path(side):
            if is_empty(node):
                while kept and kept.pop().message["role"] != "user":
                    pass
            elif node.message["role"] == "assistant" or not node.error:
                kept.append(node)
        return [node.message for node in kept]

    def pending_tool_calls(self, side: int = 0) -> list[ToolCall]:
        """Tool calls of the last answer that have no result yet."""
        with_result = []
        for message in reversed(self.prompt(side)):
            if message["role"] == "tool":
                with_result.append(message["tool_call_id"])
            else:
                return [call for call in message.get("tool_calls", ()) if call["id"] not in with_result]
        return []

    def training_row(self) -> dict[str, Any] | None:
        """The columns content, summary and history of glm train: the last answered round and the rounds before it.

        Rounds with tool calls are omitted, a corrected answer is used in place of the answer. None without a round.
        """
        rounds = plain_rounds(self.path())
        if not rounds:
            return None
        *history, (content, summary) = rounds
        return {"content": content, "summary": summary, "history": history}

    def to_json(self) -> dict[str, Any]:
        """The form that is stored and exported."""
        return asdict(self)

    def to_markdown(self, names: Mapping[str, str]) -> str:
        """A document of the shown messages; `names` has a heading for each role."""
        parts = [f"# {self.title}"]
        for node in self.path():
            message = node.message
            calls = [call["function"] for call in message.get("tool_calls", ())]
            body = [message["content"], *(f"`{call['name']}({call['arguments']})`" for call in calls)]
            parts += [f"## {names[message['role']]}", *(part for part in body if part)]
        return "\n\n".join(parts) + "\n"


def title_of(question: str) -> str:
    """The title of a conversation that begins with this question."""
    return " ".join(question.split())[:MAX_TITLE_CHARACTERS]


def is_empty(node: Node) -> bool:
    """Whether the model ended its answer without a word and without a tool call."""
    message = node.message
    return message["role"] == "assistant" and not message["content"].strip() and not message.get("tool_calls")


def plain_rounds(path: list[Node]) -> list[list[str]]:
    """[question, answer] of each round without tool calls."""
    rounds = []
    for asked, node in itertools.pairwise(path):
        question, answer = asked.message, node.message
        is_plain = answer["role"] == "assistant" and not answer.get("tool_calls") and not is_empty(node)
        if question["role"] == "user" and not asked.error and is_plain:
            rounds.append([question["content"], node.correction or answer["content"]])
    return rounds


def parse_conversations(text: str, limit: int = MAX_IMPORT_CHARACTERS) -> list[Conversation] | ErrorMessage:
    """Conversations of an exported file: one, or a list. Never raises for bad content."""
    if len(text) > limit:
        return ErrorMessage("import_too_large", {"limit": limit})
    try:
        given = json.loads(text)
        found = _CONVERSATIONS.validate_python(given if isinstance(given, list) else [given])
    except (ValueError, RecursionError) as error:
        problem = error.errors()[0] if isinstance(error, ValidationError) else None
        return ErrorMessage("bad_import", {"field": ".".join(map(str, problem["loc"])) if problem else "JSON"})
    for conversation in found:
        if not _is_tree(conversation):
            return ErrorMessage("bad_import", {"field": "nodes"})
    return found


_CONVERSATIONS = TypeAdapter(list[Conversation])


def _is_tree(conversation: Conversation) -> bool:
    """Each parent precedes its children, and each leaf exists."""
    nodes = conversation.nodes
    return (
        1 <= len(conversation.leaves) <= 2
        and all(leaf == ROOT or leaf in nodes for leaf in conversation.leaves)
        and list(nodes) == sorted(nodes)
        and all(id_ == node.id > node.parent >= ROOT for id_, node in nodes.items())
        and all(node.parent in nodes or node.parent == ROOT for node in nodes.values())
    )
