"""A `tokenizer.model` of tiktoken ranks as an exactly equal `tokenizers` BPE, such as GLM-4's.

tiktoken joins the two neighbors whose bytes together have the lowest rank. `tokenizers` follows a list of merges, so
every split of a token into two tokens is one, ordered by the rank of the whole. A text that is a token is that token.
"""

import base64
import binascii
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from entrypoints.checkpoint.atomic_files import check_not_lfs_pointer
from entrypoints.errors import UserError

# the words of GLM-4's tokenization_chatglm.py
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WITHOUT_TEXT: tuple[str, ...] = ()
MAX_FILE_BYTES = 64 << 20
MAX_TOKEN_BYTES = 1024
REMEDY = "use the vocabulary of GLM-4"


def convert(model_file: Path) -> tokenizers.Tokenizer:
    """Build a tokenizer that gives the same ids as the ranks, without special tokens after them.

    Raises UserError: the file is missing, an LFS pointer, damaged, or holds no ranks from 0 on with all single bytes.
    """
    return from_ranks(_read_ranks(model_file), f"{model_file}")


def from_ranks(ranks: list[bytes], source: str) -> tokenizers.Tokenizer:
    """Build a tokenizer from the bytes of each token, in the order of their ids.

    Raises UserError: a token occurs twice, or that of a single byte is missing.
    """
    if len(set(ranks)) < len(ranks) or not set(ranks) >= {bytes([value]) for value in range(256)}:
        raise UserError(f"{source} has a token twice, or lacks the token of a byte", REMEDY)
    rank_of = {token: rank for rank, token in enumerate(ranks)}
    names = [name_of(token) for token in ranks]
    merges = []
    for rank, token in enumerate(ranks):
        splits = ((rank_of.get(token[:cut]), rank_of.get(token[cut:])) for cut in range(1, len(token)))
        merges += [(rank, left, right) for left, right in splits if left is not None and right is not None]
    pairs = [(names[left], names[right]) for _, left, right in sorted(merges)]
    return build({name: rank for rank, name in enumerate(names)}, pairs)


def build(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """The steps of encoding and decoding that are the same for every vocabulary."""
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def token_bytes(token: str) -> bytes:
    """The bytes of a token, whose name has one character for each. Raises ValueError: another character."""
    values = _byte_of_character()
    try:
        return bytes(values[character] for character in token)
    except KeyError as error:
        raise ValueError(f"{token[:20]!r} does not name bytes") from error


def byte_token(value: int) -> str:
    """The token of one byte, 0 to 255."""
    return _characters()[value]


def name_of(token: bytes) -> str:
    """The name of a token in tokenizer.json."""
    characters = _characters()
    return "".join(characters[value] for value in token)


@cache
def _characters() -> tuple[str, ...]:
    """The character that stands for each byte, as in GPT-2: printable ones for themselves, others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [value for value in range(256) if value not in printable]
    return tuple(chr(value if value in printable else 0x100 + others.index(value)) for value in range(256))


@cache
def _byte_of_character() -> dict[str, int]:
    return {character: value for value, character in enumerate(_characters())}


def ranks_file(ranks: Iterable[bytes]) -> bytes:
    """The contents of tokenizer.model for the bytes of each token, in the order of their ids."""
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(ranks))


def _read_ranks(file: Path) -> list[bytes]:
    if not file.is_file():
        raise UserError(f"file not found: {file}", "copy tokenizer.model of the checkpoint there")
    check_not_lfs_pointer(file)
    if file.stat().st_size > MAX_FILE_BYTES:
        raise UserError(f"{file} is too large for a vocabulary of ranks", REMEDY)
    try:
        return list(_parse_ranks(file.read_bytes().splitlines()))
    except (ValueError, binascii.Error) as error:
        raise UserError(f"{file} is not a vocabulary of tiktoken ranks ({error})", REMEDY) from error


def _parse_ranks(lines: Iterable[bytes]) -> Iterable[bytes]:
    """The bytes of each token. Raises ValueError: a line is not `base64 rank`, or the ranks have a gap."""
    for expected, line in enumerate(line for line in lines if line):
        encoded, _, rank = line.partition(b" ")
        token = base64.b64decode(encoded, validate=True)
        if rank != str(expected).encode() or not 0 < len(token) <= MAX_TOKEN_BYTES:
            raise ValueError(f"line {expected + 1} is {line[:40]!r}")
        yield token
