"""Models of the parts: the converted demo model, and random ones of a given shape."""

import json
from importlib import resources
from pathlib import Path

import torch
from transformers import GlmConfig, GlmForCausalLM

from entrypoints.chat_format.prompt import IGNORE_INDEX, PromptFormat
from entrypoints.checkpoint.conversion import convert_to_native
from entrypoints.checkpoint.layout import ModelConfig
from entrypoints.demo.model import write_demo_model
from entrypoints.training.arguments import TrainArguments
from entrypoints.training.methods import trainable_model

SIX_B = ModelConfig(28, 4096, 32, 2, 128, 13696, 65024, 8192, 1e-5, 1)
TWO_LAYERS = ModelConfig(2, 4096, 32, 2, 128, 13696, 65024, 8192, 1e-5, 1)  # of the 6B
TINY = ModelConfig(2, 64, 4, 2, 16, 128, 512, 1024, 1e-5, 1)


def demo_rows() -> list[dict[str, str]]:
    """The bundled ad copy."""
    text = resources.files("entrypoints.demo").joinpath("ad_copy.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def demo_model(folder: Path) -> Path:
    """The untrained demo model in the native layout, with its tokenizer."""
    rows = demo_rows()
    write_demo_model(folder / "original", [row[column] for row in rows for column in ("content", "summary")])
    convert_to_native(folder / "original", folder / "native", PromptFormat())
    return folder / "native"


def random_model(shape: ModelConfig, device: str, dtype: torch.dtype) -> GlmForCausalLM:
    """Random weights, made on the device."""
    torch.manual_seed(0)
    config = GlmConfig(**shape.native_config("bfloat16", (2,), 0))
    config._attn_implementation = "sdpa"
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return GlmForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)


def random_folder(folder: Path, shape: ModelConfig, device: str) -> Path:
    """A native folder of random weights in bfloat16, without a tokenizer."""
    random_model(shape, device, torch.bfloat16).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(shape.native_config("bfloat16", (2,), 0)), encoding="utf-8")
    return folder


def load_trainable(folder: Path, shape: ModelConfig, device: str, **fields: object) -> torch.nn.Module:
    """The model of a method, as `glm train` loads it; on a CPU in float32."""
    arguments = TrainArguments(folder, folder / "rows", folder / "out", **fields)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    target = torch.device("cuda:0") if device == "cuda" else None
    model = trainable_model.load(arguments, shape, dtype, False, target).to(device if target is None else target)
    if arguments.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model.train()


def random_batch(shape: ModelConfig, rows: int, length: int, device: str) -> dict[str, torch.Tensor]:
    """Rows of random ids whose second half has labels."""
    ids = torch.randint(3, shape.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, : length // 2] = IGNORE_INDEX
    return {"input_ids": ids.to(device), "labels": labels.to(device)}


def packed_batch(shape: ModelConfig, lengths: list[int], device: str) -> dict[str, object]:
    """Rows of these lengths as one sequence, as the collator makes it."""
    batch = random_batch(shape, 1, sum(lengths), "cpu")
    starts = [0]
    for length in lengths:
        batch["labels"][0, starts[-1]] = IGNORE_INDEX  # the first token of a row has no label
        starts.append(starts[-1] + length)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    moved = {name: tensor.to(device) for name, tensor in batch.items()}
    row_starts = torch.tensor(starts, dtype=torch.int32, device=device)
    return {**moved, "position_ids": positions.to(device), "row_lengths": lengths, "row_starts": row_starts}
