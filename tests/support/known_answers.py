"""A model with weights made by hand: it gives known answers to known questions, whatever else the prompt contains.

Its one layer only marks whether a keyword occurs in the context: attention finds the keyword's token. The output layer
maps each token of an answer to the next one; where several answers begin at the same token, the marks decide. Real
engines load it like any other checkpoint, so a client meets real answers, calls and results.
"""

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
from transformers import GlmConfig, GlmForCausalLM

from entrypoints.chat_format.prompt import PromptFormat
from entrypoints.checkpoint import native
from entrypoints.checkpoint.layout import ModelConfig
from entrypoints.checkpoint.tokenizer import VOCABULARY_FILE, Tokenizer, convert_vocabulary
from entrypoints.families import CHATGLM3

PIECES = 1015
MODEL_CONFIG = ModelConfig(
    num_layers=1,
    hidden_size=256,
    num_heads=8,
    num_kv_heads=2,
    head_dim=32,
    intermediate_size=64,
    vocab_size=PIECES + len(CHATGLM3.special_tokens),
    context_length=16384,
    rms_norm_eps=1e-5,
    rope_ratio=1,
)
ASCII = "".join(map(chr, range(32, 127))) + "\n"
ATTENTION = 40.0  # score of a keyword's token; that of all others is 0
UNROTATED = MODEL_CONFIG.head_dim // 2  # the first dimension of a head that positions do not rotate
FOLLOWS = 20.0  # logit of the next token of an answer; marks add less


@dataclass(frozen=True)
class Branch:
    """`text` follows the last token of `after` if its score is the highest of all branches there.

    The score is `base` plus the weight of each keyword that occurs in the context.
    """

    after: str
    text: str
    base: float = 0
    keywords: tuple[tuple[str, float], ...] = ()
    end: str = "</s>"


def write_model(folder: Path, branches: Sequence[Branch]) -> None:
    """Write a converted checkpoint. Each keyword is one token; answers have about four characters a token.

    Raises AssertionError if a token has two successors: the answers must have different tokens.
    """
    folder.mkdir(parents=True)
    keywords = sorted({word for branch in branches for word, _ in branch.keywords})
    assert len(keywords) <= MODEL_CONFIG.num_heads
    parts = [
        text[start : start + 4] for text in (branch.text for branch in branches) for start in range(0, len(text), 4)
    ]
    _write_vocabulary(
        folder / VOCABULARY_FILE, [text for text in (*keywords, *parts) if text not in CHATGLM3.special_tokens]
    )
    backend = convert_vocabulary(folder / VOCABULARY_FILE)
    tokenizer = Tokenizer(backend)
    native.save_tokenizer(folder, backend)
    native.write_config_files(folder, MODEL_CONFIG, "float32", tokenizer, PromptFormat())
    native.save_tensors(_Weights(tokenizer, keywords).of(branches), folder / "model.safetensors")


class _Weights:
    """Hidden dimensions: the marks, the keywords, then one for each token that an answer continues from."""

    def __init__(self, tokenizer: Tokenizer, keywords: Sequence[str]) -> None:
        config = MODEL_CONFIG.native_config("float32", tokenizer.stop_ids, tokenizer.pad_id)
        self._model = GlmForCausalLM(GlmConfig(**config))
        self._tokenizer = tokenizer
        self._keywords = list(keywords)
        self._dimensions: dict[int, int] = {}  # of ids that something follows
        self._weights = {name: torch.zeros_like(tensor) for name, tensor in self._model.state_dict().items()}
        for name, tensor in self._weights.items():
            if name.endswith("norm.weight"):
                tensor.fill_(1)

    def of(self, branches: Sequence[Branch]) -> dict[str, torch.Tensor]:
        """All tensors."""
        output = self._weights["lm_head.weight"]
        for branch in branches:
            text = self._ids(branch.text) if branch.after in CHATGLM3.special_tokens else self._continued(branch.text)
            start, *path = self._ids(branch.after)[-1:] + text + self._ids(branch.end)
            output[path[0], self._dimension(start)] = FOLLOWS + branch.base
            for word, weight in branch.keywords:
                output[path[0], self._keywords.index(word)] = weight
            for id_, following in itertools.pairwise(path):
                known = output[:, self._dimension(id_)].nonzero().flatten().tolist()
                assert known in ([], [following]), f"two tokens follow {self._tokenizer.token_bytes(id_)}"
                output[following, self._dimension(id_)] = FOLLOWS
        self._set_embedding()
        self._set_attention()
        return self._weights

    def _ids(self, text: str) -> list[int]:
        if text in CHATGLM3.special_tokens:
            return [self._tokenizer.special_token_id(text)]
        if text == "</s>":
            return [self._tokenizer.eos_id]
        head, newline, body = text.partition("\n```python")  # a header and a body are encoded separately
        ids = self._tokenizer.encode(head + newline[:1]) + (
            self._tokenizer.encode("```python" + body) if newline else []
        )
        assert len(set(ids)) == len(ids), f"a token occurs twice in {text!r}"
        return ids

    def _continued(self, text: str) -> list[int]:
        """Ids of a text inside a line; at its start the vocabulary would add a blank."""
        before = self._tokenizer.encode("\n")
        ids = self._tokenizer.encode(f"\n{text}")
        assert ids[: len(before)] == before
        return ids[len(before) :]

    def _dimension(self, id_: int) -> int:
        return self._dimensions.setdefault(id_, 2 * len(self._keywords) + len(self._dimensions))

    def _set_embedding(self) -> None:
        embedding = self._weights["model.embed_tokens.weight"]
        assert 2 * len(self._keywords) + len(self._dimensions) < MODEL_CONFIG.hidden_size
        for id_ in range(MODEL_CONFIG.vocab_size):
            embedding[id_, self._dimensions.get(id_, MODEL_CONFIG.hidden_size - 1)] = 1
            for number, word in enumerate(self._keywords):
                if self._contains(id_, word):
                    embedding[id_, len(self._keywords) + number] = 1

    def _contains(self, id_: int, word: str) -> bool:
        if word in CHATGLM3.special_tokens:
            return id_ == self._tokenizer.special_token_id(word)
        return word.encode() in self._tokenizer.token_bytes(id_)

    def _set_attention(self) -> None:
        """Head n looks for keyword n, from every position alike, and writes mark n."""
        attention = "model.layers.0.self_attn."
        size, marks = MODEL_CONFIG.head_dim, len(self._keywords)
        norm = (MODEL_CONFIG.hidden_size / 2) ** 0.5  # of each dimension of a keyword's token, after RMSNorm
        for number in range(marks):
            self._weights[attention + "q_proj.bias"][number * size + UNROTATED + number] = size**0.5
            for head in range(MODEL_CONFIG.num_kv_heads):
                keyword = marks + number
                self._weights[attention + "k_proj.weight"][head * size + UNROTATED + number, keyword] = ATTENTION / norm
                self._weights[attention + "v_proj.weight"][head * size + number, keyword] = 1 / norm
            self._weights[attention + "o_proj.weight"][number, number * size + number] = 1


def _write_vocabulary(file: Path, texts: Sequence[str]) -> None:
    """A BPE vocabulary in which each text is one piece, with a blank before it and without."""
    others = [chr(0x4E00 + number) for number in range(60)]
    lines = [f"{other}{text}" for text in texts for other in others] + list(texts) * 20 + [ASCII]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=PIECES,
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_by_unicode_script=False,
        split_by_number=False,
        split_by_whitespace=False,
        max_sentencepiece_length=64,
        minloglevel=2,
    )
    file.write_bytes(model.getvalue())
