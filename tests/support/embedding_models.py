"""Tiny embedding models with random weights: a GGUF file, and the model of transformers that it must equal."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import torch
from torch.nn.functional import normalize
from transformers import BertConfig, BertModel, BertTokenizer, PreTrainedModel, Qwen3Config, Qwen3Model

SIZE, LAYERS, HEADS, FEED_FORWARD, CONTEXT = 64, 2, 4, 128, 96
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
POOLING: dict[str, tuple[gguf.PoolingType, Callable[[torch.Tensor], torch.Tensor]]] = {
    "mean": (gguf.PoolingType.MEAN, lambda states: states.mean(0)),
    "cls": (gguf.PoolingType.CLS, lambda states: states[0]),
    "last": (gguf.PoolingType.LAST, lambda states: states[-1]),
}


@dataclass(frozen=True)
class EmbeddingModel:
    """A GGUF file and its reference."""

    file: Path
    reference: PreTrainedModel
    pooling: str
    tokenizer: BertTokenizer | None = None

    def ids(self, text: str) -> list[int]:
        """Ids of a text with the special tokens around it, by the tokenizer of transformers."""
        assert self.tokenizer is not None
        return self.tokenizer(text)["input_ids"]

    def vector(self, ids: Sequence[int]) -> list[float]:
        """The normalized embedding that transformers computes."""
        with torch.inference_mode():
            states = self.reference(torch.tensor([list(ids)])).last_hidden_state[0]
        return normalize(POOLING[self.pooling][1](states), dim=0).tolist()


def write_bert(file: Path, pieces: Iterable[str], pooling: str = "mean") -> EmbeddingModel:
    """A model like bge or text2vec: WordPiece, each Chinese character a token, attention in both directions."""
    vocabulary = [*SPECIAL, *pieces]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=SIZE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=FEED_FORWARD,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,  # far from the default, so that different texts have different vectors
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    writer = _writer(file, "bert", pooling)
    writer.add_causal_attention(False)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([token if token in SPECIAL else _as_llamacpp(token) for token in vocabulary])
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control if token in SPECIAL else normal for token in vocabulary])
    writer.add_token_type_count(2)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_sep_token_id(3)
    writer.add_mask_token_id(4)
    _write_tensors(writer, gguf.MODEL_ARCH.BERT, model)
    vocabulary_file = file.with_suffix(".txt")
    vocabulary_file.write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    return EmbeddingModel(file, model, pooling, BertTokenizer(str(vocabulary_file)))


def write_qwen3(file: Path, vocab_size: int = 300) -> EmbeddingModel:
    """A model like Qwen3-Embedding: a decoder, whose last state is the embedding. Its tokens are bytes."""
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=SIZE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        head_dim=SIZE // HEADS,
        intermediate_size=FEED_FORWARD,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
    )
    model = Qwen3Model(config).eval()
    writer = _writer(file, "qwen3", "last")
    writer.add_head_count_kv(HEADS // 2)
    writer.add_key_length(SIZE // HEADS)
    writer.add_value_length(SIZE // HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"<{number}>" for number in range(vocab_size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * vocab_size)
    writer.add_token_merges(["< 0"])
    writer.add_eos_token_id(vocab_size - 1)
    _write_tensors(writer, gguf.MODEL_ARCH.QWEN3, model)
    return EmbeddingModel(file, model, "last")


def _as_llamacpp(piece: str) -> str:
    """WordPiece marks what continues a word, llama.cpp what begins one."""
    return piece.removeprefix("##") if piece.startswith("##") else f"▁{piece}"


def _writer(file: Path, architecture: str, pooling: str) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(SIZE)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_pooling_type(POOLING[pooling][0])
    return writer


def _write_tensors(writer: gguf.GGUFWriter, architecture: gguf.MODEL_ARCH, model: PreTrainedModel) -> None:
    names = gguf.get_tensor_name_map(architecture, LAYERS)
    for name, tensor in model.state_dict().items():
        new_name = names.get_name(name, (".weight", ".bias")) or names.get_name(f"model.{name}", (".weight", ".bias"))
        if new_name:  # position ids are no weights
            writer.add_tensor(new_name, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
