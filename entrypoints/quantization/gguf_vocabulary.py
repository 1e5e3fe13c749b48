"""The vocabulary in a GGUF file, for llama.cpp's own tokenizer and for the text of a stream."""

import gguf

from entrypoints.checkpoint.gguf_reader import TOKENIZER_KEY
from entrypoints.checkpoint.native import NativeCheckpoint
from entrypoints.checkpoint.tensor_files import read_json
from entrypoints.checkpoint.tokenizer import TOKENIZER_FILE, VOCABULARY_FILE
from entrypoints.errors import UserError

Entry = tuple[str, float, int]  # text, score and type of a token
# llama.cpp's names: of SentencePiece BPE, of byte-level BPE, and of GLM-4's division of a text into words
GGUF_MODELS = {"sentencepiece": "llama", "tiktoken": "gpt2"}
TIKTOKEN_PRE_TOKENIZER = "chatglm-bpe"


def read_vocabulary(checkpoint: NativeCheckpoint) -> list[Entry]:
    """Text, score and type of each token id, one for each row of the embedding.

    Raises UserError: the original vocabulary file is missing or of another model.
    """
    tokenizer, rows = checkpoint.tokenizer, checkpoint.model_config.vocab_size
    read = {"sentencepiece": _sentencepiece_entries, "tiktoken": _tiktoken_entries}[tokenizer.family.vocabulary]
    entries = read(checkpoint)
    entries += [(name, 0.0, gguf.TokenType.CONTROL) for name in tokenizer.family.special_tokens]
    return entries + [(f"[PAD{id_}]", -10000.0, gguf.TokenType.UNUSED) for id_ in range(len(entries), rows)]


def _tiktoken_entries(checkpoint: NativeCheckpoint) -> list[Entry]:
    tokenizer = checkpoint.tokenizer
    names = tokenizer.token_names()[: tokenizer.size - len(tokenizer.family.special_tokens)]
    return [(name, 0.0, gguf.TokenType.NORMAL) for name in names]


def _sentencepiece_entries(checkpoint: NativeCheckpoint) -> list[Entry]:
    import sentencepiece

    file, special = checkpoint.folder / VOCABULARY_FILE, checkpoint.tokenizer.family.special_tokens
    if not file.is_file():
        raise UserError(f"file not found: {file}", "copy it from the original checkpoint")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
    size = pieces.GetPieceSize()
    if size + len(special) != checkpoint.tokenizer.size:
        raise UserError(
            f"{file} has {size} pieces, {TOKENIZER_FILE} has {checkpoint.tokenizer.size - len(special)}",
            "convert the checkpoint again",
        )

    def type_of(id_: int) -> int:
        if pieces.IsByte(id_):
            return gguf.TokenType.BYTE
        if pieces.IsControl(id_):
            return gguf.TokenType.CONTROL
        return gguf.TokenType.UNKNOWN if pieces.IsUnknown(id_) else gguf.TokenType.NORMAL

    return [(pieces.IdToPiece(id_), pieces.GetScore(id_), type_of(id_)) for id_ in range(size)]


def add_vocabulary(writer: gguf.GGUFWriter, checkpoint: NativeCheckpoint, vocabulary: list[Entry]) -> None:
    """Write the vocabulary of `read_vocabulary`, the special ids, the chat template and tokenizer.json."""
    tokenizer = checkpoint.tokenizer
    texts, scores, types = zip(*vocabulary, strict=True)
    writer.add_tokenizer_model(GGUF_MODELS[tokenizer.family.vocabulary])
    writer.add_token_list(texts)
    if tokenizer.family.vocabulary == "sentencepiece":
        writer.add_token_scores(scores)
    else:
        writer.add_tokenizer_pre(TIKTOKEN_PRE_TOKENIZER)
        merges = read_json(checkpoint.folder / TOKENIZER_FILE)["model"]["merges"]
        writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_token_types(types)
    # three keys, because llama.cpp only stops at the ids that these name
    ends = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for add, id_ in zip(ends, tokenizer.stop_ids, strict=False):
        add(id_)
    if tokenizer.family.vocabulary == "sentencepiece":
        writer.add_unk_token_id(tokenizer.pad_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(False)  # the chat template adds [gMASK]<sop>
    writer.add_add_eos_token(False)
    writer.add_chat_template(checkpoint.prompt_format.chat_template())
    writer.add_string(TOKENIZER_KEY, (checkpoint.folder / TOKENIZER_FILE).read_text(encoding="utf-8"))
