"""The conversations of one visitor: listed, searched, and kept by the browser between two visits."""

import json
from dataclasses import dataclass, field
from typing import Any

from entrypoints.web.conversation import Conversation, parse_conversations
from entrypoints.web.request_errors import ErrorMessage


@dataclass
class ConversationList:
    """Conversations by id; `removed` lists those that the browser still has to delete."""

    conversations: dict[str, Conversation] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)
    unwritten: list[str] = field(default_factory=list)  # imported ones

    def put(self, conversation: Conversation) -> None:
        """Add or replace a conversation; one without messages is not kept."""
        if conversation.nodes:
            self.conversations[conversation.id] = conversation

    def remove(self, id_: str) -> None:
        """Delete a conversation, here and in the browser."""
        self.conversations.pop(id_, None)
        self.removed.append(id_)

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
        try:
            texts = json.loads(stored)
        except ValueError:
            return
        for text in texts if isinstance(texts, list) else ():
            if isinstance(text, str) and not isinstance(found := parse_conversations(text), ErrorMessage):
                for conversation in found:
                    self.conversations.setdefault(conversation.id, conversation)

    def changes(self, conversation: Conversation) -> dict[str, Any]:
        """What the browser has to write: {put: {id: text}, remove: [id], current: id}."""
        changed = [self.conversations[id_] for id_ in self.unwritten if id_ in self.conversations]
        if conversation.nodes:
            changed.append(conversation)
        put = {each.id: json.dumps(each.to_json(), ensure_ascii=False) for each in changed}
        removed, self.removed, self.unwritten = self.removed, [], []
        return {"put": put, "remove": removed, "current": conversation.id}


def _contains(conversation: Conversation, wanted: str) -> bool:
    texts = (node.message["content"] for node in conversation.nodes.values())
    return not wanted or wanted in conversation.title.casefold() or any(wanted in text.casefold() for text in texts)
