"""What the buttons of a message do, on both chat pages."""

from dataclasses import dataclass

from entrypoints.web.client import ApiClient
from entrypoints.web.conversation import Node
from entrypoints.web.feedback import FeedbackFile
from entrypoints.web.i18n import translate
from entrypoints.web.session import ChatOptions, ChatSession
from entrypoints.web.transcript import raw_text


@dataclass(frozen=True)
class Action:
    """A click on the button `name` of a message on one side."""

    name: str
    side: int
    node: int


@dataclass(frozen=True)
class ActionResult:
    """What the page does after an action, besides drawing the conversation."""

    copied: str | None = None  # text for the clipboard


class MessageActions:
    """The actions of one page; `feedback` is where ratings go, None if the operator collects none."""

    def __init__(self, api: ApiClient, feedback: FeedbackFile | None) -> None:
        self.api = api
        self.feedback = feedback

    def run(self, session: ChatSession, options: ChatOptions, action: Action, language: str) -> ActionResult:
        """Change the session; answers are then in progress if the action asked for one."""
        node = session.conversation.nodes.get(action.node)
        if node is None or session.running:
            return ActionResult()
        session.confirmed = None
        name = action.name
        if name in ("edit", "correct"):
            session.edited = node.id
        elif name in ("regenerate", "retry"):
            session.regenerate(self.api, options, node)
        elif name == "continue":
            session.continue_answer(self.api, options, node, translate(language, "continue_request"))
        elif name in ("like", "dislike"):
            self._rate(session, node, 1 if name == "like" else -1)
        else:
            _rearrange(session, node, action)
        return ActionResult(raw_text(node.message) if name == "copy" else None)

    def editable_text(self, node: Node) -> str:
        """The text that editing or correcting starts from."""
        return node.correction if node.correction is not None else node.text()

    def save_edit(self, session: ChatSession, options: ChatOptions, text: str) -> None:
        """A new version of a question, with a request for its answer; or the correction of an answer."""
        node = session.conversation.nodes.get(session.edited or 0)
        session.edited = None
        if node is None or not text.strip():
            return
        if node.message["role"] == "assistant":
            node.correction = text if text != node.message["content"] else None
            self._save(session, node)
        else:
            session.edit(self.api, options, node, text)

    def _rate(self, session: ChatSession, node: Node, rating: int) -> None:
        node.rating = None if node.rating == rating else (1 if rating > 0 else -1)
        self._save(session, node)

    def _save(self, session: ChatSession, node: Node) -> None:
        if self.feedback:
            self.feedback.add(session.conversation, node)


def _rearrange(session: ChatSession, node: Node, action: Action) -> None:
    """The actions that change which messages are shown."""
    conversation = session.conversation
    if action.name == "branch":
        session.open(conversation.branch(node))
    elif action.name in ("previous_version", "next_version"):
        versions = conversation.versions(node)
        number = versions.index(node) + (-1 if action.name == "previous_version" else 1)
        conversation.show(versions[number % len(versions)], action.side)
    elif action.name == "delete":
        session.confirmed = node.id
    elif action.name == "confirm_delete":
        conversation.remove(node)
        session.last_answer = session.error = None
