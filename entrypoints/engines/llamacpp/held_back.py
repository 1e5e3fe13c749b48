"""The ids that llama.cpp's stream does not name.

It holds tokens back while their bytes end within a character, then reports the last id with the bytes of all. The other
ids follow from the bytes before those of the last token: every token but the last ends within a character.
"""

import codecs
from collections.abc import Iterator

from entrypoints.checkpoint.tokenizer import Tokenizer


class HeldBackTokens:
    """Finds these ids for one vocabulary."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # ids by their bytes; only tokens that are no whole characters can be held back
        self._ids: dict[bytes, int] = {}
        for id_ in range(tokenizer.size):
            data = tokenizer.token_bytes(id_)
            if data and not data.isascii() and not _is_text(data):
                self._ids[data] = id_
        self._longest = max(map(len, self._ids), default=1)

    def before(self, data: bytes, last: int, count: int | None) -> list[int]:
        """The ids before `last`, whose bytes are those of `data` before its own.

        count: their number; None if it is not known. Several divisions of the same bytes into as many tokens are rare:
        of these the vocabulary's own encoding is taken, else the one with the longest tokens first.
        """
        own = self._tokenizer.token_bytes(last)
        if not data.endswith(own):
            return [self._tokenizer.pad_id] * (count or 0)
        bytes_before = data[: len(data) - len(own)]
        if not bytes_before and not count:
            return []
        found = [ids for ids in self._divisions(bytes_before, 0) if count is None or len(ids) == count]
        encoded = self._tokenizer.encode(data.decode("utf-8", "replace")) if len(found) > 1 else []
        own_division = next((ids for ids in found if encoded[: len(ids) + 1] == [*ids, last]), None)
        return own_division or (found[0] if found else [self._tokenizer.pad_id] * (count or 0))

    def _divisions(self, data: bytes, start: int) -> Iterator[list[int]]:
        """All lists of ids for the bytes from `start` on, each id ending within a character; longest tokens first."""
        if start == len(data):
            yield []
            return
        for end in range(min(len(data), start + self._longest), start, -1):
            id_ = self._ids.get(data[start:end])
            if id_ is not None and _ends_within_character(data[:end]):
                yield from ([id_, *rest] for rest in self._divisions(data, end))


def _is_text(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _ends_within_character(data: bytes) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    decoder.decode(data)
    return bool(decoder.getstate()[0])
