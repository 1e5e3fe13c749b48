"""The vocabulary: a SentencePiece `tokenizer.model` to an exact `tokenizer.json`, and the tokenizer everything uses.

Limit: only BPE models with byte fallback and the identity normalizer, as ChatGLM3's is.
"""

import logging
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, processors

from entrypoints.checkpoint.files import refuse_lfs_pointer
from entrypoints.errors import UserError
from entrypoints.prompt import ANSWER_ENDS, CONTROL_TOKENS

logger = logging.getLogger(__name__)
BLANK = "▁"  # SentencePiece's mark for a space
VOCABULARY_FILE = "tokenizer.model"
TOKENIZER_FILE = "tokenizer.json"
LONG = 10_000  # letters; `encode` holds all other threads up, 2 s per million; the batch call is 3 times as fast
PROBE = " 你好，  ①Ａ１ WORLD é \t\n🙂 "  # what a normalizer, or a model other than BPE, treats in another way


def convert_vocabulary(model_file: Path) -> tokenizers.Tokenizer:
    """Build the tokenizer that gives the same ids as the SentencePiece model, with CONTROL_TOKENS after its last piece.

    Raises UserError when the file is missing, an LFS pointer, damaged or no BPE with byte fallback
    and the identity normalizer.
    """
    if not model_file.is_file():
        raise UserError(f"{model_file} does not exist", "copy tokenizer.model of the checkpoint there")
    refuse_lfs_pointer(model_file)
    import sentencepiece  # only here: an image that runs converted models has no need of it

    pieces = sentencepiece.SentencePieceProcessor()
    try:
        pieces.Load(str(model_file))
    except (RuntimeError, OSError) as error:
        raise UserError(f"{model_file} is no SentencePiece vocabulary ({error})", "fetch the file again") from error
    size = pieces.GetPieceSize()
    vocabulary = {pieces.IdToPiece(id_): id_ for id_ in range(size)}
    if not any(pieces.IsByte(id_) for id_ in range(size)):
        raise UserError(f"{model_file} has no byte pieces", "use the vocabulary of ChatGLM3")
    ordinary = [
        id_ for id_ in range(size) if not (pieces.IsByte(id_) or pieces.IsControl(id_) or pieces.IsUnknown(id_))
    ]
    merges = _merges({pieces.IdToPiece(id_): pieces.GetScore(id_) for id_ in ordinary}, vocabulary)
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token=pieces.IdToPiece(pieces.unk_id()), fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    probe = PROBE + "".join(pieces.IdToPiece(id_) for id_ in ordinary).replace(BLANK, " ")
    if tokenizer.encode(probe).ids != pieces.EncodeAsIds(probe):
        raise UserError(f"{model_file} is no BPE that leaves text as it is", "use the vocabulary of ChatGLM3")
    _add_control_tokens(tokenizer)
    return tokenizer


def _add_control_tokens(tokenizer: tokenizers.Tokenizer) -> None:
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(name, special=True, normalized=False) for name in CONTROL_TOKENS]
    )
    start = [(name, tokenizer.token_to_id(name)) for name in ("[gMASK]", "<sop>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A", pair="[gMASK] <sop> $A $B:1", special_tokens=start
    )


def _merges(scores: dict[str, float], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every split of a piece into two pieces, the best-scored piece first: the order in which SentencePiece merges."""
    found = []
    for piece, score in scores.items():
        splits = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        found += [(-score, vocabulary[a], vocabulary[b], a, b) for a, b in splits if a in scores and b in scores]
    return [(a, b) for *_, a, b in sorted(found)]


class Tokenizer:
    """Text to ids and back for one checkpoint. No text ever becomes a control id. Safe to share between threads."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        backend.encode_special_tokens = True  # the letters of a control token in a text are letters
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._control = {name: backend.token_to_id(name) for name in CONTROL_TOKENS}
        self.eos_id: int = backend.token_to_id("</s>")
        self.pad_id: int = backend.token_to_id("<unk>")
        self.stop_ids = (self.eos_id, *(self.control(name) for name in ANSWER_ENDS))
        self._pieces = self._bytes_of_pieces()
        self.size = backend.get_vocab_size()
        self.longest = max(map(len, self._pieces))  # bytes of one id at most

    def __reduce__(self) -> tuple:
        return Tokenizer, (self._backend,)  # the backend forgets its settings when it is pickled

    def encode(self, text: str) -> list[int]:
        """Ids of plain text as SentencePiece gives them, with its dummy prefix and no special ids.

        Surrogates, which broken input can hold, count as the character of a pair, or as U+FFFD.
        """
        if not text.isascii():
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if len(text) > LONG:  # slower for short ones
            return self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return self._backend.encode(text, add_special_tokens=False).ids

    def piece(self, id_: int) -> bytes:
        """Bytes of one id; empty for control, padding, undefined and negative ids."""
        return self._pieces[id_] if 0 <= id_ < len(self._pieces) else b""

    def byte(self, value: int) -> int:
        """Id of the piece that stands for one byte, 0 to 255."""
        return self._backend.token_to_id(f"<0x{value:02X}>")

    def control(self, name: str) -> int:
        """Id of one of CONTROL_TOKENS."""
        return self._control[name]

    def _bytes_of_pieces(self) -> list[bytes]:
        pieces = [b""] * self._backend.get_vocab_size()
        silent = {"<unk>", "<s>", "</s>", *CONTROL_TOKENS}
        for piece, id_ in self._backend.get_vocab().items():
            if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                pieces[id_] = bytes.fromhex(piece[3:5])
            elif piece not in silent:
                pieces[id_] = piece.replace(BLANK, " ").encode()
        return pieces


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load `tokenizer.json` of a converted checkpoint.

    Raises UserError when it is missing, damaged or lacks ChatGLM3's control tokens.
    """
    file = Path(folder) / TOKENIZER_FILE
    if not file.is_file():
        raise UserError(f"{folder} holds no {TOKENIZER_FILE}", "convert the checkpoint first: glm convert SRC DST")
    refuse_lfs_pointer(file)
    return parse_tokenizer(file.read_bytes(), f"{file}")


def parse_tokenizer(text: bytes | str, source: str) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`'s text; `source` names it in errors.

    Raises UserError when it is damaged or lacks ChatGLM3's control tokens.
    """
    try:
        backend = tokenizers.Tokenizer.from_buffer(text.encode() if isinstance(text, str) else text)
    except Exception as error:
        raise UserError(f"{source} cannot be read ({error})", "convert the checkpoint again") from error
    missing = [name for name in (*CONTROL_TOKENS, "</s>", "<unk>") if backend.token_to_id(name) is None]
    if missing:
        raise UserError(
            f"{source} lacks {', '.join(missing)}", "this is no ChatGLM3 vocabulary; convert one with glm convert"
        )
    return Tokenizer(backend)
