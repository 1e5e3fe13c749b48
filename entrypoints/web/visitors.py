"""Who uses a chat page, and where the conversations are kept, which the operator decides."""

from collections.abc import Mapping
from dataclasses import dataclass

from entrypoints.web.conversation_database import ConversationDatabase, UserConversations
from entrypoints.web.session import ChatSession
from entrypoints.web.user_sign_in import find_user, signed_in_user, user_name
from entrypoints.web.users import PageUser


@dataclass(frozen=True)
class Visitors:
    """The users file, empty without users, and the database if conversations are kept on the server."""

    users_file: str = ""
    place: str = "browser"
    database: ConversationDatabase | None = None

    def welcome(self, session: ChatSession, headers: Mapping[str, str]) -> PageUser | None:
        """Give the session the user of the request, with the key and the stored conversations of the user."""
        user = signed_in_user(headers, self.users_file)
        session.user, session.user_key = (user.name, user.api_key) if user else ("", "")
        session.kept.place = self.place
        if self.place == "server":
            session.kept.place = "server" if user and self.database else "off"
            if user and self.database:
                session.kept.stored = UserConversations(self.database, user.name, lambda: self._exists(user))
        return user

    def _exists(self, user: PageUser) -> bool:
        return find_user(self.users_file, user.name) is not None


def is_of_another_user(session: ChatSession, headers: Mapping[str, str]) -> bool:
    """Whether the tab belongs to another user: who opened it has signed out, and someone else has signed in."""
    return session.user is not None and session.user != user_name(headers)
