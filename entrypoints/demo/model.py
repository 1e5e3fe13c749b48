"""The demo model in the original layout of a family: same architecture and files, small vocabulary, random weights."""

import io
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
import torch
from tokenizers import trainers

from entrypoints.checkpoint import tiktoken_vocabulary
from entrypoints.checkpoint.layout import ROTARY_BUFFER, ModelConfig, tensor_mappings
from entrypoints.checkpoint.original_config import original_config
from entrypoints.families import CHATGLM3, Family
from entrypoints.file_writing import write_json

VOCABULARY_TOKENS = 2400  # 256 bytes, the characters of the sample and their most frequent pairs
MODEL_CONFIG = ModelConfig(
    num_layers=4,
    hidden_size=256,
    num_heads=8,
    num_kv_heads=2,
    head_dim=32,
    intermediate_size=512,
    vocab_size=-(-(VOCABULARY_TOKENS + len(CHATGLM3.special_tokens)) // 64) * 64,  # padded, as in the 6B
    context_length=1024,
    rms_norm_eps=1e-5,
    rope_ratio=1,
)
NUM_SHARDS = 2  # weights are sharded, as in the 6B


def write_demo_model(folder: Path, texts: Iterable[str], seed: int = 0, family: Family = CHATGLM3) -> None:
    """Write tokenizer.model (trained on `texts`), config.json and float16 pytorch_model-*.bin to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write = _write_sentencepiece if family.vocabulary == "sentencepiece" else _write_ranks
    write(folder / "tokenizer.model", texts)
    write_json(folder / "config.json", original_config(MODEL_CONFIG, "float16", family))
    weights = _random_weights(seed)
    names = list(weights)
    weight_map: dict[str, str] = {}
    for number in range(NUM_SHARDS):
        name = f"pytorch_model-{number + 1:05}-of-{NUM_SHARDS:05}.bin"
        part = names[number * len(names) // NUM_SHARDS : (number + 1) * len(names) // NUM_SHARDS]
        torch.save({key: weights[key] for key in part}, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in weights.values())}, "weight_map": weight_map}
    write_json(folder / "pytorch_model.bin.index.json", index)


def _write_sentencepiece(file: Path, texts: Iterable[str]) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY_TOKENS,
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    file.write_bytes(model.getvalue())


def _write_ranks(file: Path, texts: Iterable[str]) -> None:
    tokenizer = tiktoken_vocabulary.build({}, [])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_TOKENS,
        initial_alphabet=[tiktoken_vocabulary.byte_token(value) for value in range(256)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    names = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    ranks = (tiktoken_vocabulary.token_bytes(name) for name, _ in names)
    file.write_bytes(tiktoken_vocabulary.ranks_file(ranks))


def _random_weights(seed: int) -> dict[str, torch.Tensor]:
    """Norms are 1, biases 0, all other weights normal with standard deviation 0.02; float16."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for entry in tensor_mappings(MODEL_CONFIG):
        if entry.original.endswith("bias"):
            weights[entry.original] = torch.zeros(entry.shape)
        elif entry.columns:
            weights[entry.original] = torch.randn(entry.shape, generator=generator) * 0.02
        else:
            weights[entry.original] = torch.ones(entry.shape)
    half = MODEL_CONFIG.head_dim // 2
    weights[ROTARY_BUFFER] = 1 / 10000 ** (torch.arange(0, half, 2) / half)
    return {name: tensor.half() for name, tensor in weights.items()}
