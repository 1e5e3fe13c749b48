"""The conversations of one visitor: listed, searched, and kept by the browser or the server between two visits."""

import json
import logging
import sqlite3
from dataclasses import dataclass, field
from typing import Any

from entrypoints.web.conversation import Conversation, parse_conversations
from entrypoints.web.conversation_database import MAX_USER_BYTES, UserConversations
from entrypoints.web.request_errors import ErrorMessage

logger = logging.getLogger(__name__)


@dataclass
class ConversationList:
    """Conversations by id; `removed` lists those that the browser still has to delete."""

    conversations: dict[str, Conversation] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)
    unwritten: list[str] = field(default_factory=list)  # imported ones
    place: str = "browser"  # one of CONVERSATION_PLACES
    stored: UserConversations | None = None  # if the place is the server
    deleted_elsewhere: set[str] = field(default_factory=set)

    def put(self, conversation: Conversation) -> None:
        """Add or replace a conversation; one without messages is not kept."""
        if conversation.nodes and conversation.id not in self.deleted_elsewhere:
            self.conversations[conversation.id] = conversation

    def get(self, id_: str | None) -> Conversation | None:
        """The conversation as it is now: another browser of the user may have continued it."""
        self.synchronize()
        return self.conversations.get(id_ or "")

    def remove(self, id_: str) -> bool:
        """Delete a conversation, here and where it is kept; False if it cannot be deleted there."""
        try:
            if self.stored:
                self.stored.remove(id_)
        except sqlite3.Error as error:
            logger.error("a conversation cannot be deleted: %s", error)
            return False
        self.conversations.pop(id_, None)
        self.removed.append(id_)
        return True

    def entries(self, search: str = "") -> list[tuple[str, str]]:
        """(title, id) of the conversations that contain the text `search`, the newest first."""
        wanted = search.strip().casefold()
        newest = sorted(self.conversations.values(), key=lambda conversation: -conversation.updated)
        return [
            (conversation.title or "…", conversation.id) for conversation in newest if _contains(conversation, wanted)
        ]

    def add_from(self, text: str) -> list[Conversation] | ErrorMessage:
        """Add the conversations of an exported file; one that has the id of another gets a new id."""
        found = parse_conversations(text)
        if isinstance(found, ErrorMessage):
            return found
        for conversation in found:
            if conversation.id in self.conversations:
                conversation.id = Conversation().id
            self.put(conversation)
        return found

    def restore(self, stored: str) -> None:
        """Add what the browser kept: a JSON list of texts, one for each conversation. Damaged ones are ignored."""
        if self.place != "browser":
            self.synchronize()
            return
        try:
            texts = json.loads(stored)
        except ValueError:
            return
        for text in texts if isinstance(texts, list) else ():
            for conversation in _parsed(text):
                self.conversations.setdefault(conversation.id, conversation)

    def synchronize(self) -> None:
        """Take over what other browsers of the user changed, if the server keeps the conversations."""
        if not self.stored:
            return
        texts, gone = self.stored.changes()
        self.deleted_elsewhere.update(gone)
        for id_ in gone:
            self.conversations.pop(id_, None)
        for text in texts:
            for conversation in _parsed(text):
                self.conversations[conversation.id] = conversation

    def save(self, conversation: Conversation) -> bool:
        """Store a conversation on the server, if they are kept there; False if it cannot be stored.

        If another browser changed it since it was opened, it becomes a conversation of its own.
        """
        if not self.stored or not conversation.nodes:
            return True
        try:
            if not self.stored.write(conversation.id, _text(conversation)):
                self.conversations.pop(conversation.id, None)
                conversation.id = Conversation().id
                self.stored.write(conversation.id, _text(conversation))
        except sqlite3.Error as error:
            logger.error("a conversation cannot be stored: %s", error)
            return False
        if self.stored.has(conversation.id):
            self.deleted_elsewhere.discard(conversation.id)
        self.put(conversation)
        return True

    def changes(self, conversation: Conversation) -> dict[str, Any]:
        """What the browser has to write: {put: {id: text}, remove: [id], current: id}."""
        changed = [self.conversations[id_] for id_ in self.unwritten if id_ in self.conversations]
        if conversation.nodes:
            changed.append(conversation)
        removed, self.removed, self.unwritten = self.removed, [], []
        if self.place == "browser":
            put = {each.id: _text(each) for each in changed}
            return {"put": put, "remove": removed, "current": conversation.id}
        for each in changed:
            self.save(each)
        return {"put": {}, "remove": [], "current": conversation.id if self.stored else ""}


def _text(conversation: Conversation) -> str:
    return json.dumps(conversation.to_json(), ensure_ascii=False)


def _parsed(text: object) -> list[Conversation]:
    found = parse_conversations(text, MAX_USER_BYTES) if isinstance(text, str) else []
    return [] if isinstance(found, ErrorMessage) else found


def _contains(conversation: Conversation, wanted: str) -> bool:
    texts = (node.message["content"] for node in conversation.nodes.values())
    return not wanted or wanted in conversation.title.casefold() or any(wanted in text.casefold() for text in texts)
