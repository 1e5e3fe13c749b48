"""Conversations of signed-in users in an SQLite file, for pages whose operator stores them on the server.

Several pages may use the file at once: the Gradio and the Streamlit page, and several browsers of a user.
"""

import contextlib
import logging
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from entrypoints.api.auth import open_private
from entrypoints.errors import UserError

logger = logging.getLogger(__name__)
FILE_NAME = "conversations.sqlite3"
FORMAT = 1  # PRAGMA user_version
MAX_USER_BYTES = 20_000_000  # then the oldest conversations of the user are removed
LOCK_TIMEOUT_SECONDS = 10
SCHEMA = """CREATE TABLE IF NOT EXISTS conversations (
  user TEXT NOT NULL, id TEXT NOT NULL, version TEXT NOT NULL, updated REAL NOT NULL, bytes INTEGER NOT NULL,
  text TEXT NOT NULL, PRIMARY KEY (user, id))"""
REMOVE_OLDEST = """DELETE FROM conversations WHERE user = :user AND id IN (
  SELECT id FROM (SELECT id, SUM(bytes) OVER (ORDER BY updated DESC, id) AS total FROM conversations
  WHERE user = :user) WHERE total > :limit AND id != :kept)"""


class ConversationDatabase:
    """The file; a conversation is its JSON text with a version, which changes with each write."""

    def __init__(self, folder: Path) -> None:
        """Create the file if needed. Raises UserError: it cannot be written, or is not a file of this format."""
        self.file = folder / FILE_NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
            os.close(open_private(str(self.file), os.O_CREAT | os.O_RDWR))
            with self._transaction() as database:
                (found,) = database.execute("PRAGMA user_version").fetchone()
                if found not in (0, FORMAT):
                    raise UserError(f"{self.file} has format {found}, this version reads {FORMAT}", "update glm")
                database.execute(SCHEMA)
                database.execute(f"PRAGMA user_version = {FORMAT}")
        except (OSError, sqlite3.Error) as error:
            remedy = "name a folder with --state-dir that this user may write"
            raise UserError(f"conversations cannot be stored in {self.file} ({error})", remedy) from error

    def versions(self, user: str) -> dict[str, str]:
        """{id: version} of the conversations of a user."""
        with self._connection() as database:
            rows = database.execute("SELECT id, version FROM conversations WHERE user = ?", (user,))
            return dict(rows)

    def read(self, user: str, id_: str) -> tuple[str, str] | None:
        """(version, text) of a conversation of the user."""
        query = "SELECT version, text FROM conversations WHERE user = ? AND id = ?"
        with self._connection() as database:
            row: tuple[str, str] | None = database.execute(query, (user, id_)).fetchone()
            return row

    def write(self, user: str, id_: str, text: str, known: str | None) -> str | None:
        """Add or replace a conversation; returns its new version. None: another page changed the version `known`."""
        version = secrets.token_hex(8)
        with self._transaction() as database:
            query = "SELECT version FROM conversations WHERE user = ? AND id = ?"
            row = database.execute(query, (user, id_)).fetchone()
            if row and row[0] != known:
                return None
            values = (user, id_, version, time.time(), len(text.encode()), text)
            database.execute("INSERT OR REPLACE INTO conversations VALUES (?, ?, ?, ?, ?, ?)", values)
            database.execute(REMOVE_OLDEST, {"user": user, "limit": MAX_USER_BYTES, "kept": id_})
        return version

    def remove(self, user: str, id_: str) -> None:
        """Delete a conversation of the user."""
        with self._transaction() as database:
            database.execute("DELETE FROM conversations WHERE user = ? AND id = ?", (user, id_))

    def remove_user(self, user: str) -> int:
        """Delete all conversations of a user; returns how many there were."""
        with self._transaction() as database:
            return database.execute("DELETE FROM conversations WHERE user = ?", (user,)).rowcount

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self.file, timeout=LOCK_TIMEOUT_SECONDS, isolation_level=None)
        with contextlib.closing(connection) as database:
            database.execute("PRAGMA secure_delete = ON")  # overwrites what is deleted
            yield database

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._connection() as database:
            database.execute("BEGIN IMMEDIATE")
            yield database
            database.execute("COMMIT")


class UserConversations:
    """The stored conversations of one user, as one browser tab knows them."""

    def __init__(self, database: ConversationDatabase, user: str, is_user: Callable[[], bool]) -> None:
        """`is_user` tells whether the user still exists: an answer may end after the operator deleted the user."""
        self._database, self._user, self._is_user = database, user, is_user
        self._versions: dict[str, str] = {}
        self._texts: dict[str, int] = {}  # hashes of the texts of these versions

    def changes(self) -> tuple[list[str], list[str]]:
        """The texts that are new since the last call, and the ids that are gone."""
        try:
            found = self._database.versions(self._user)
            changed = [id_ for id_, version in found.items() if self._versions.get(id_) != version]
            rows = {id_: row for id_ in changed if (row := self._database.read(self._user, id_))}
        except sqlite3.Error as error:
            logger.error("cannot read %s: %s", self._database.file, error)
            return [], []
        gone = [id_ for id_ in self._versions if id_ not in found]
        for id_ in gone:
            del self._versions[id_]  # its text is not forgotten: only a change stores it again
        for id_, (version, text) in rows.items():
            self._versions[id_], self._texts[id_] = version, hash(text)
        return [text for _, text in rows.values()], gone

    def write(self, id_: str, text: str) -> bool:
        """Store a conversation if it changed. False: another tab changed it too. Raises sqlite3.Error."""
        if self._texts.get(id_) == hash(text) or not self._is_user():
            return True
        version = self._database.write(self._user, id_, text, self._versions.get(id_))
        if version is None:
            self._forget(id_)
            return False
        self._versions[id_], self._texts[id_] = version, hash(text)
        return True

    def has(self, id_: str) -> bool:
        """Whether the conversation is stored, as far as this tab knows."""
        return id_ in self._versions

    def remove(self, id_: str) -> None:
        """Delete a conversation. Raises sqlite3.Error."""
        self._database.remove(self._user, id_)
        self._forget(id_)

    def _forget(self, id_: str) -> None:
        self._versions.pop(id_, None)
        self._texts.pop(id_, None)
