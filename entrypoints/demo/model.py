"""A toy in ChatGLM3's original layout: the same architecture and file formats, a small vocabulary, random weights."""

import io
import json
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
import torch

from entrypoints.checkpoint.layout import ROTARY, Shape, tensors

PIECES = 2400  # of the vocabulary: 256 bytes, the sample's characters, and their most frequent pairs
CONTROL = 9  # ids of the control tokens, after the last piece
SHAPE = Shape(
    layers=4,
    hidden=256,
    heads=8,
    groups=2,
    head_dim=32,
    ffn=512,
    vocabulary=-(-(PIECES + CONTROL) // 64) * 64,  # padded, as the real one is
    window=1024,
    norm_eps=1e-5,
    rope_ratio=1,
)
FILES = 2  # the weights come in shards, as the real ones do


def write_toy(folder: Path, texts: Iterable[str], seed: int = 0) -> None:
    """Write tokenizer.model (learnt from `texts`), config.json and fp16 pytorch_model-*.bin into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_vocabulary(folder / "tokenizer.model", texts)
    (folder / "config.json").write_text(json.dumps(SHAPE.original_config("float16"), indent=2) + "\n", encoding="utf-8")
    weights = _random_weights(seed)
    names = list(weights)
    weight_map = {}
    for number in range(FILES):
        name = f"pytorch_model-{number + 1:05}-of-{FILES:05}.bin"
        part = names[number * len(names) // FILES : (number + 1) * len(names) // FILES]
        torch.save({key: weights[key] for key in part}, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in weights.values())}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_vocabulary(file: Path, texts: Iterable[str]) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=PIECES,
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    file.write_bytes(model.getvalue())


def _random_weights(seed: int) -> dict[str, torch.Tensor]:
    """Norms at one, biases at zero, everything else normal with a deviation of 0.02; fp16."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for entry in tensors(SHAPE):
        if entry.original.endswith("bias"):
            weights[entry.original] = torch.zeros(entry.shape)
        elif entry.columns:
            weights[entry.original] = torch.randn(entry.shape, generator=generator) * 0.02
        else:
            weights[entry.original] = torch.ones(entry.shape)
    half = SHAPE.head_dim // 2
    weights[ROTARY] = 1 / 10000 ** (torch.arange(0, half, 2) / half)
    return {name: tensor.half() for name, tensor in weights.items()}
