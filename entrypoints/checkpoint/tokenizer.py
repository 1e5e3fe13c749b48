"""Converts the vocabulary of a family to an exactly equal `tokenizer.json`, and loads the latter."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import tokenizers
from tokenizers import processors

from entrypoints.checkpoint import sentencepiece_vocabulary, tiktoken_vocabulary
from entrypoints.checkpoint.atomic_files import check_not_lfs_pointer
from entrypoints.checkpoint.prompt_file import read_prompt_format
from entrypoints.errors import UserError
from entrypoints.families import CHATGLM3, Family, family_named
from entrypoints.untrusted import parse_json

VOCABULARY_FILE = "tokenizer.model"
TOKENIZER_FILE = "tokenizer.json"
# Characters. `encode` blocks all other threads, 2 s per million characters; the batch call is 3 times as fast on long
# texts and slower on short ones.
LONG_TEXT = 10_000
CONVERT_AGAIN = "convert the checkpoint again"
VARYING = ("version", "truncation", "padding", "added_tokens", "model")  # parts of tokenizer.json beside the pipeline
VOCABULARY_PARTS = ("vocab", "merges")  # of its model


class Vocabulary(Protocol):
    """What a kind of vocabulary consists of; each is a module."""

    WITHOUT_TEXT: tuple[str, ...]  # tokens that stand for no text

    def convert(self, model_file: Path, /) -> tokenizers.Tokenizer:
        """The equal tokenizer of a tokenizer.model, without special tokens. Raises UserError: it is of another kind."""

    def build(self, vocabulary: dict[str, int], merges: list[tuple[str, str]], /) -> tokenizers.Tokenizer:
        """The steps of encoding and decoding that are the same for every vocabulary of the kind."""

    def token_bytes(self, token: str, /) -> bytes:
        """The bytes of a token of the vocabulary."""

    def byte_token(self, value: int, /) -> str:
        """The token of one byte."""


VOCABULARIES: dict[str, Vocabulary] = {
    "sentencepiece": sentencepiece_vocabulary,
    "tiktoken": tiktoken_vocabulary,
}


def convert_vocabulary(model_file: Path, family: Family = CHATGLM3) -> tokenizers.Tokenizer:
    """Build a tokenizer that gives the same ids as tokenizer.model, with the special tokens after its last token.

    Raises UserError: the file is missing, an LFS pointer, damaged, or not a vocabulary of the family.
    """
    return with_special_tokens(VOCABULARIES[family.vocabulary].convert(model_file), family)


def with_special_tokens(tokenizer: tokenizers.Tokenizer, family: Family) -> tokenizers.Tokenizer:
    """The same tokenizer, to which the special tokens of the family were added."""
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(name, special=True, normalized=False) for name in family.special_tokens]
    )
    start = [(name, _token_id(tokenizer, name)) for name in ("[gMASK]", "<sop>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A", pair="[gMASK] <sop> $A $B:1", special_tokens=start
    )
    return tokenizer


def _token_id(backend: tokenizers.Tokenizer, token: str) -> int:
    id_ = backend.token_to_id(token)
    if id_ is None:
        raise KeyError(token)
    return id_


class Tokenizer:
    """Text to ids and back, for one checkpoint. Text is never encoded as special tokens. Safe to share by threads."""

    def __init__(self, backend: tokenizers.Tokenizer, family: Family = CHATGLM3) -> None:
        backend.encode_special_tokens = True  # the name of a special token in a text is encoded as ordinary characters
        backend.no_truncation()
        backend.no_padding()
        self.family = family
        self._backend = backend
        self._vocabulary = VOCABULARIES[family.vocabulary]
        self._special = {name: _token_id(backend, name) for name in family.special_tokens}
        self.eos_id = _token_id(backend, family.eos_token)
        self.pad_id = _token_id(backend, family.pad_token)
        self.stop_ids = (self.eos_id, *(self.special_token_id(name) for name in family.stop_tokens))
        self._token_bytes = self._bytes_by_id()
        self.size = backend.get_vocab_size()
        self.max_token_bytes = max(map(len, self._token_bytes))

    def __reduce__(self) -> tuple[Callable[..., "Tokenizer"], tuple[tokenizers.Tokenizer, Family]]:
        return Tokenizer, (self._backend, self.family)  # pickling loses the settings of the backend

    def encode(self, text: str) -> list[int]:
        """Ids of plain text as the family's own tokenizer gives them, without special tokens.

        Surrogates, which broken input can contain, count as the character of a pair, or as U+FFFD.
        """
        if not text.isascii():
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if len(text) > LONG_TEXT:
            return self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return self._backend.encode(text, add_special_tokens=False).ids

    def token_bytes(self, id_: int) -> bytes:
        """Bytes of one id; empty for special, padding, undefined and negative ids."""
        return self._token_bytes[id_] if 0 <= id_ < len(self._token_bytes) else b""

    def byte_token_id(self, value: int) -> int:
        """Id of the token of one byte, 0 to 255."""
        return _token_id(self._backend, self._vocabulary.byte_token(value))

    def token_names(self) -> list[str]:
        """The tokens of the vocabulary as tokenizer.json names them, in the order of their ids."""
        names = [""] * self.size
        for name, id_ in self._backend.get_vocab().items():
            names[id_] = name
        return names

    def special_token_id(self, name: str) -> int:
        """Id of one of the family's special tokens."""
        return self._special[name]

    def _bytes_by_id(self) -> list[bytes]:
        found = [b""] * self._backend.get_vocab_size()
        without_text = {*self._vocabulary.WITHOUT_TEXT, *self.family.special_tokens}
        for token, id_ in self._backend.get_vocab().items():
            if token not in without_text:
                found[id_] = self._vocabulary.token_bytes(token)
        return found


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load `tokenizer.json` of a converted checkpoint, whose prompt.json names the family.

    Raises UserError: it is missing, damaged or lacks the family's special tokens.
    """
    file = Path(folder) / TOKENIZER_FILE
    if not file.is_file():
        raise UserError(f"{folder} contains no {TOKENIZER_FILE}", "convert the checkpoint first: glm convert SRC DST")
    check_not_lfs_pointer(file)
    return parse_tokenizer(file.read_bytes(), f"{file}", family_named(read_prompt_format(Path(folder)).family))


def parse_tokenizer(text: bytes | str, source: str, family: Family = CHATGLM3) -> Tokenizer:
    """The tokenizer of a `tokenizer.json` text; `source` names it in errors.

    Raises UserError: it is damaged, has other steps than `convert_vocabulary` writes, or lacks special tokens.
    """
    _check_content(parse_json(text, source, CONVERT_AGAIN), source, family)
    try:
        backend = tokenizers.Tokenizer.from_buffer(text.encode() if isinstance(text, str) else text)
    except BaseException as error:  # a panic of the library is not an Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise UserError(f"{source} cannot be read ({error})", CONVERT_AGAIN) from error
    return Tokenizer(backend, family)


def _check_content(content: Any, source: str, family: Family) -> None:
    """Raises UserError for anything that the library would act on beside the vocabulary.

    It offers regular expressions, which can take forever, and steps that give other ids than the model was trained on.
    """
    expected = json.loads(VOCABULARIES[family.vocabulary].build({"<unk>": 0}, []).to_str())
    try:
        added = {token["content"]: token["id"] for token in content["added_tokens"]}
        vocabulary = content["model"]["vocab"] | added
        wrong = [
            name for name in {*expected, *content} if name not in VARYING and not _same_step(content, expected, name)
        ]
        model = {**content["model"], **{name: expected["model"][name] for name in VOCABULARY_PARTS}}
    except (TypeError, KeyError, AttributeError) as error:  # another type somewhere
        raise UserError(f"{source} is not a tokenizer ({error!r})", CONVERT_AGAIN) from error
    missing = [name for name in (*family.special_tokens, family.eos_token, family.pad_token) if name not in vocabulary]
    if missing:
        raise UserError(
            f"{source} lacks {', '.join(missing)}, so it is not a vocabulary of {family.title}",
            "convert one with glm convert",
        )
    if wrong or model != expected["model"]:
        raise UserError(
            f"{source} has another {', '.join(sorted(wrong)) or 'model'} than {family.title}", CONVERT_AGAIN
        )
    ids, size = vocabulary.values(), len(vocabulary)
    if not all(type(id_) is int and 0 <= id_ < size for id_ in ids) or len(set(ids)) < size:
        raise UserError(f"{source} has ids that occur twice or are not from 0 to {size - 1}", CONVERT_AGAIN)


def _same_step(content: dict[str, Any], expected: dict[str, Any], name: str) -> bool:
    """The post-processor, which adds special tokens, is never used by `Tokenizer.encode`, but loading checks it."""
    return name == "post_processor" or content.get(name) == expected.get(name)
