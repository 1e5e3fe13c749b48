"""A SentencePiece `tokenizer.model` as an exactly equal `tokenizers` BPE.

Limitation: only BPE models with byte fallback and the identity normalizer, such as ChatGLM3's.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import tokenizers
from tokenizers import decoders, models, normalizers

from entrypoints.checkpoint.atomic_files import check_not_lfs_pointer
from entrypoints.errors import UserError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

SPACE_MARK = "▁"  # how SentencePiece writes a space
PROBE = " 你好，  ①Ａ１ WORLD é \t\n🙂 "  # exposes a normalizer, or a model other than BPE
CHATGLM3_REMEDY = "use the vocabulary of ChatGLM3"
WITHOUT_TEXT: tuple[str, ...] = ("<unk>", "<s>", "</s>")


def convert(model_file: Path) -> tokenizers.Tokenizer:
    """Build a tokenizer that gives the same ids as the SentencePiece model, without special tokens after its pieces.

    Raises UserError: the file is missing, an LFS pointer, damaged, or not a BPE model with byte fallback and the
    identity normalizer.
    """
    pieces = _load_sentencepiece(model_file)
    size = pieces.GetPieceSize()
    try:
        vocabulary: dict[str, int] = {pieces.IdToPiece(id_): id_ for id_ in range(size)}
    except UnicodeDecodeError as error:
        raise UserError(f"{model_file} has a piece that is not UTF-8", "download the file again") from error
    if not any(pieces.IsByte(id_) for id_ in range(size)):
        raise UserError(f"{model_file} has no byte pieces", CHATGLM3_REMEDY)
    ordinary = [
        id_ for id_ in range(size) if not (pieces.IsByte(id_) or pieces.IsControl(id_) or pieces.IsUnknown(id_))
    ]
    merges = _merges({pieces.IdToPiece(id_): pieces.GetScore(id_) for id_ in ordinary}, vocabulary)
    tokenizer = build(vocabulary, merges, pieces.IdToPiece(pieces.unk_id()))
    probe = PROBE + "".join(pieces.IdToPiece(id_) for id_ in ordinary).replace(SPACE_MARK, " ")
    if tokenizer.encode(probe).ids != pieces.EncodeAsIds(probe):
        raise UserError(f"{model_file} is not a BPE model without normalization", CHATGLM3_REMEDY)
    return tokenizer


def build(vocabulary: dict[str, int], merges: list[tuple[str, str]], unknown: str = "<unk>") -> tokenizers.Tokenizer:
    """The steps of encoding and decoding that are the same for every vocabulary."""
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE_MARK), normalizers.Replace(" ", SPACE_MARK)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def token_bytes(token: str) -> bytes:
    """The bytes of a piece; a byte piece has one."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    return token.replace(SPACE_MARK, " ").encode()


def byte_token(value: int) -> str:
    """The byte piece of one byte, 0 to 255."""
    return f"<0x{value:02X}>"


def _load_sentencepiece(model_file: Path) -> "SentencePieceProcessor":
    if not model_file.is_file():
        raise UserError(f"file not found: {model_file}", "copy tokenizer.model of the checkpoint there")
    check_not_lfs_pointer(model_file)
    import sentencepiece  # imported late: not installed in images that only run converted models

    pieces = sentencepiece.SentencePieceProcessor()
    try:
        pieces.Load(str(model_file))
    except (RuntimeError, OSError, UnicodeDecodeError) as error:  # the last for an error message with a damaged piece
        raise UserError(
            f"{model_file} is not a SentencePiece vocabulary ({error})", "download the file again"
        ) from error
    return pieces


def _merges(scores: dict[str, float], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every split of a piece into two pieces, best-scored piece first: the order in which SentencePiece merges."""
    found = []
    for piece, score in scores.items():
        splits = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        found += [(-score, vocabulary[a], vocabulary[b], a, b) for a, b in splits if a in scores and b in scores]
    return [(a, b) for *_, a, b in sorted(found)]
