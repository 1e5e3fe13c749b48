"""Cutting a conversation to a length: whole turns, or the end of a text; the length is any function of them."""

import bisect
from collections.abc import Callable
from typing import TYPE_CHECKING

from entrypoints.errors import UserError

if TYPE_CHECKING:
    from entrypoints.chat_format.prompt import Message


class TokenLimitError(UserError):
    """A limit in tokens does not hold what is never cut; `least` is its flag and the smallest value that does."""

    def __init__(self, problem: str, remedy: str, least: tuple[str, int] = ("", 0)) -> None:
        super().__init__(problem, remedy)
        self.least = least

    @classmethod
    def of(cls, flag: str, limit: int, least: int, kept: str) -> "TokenLimitError":
        """kept: what the limit does not hold."""
        return cls(f"{flag} {limit} does not hold {kept}", f"use at least {least}", (flag, least))


def drop_oldest_turns(turns: list["Message"], fits: Callable[[list["Message"]], bool]) -> list["Message"]:
    """Drop the oldest questions, each with all turns that answer it, until the rest fits or one question is left."""
    if fits(turns):
        return turns
    questions = [index for index, turn in enumerate(turns) if turn.role == "user"]
    candidates = [turns[: questions[0]] + turns[start:] for start in questions[1:]] or [turns]
    return candidates[bisect.bisect_left(candidates, True, hi=len(candidates) - 1, key=fits)]


def longest_fitting_prefix(text: str, fits: Callable[[str], bool]) -> str:
    """The longest prefix of `text`, in whole characters, that fits; the empty text always fits."""
    if fits(text):
        return text
    low, high = 0, len(text) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(text[:middle]) else (low, middle - 1)
    return text[:low]
