"""What must hold on a CUDA device. Each part returns what it measured, and fails by an assertion.

A part takes the device, a folder of its own, and whether to be small: the tests run the same parts on CPUs that way.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from models import (
    SIX_B,
    TINY,
    TWO_LAYERS,
    demo_model,
    demo_rows,
    load_trainable,
    packed_batch,
    random_batch,
    random_folder,
    random_model,
)

from entrypoints.checkpoint.adapter_config import CONFIG_FILE
from entrypoints.checkpoint.adapters import PREFIX_FILE
from entrypoints.checkpoint.layout import ModelConfig
from entrypoints.errors import UserError
from entrypoints.training.arguments import TrainArguments
from entrypoints.training.methods import attention
from entrypoints.training.methods.loss import linear_cross_entropy

GIB = 1 << 30
Found = dict[str, Any]
METHODS = {
    "full": {}, "freeze": {"method": "freeze", "freeze_layers": 1}, "lora": {"method": "lora"},
    "ptuning": {"method": "ptuning", "pre_seq_len": 16},
}  # fmt: skip
QUANTIZED = {
    "qlora": {"method": "qlora"}, "lora-8": {"method": "lora", "quantization_bit": 8},
    "ptuning-4": {"method": "ptuning", "quantization_bit": 4, "pre_seq_len": 16},
}  # fmt: skip


class Skipped(Exception):
    """The part cannot run here, for the reason given."""


def need(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise Skipped(f"needs {', '.join(missing)}")


def need_gpus(device: str, count: int) -> None:
    """Skip on a CPU and on a machine with fewer GPUs."""
    found = torch.cuda.device_count() if device == "cuda" else 0
    if found < count:
        raise Skipped(f"needs {count} GPU{'s' if count > 1 else ''}, this machine has {found}")


def need_field(kind: type, field: str) -> None:
    """Skip where transformers is older than that of the lock, whose classes have this field."""
    if field not in kind.__dataclass_fields__:
        raise Skipped(f"needs the transformers version of the lock ({kind.__name__} has no {field})")


def numbers(device: str, folder: Path, small: bool) -> Found:
    """In float32 the device has the losses and greedy ids of the CPU."""
    model = random_model(TINY, "cpu", torch.float32)
    batch = random_batch(TINY, 2, 64, "cpu")

    def compute(kind: str) -> tuple[float, list[int]]:
        moved, inputs = model.to(kind), {name: tensor.to(kind) for name, tensor in batch.items()}
        with torch.inference_mode():
            ids = moved.generate(inputs["input_ids"][:1, :16], max_new_tokens=24, do_sample=False)
            return moved(**inputs).loss.item(), ids[0].tolist()

    loss, ids = compute("cpu")
    other, others = compute(device)
    assert abs(other - loss) < 1e-4 * loss, (other, loss)
    assert others == ids
    return {"loss": loss, "difference": abs(other - loss), "ids": len(ids)}


def half(device: str, folder: Path, small: bool) -> Found:
    """In bfloat16 and float16 loss and gradients are finite, and near those of float32."""
    shape = TINY if small else TWO_LAYERS
    batch, found = random_batch(shape, 2, 128, device), {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = random_model(shape, device, torch.float32)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = model(**batch).loss
        (loss * 1024).backward()  # as the loss scale of float16
        assert all(weight.grad.isfinite().all() for weight in model.parameters())
        found[str(dtype).removeprefix("torch.")] = loss.item()
        del model
    assert max(found.values()) - min(found.values()) < 0.01 * found["float32"], found
    return found


def packed(device: str, folder: Path, small: bool) -> Found:
    """Packed rows of 8,192 tokens together have the loss and gradients of each row alone."""
    need("peft")
    shape = TINY if small else TWO_LAYERS
    lengths = [40, 1, 17, 70] if small else [1000, 24, 3000, 1, 67, 2050, 1950, 100]
    model = load_trainable(random_folder(folder, shape, device), shape, device, method="lora", lora_dropout=0.0)
    batch = packed_batch(shape, lengths, device)
    states = torch.empty(1, device=device, dtype=torch.bfloat16)
    assert attention.has_flash_kernel(states) == (device == "cuda" and torch.cuda.get_device_capability() >= (8, 0))

    def gradients(batches: list[dict]) -> tuple[float, torch.Tensor]:
        model.zero_grad()
        total = 0.0
        for one in batches:
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = model(**one, num_items_in_batch=sum(lengths)).loss
            loss.backward()
            total += loss.item()
        return total, torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.requires_grad])

    alone = []
    for number, length in enumerate(lengths):
        start = sum(lengths[:number])
        alone.append({name: batch[name][:, start : start + length] for name in ("input_ids", "labels")})
    begin = time.perf_counter()
    together, gradient = gradients([batch])
    seconds = time.perf_counter() - begin
    separate, expected = gradients(alone)
    distance = ((gradient - expected).norm() / expected.norm()).item()
    assert abs(together - separate) < 5e-3 * separate, (together, separate)
    assert distance < (0.05 if device == "cuda" else 1e-3), distance
    return {"tokens": sum(lengths), "loss": together, "gradient_difference": distance, "seconds": seconds}


def loss(device: str, folder: Path, small: bool) -> Found:
    """The label loss against torch's, and Liger's where it is installed: value, gradient, peak memory and time."""
    positions, width, vocabulary = (50, 16, 512) if small else (4096, 4096, 65024)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(positions, width, generator=generator).to(device, dtype)
    weight = (torch.randn(vocabulary, width, generator=generator) / width**0.5).to(device, dtype)
    labels = torch.randint(vocabulary, (positions,), generator=generator).to(device)

    def of_torch(states: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy((states @ weight.T).float(), labels, reduction="sum")

    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "torch": of_torch,
        "ours": lambda states: linear_cross_entropy(states, weight, labels),
    }
    if importlib.util.find_spec("liger_kernel") and device == "cuda":
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        ways["liger"] = lambda states: liger(weight, states, labels)
    found: Found = {}
    results = {}
    for name, way in ways.items():
        for _ in range(2):  # the first one loads kernels
            states = hidden.clone().requires_grad_()
            begin, peak = time.perf_counter(), start_peak(device)
            value = way(states)
            value.backward()
            total = value.item()
            found[name] = {"ms": 1e3 * (time.perf_counter() - begin), "gib": peak()}
        results[name] = total, states.grad.float()
    for name in set(ways) - {"torch"}:
        assert abs(results[name][0] - results["torch"][0]) < 1e-3 * results["torch"][0], name
        distance = (results[name][1] - results["torch"][1]).norm() / results["torch"][1].norm()
        assert distance < 2e-2, (name, distance)
    return found


def start_peak(device: str) -> Callable[[], float]:
    """Begin to measure; the result returns the GiB that were allocated at most since then, without those before."""
    if device != "cuda":
        return lambda: 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    return lambda: (torch.cuda.max_memory_allocated() - before) / GIB


def methods(device: str, folder: Path, small: bool) -> Found:
    """Every method takes three steps, its loss falls, within the memory that the preflight counts."""
    need("peft")
    return _three_steps(METHODS, device, folder, small)


def quantized(device: str, folder: Path, small: bool) -> Found:
    """The same with a base model in 8 and 4 bits."""
    need("bitsandbytes", "peft")
    return _three_steps(QUANTIZED, device, folder, small)


def _three_steps(runs: dict[str, dict], device: str, folder: Path, small: bool) -> Found:
    from entrypoints.training.preflight.memory_estimate import CUDA_CONTEXT_BYTES, MemoryPlan

    shape, rows, length = (TINY, 2, 32) if small else (TWO_LAYERS, 4, 512)
    base, found = random_folder(folder, shape, device), {}
    for name, fields in runs.items():
        peak = start_peak(device)
        model = load_trainable(base, shape, device, **fields)
        losses = train_steps(model, random_batch(shape, rows, length, device), device)
        measured = peak()
        arguments = TrainArguments(base, base / "rows", base / "out", per_device_train_batch_size=rows, **fields)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        estimate = MemoryPlan(arguments, shape, dtype, length + arguments.prefix_length).estimate()
        counted = (estimate.gpu - CUDA_CONTEXT_BYTES) / GIB
        found[name] = {"losses": losses, "peak_gib": round(measured, 2), "preflight_gib": round(counted, 2)}
        assert all(map(math.isfinite, losses)), (name, losses)
        assert losses[-1] < losses[0] or "ptuning" in name, (name, losses)  # the dropout of a prefix is larger
        assert measured < 1.1 * counted + 0.1, (name, measured, counted)
        del model
        if device == "cuda":
            torch.cuda.empty_cache()
    return found


def train_steps(model: torch.nn.Module, batch: dict, device: str, steps: int = 3) -> list[float]:
    """Optimizer steps on one batch, as `glm train` takes them."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, fused=True)
    losses = []
    for _ in range(steps):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            found = model(**batch).loss
        found.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(found.item())
    return losses


def zero2(device: str, folder: Path, small: bool) -> Found:
    """One process under DeepSpeed, with NCCL on CUDA: ZeRO-2, then resumed."""
    return _deepspeed("zero2", device, folder)


def zero3(device: str, folder: Path, small: bool) -> Found:
    """The same with ZeRO-3 and its weights and optimizer in host memory."""
    return _deepspeed("zero3-offload", device, folder)


def _deepspeed(preset: str, device: str, folder: Path, *flags: str) -> Found:
    need("deepspeed", "datasets")
    return _run_twice(device, folder, ["--deepspeed", preset, *flags])


def zero2_ranks(device: str, folder: Path, small: bool) -> Found:
    """Two processes on two GPUs under ZeRO-2, then resumed."""
    need_gpus(device, 2)
    return _deepspeed("zero2", device, folder, "--num-gpus", "2")


def zero3_ranks(device: str, folder: Path, small: bool) -> Found:
    """The same with ZeRO-3, which divides the weights over the GPUs."""
    need_gpus(device, 2)
    return _deepspeed("zero3", device, folder, "--num-gpus", "2")


def resume(device: str, folder: Path, small: bool) -> Found:
    """A run of `glm train` that stops at step 2 and is resumed ends as the one that was not stopped."""
    need("datasets")
    return _run_twice(device, folder, ["--method", "lora", "--no-bf16"])


def _run_twice(device: str, folder: Path, flags: list[str]) -> Found:
    from transformers import TrainingArguments

    need_field(TrainingArguments, "activation_checkpointing")
    base, rows = demo_model(folder), folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in demo_rows()[:32]), encoding="utf-8")
    common = ["--model-name-or-path", base, "--train-file", rows, "--device", device, "--logging-steps", 1]
    common += ["--save-steps", 2, "--lr-scheduler-type", "constant", *flags]
    losses = {}
    for name, steps in (("whole", [4]), ("resumed", [2, 4])):
        for last in steps:
            output = ["--output-dir", folder / name, "--max-steps", last, "--resume", "auto"]
            command = [sys.executable, "-m", "entrypoints", "train", *common, *output]
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=dict(os.environ))
            assert done.returncode == 0, done.stderr[-3000:]
        history = json.loads((folder / name / "trainer_state.json").read_text())["log_history"]
        losses[name] = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses["whole"]) == len(losses["resumed"]) == 4
    largest = max(abs(a - b) for a, b in zip(losses["whole"], losses["resumed"], strict=True))
    assert largest < 1e-2, losses
    return {"losses": losses["whole"], "largest_difference": largest}


def batching(device: str, folder: Path, small: bool) -> Found:
    """Answers generated together are those generated alone, at 4, 16 and 64 slots; tokens per second of each."""
    from transformers import ContinuousBatchingConfig

    from entrypoints.chat_format.prompt import Message
    from entrypoints.chat_format.sampling import Sampling
    from entrypoints.engines.options import EngineOptions
    from entrypoints.engines.transformers.engine import TransformersEngine

    need_field(ContinuousBatchingConfig, "page_size")
    base, found, new = demo_model(folder), {}, 8 if small else 64
    sampling = Sampling(temperature=0.0, max_new_tokens=new)
    for slots in (4,) if small else (4, 16, 64):
        engine = TransformersEngine.load(base, EngineOptions(device=device, dtype="float32", slots=slots))
        texts = [row["content"] for row in demo_rows()[:slots]]
        prompts = [engine.prompt_format.encode([Message("user", text)], engine.tokenizer) for text in texts]

        def answer(prompt: list[int], engine: TransformersEngine = engine) -> list[int]:
            return [int(token) for token in engine.generate(prompt, sampling)]

        begin = time.perf_counter()
        with ThreadPoolExecutor(slots) as pool:
            together = list(pool.map(answer, prompts))
        seconds = time.perf_counter() - begin
        alone = [answer(prompt) for prompt in prompts[:4]]
        engine.close()
        assert together[:4] == alone
        found[f"{slots} slots"] = {"tokens_per_second": round(sum(map(len, together)) / seconds, 1)}
    return found


def refusal(device: str, folder: Path, small: bool) -> Found:
    """A model that the free memory cannot hold is refused before it is loaded, with both sizes."""
    from entrypoints.hardware import placement

    free = torch.cuda.mem_get_info()[0] if device == "cuda" else 0
    layers = 28 * (1 + 2 * free // 12_000_000_000)  # twice what is free
    large = ModelConfig(layers * 4, *list(vars(SIX_B).values())[1:])
    try:
        placement.choose_placement(large, device)
    except UserError as error:
        return {"message": str(error)}
    raise AssertionError("a model larger than the memory was accepted")


def slots(device: str, folder: Path, small: bool) -> Found:
    """300 slots of 128k tokens are refused before anything is loaded, with a number that is accepted."""
    from entrypoints.engines.transformers.continuous_batching import check_batching_memory
    from entrypoints.hardware.placement import Placement

    need_gpus(device, 1)
    placement = Placement({"": "cuda:0"}, torch.float16)
    try:
        check_batching_memory(replace(SIX_B, context_length=131072), 300, placement)
    except UserError as error:
        fitting = int(error.remedy.split("--slots ")[1].split(",")[0])
        assert 1 <= fitting < 300
        check_batching_memory(TINY, 300, placement)
        return {"message": str(error), "fitting": fitting}
    raise AssertionError("300 slots of 128k tokens were accepted")


def split(device: str, folder: Path, small: bool) -> Found:
    """A model divided over two GPUs, alone and with a P-Tuning prefix, has the answers of the whole one."""
    need_gpus(device, 2)
    return split_over(("cuda:0", "cuda:1"), folder)


def split_over(devices: tuple[str, str], folder: Path) -> Found:
    """The same for two devices."""
    from safetensors.torch import save_file

    from entrypoints.checkpoint.adapters import open_adapter
    from entrypoints.engines.transformers.model import add_adapter, load_model
    from entrypoints.hardware.placement import Placement, layer_device_map

    base, prefix, found = random_folder(folder / "base", TINY, devices[0]), folder / "prefix", {}
    prefix.mkdir()
    shape = (2 * TINY.num_layers, TINY.num_kv_heads, 5, TINY.head_dim)
    save_file({"prefix": torch.randn(shape, generator=torch.Generator().manual_seed(3))}, prefix / PREFIX_FILE)
    (prefix / CONFIG_FILE).write_text(json.dumps({"adapter_type": "ptuning-v2", "pre_seq_len": 5}))
    divided = {name: devices[int(place[-1])] for name, place in layer_device_map(TINY, 2).items()}
    ids = random_batch(TINY, 1, 40, devices[0])["input_ids"]
    for kind in ("alone", "prefix"):
        answers = []
        for places in ({"": devices[0]}, divided):
            model = load_model(base, Placement(places, torch.float32), None).eval()
            if kind == "prefix":
                model = add_adapter(model, open_adapter(prefix, TINY)).eval()
            with torch.no_grad():
                answers.append(model.generate(ids, max_new_tokens=24, do_sample=False)[0].tolist())
        assert answers[0] == answers[1], kind
        found[kind] = answers[0][-24:]
    assert found["alone"] != found["prefix"], "the prefix changes the answer"
    return found


SEVERAL_GPUS = ("split", "zero2-ranks", "zero3-ranks")
PARTS: dict[str, tuple[Callable[[str, Path, bool], Found], int]] = {  # with the seconds that each may take
    "numbers": (numbers, 40), "half": (half, 40), "packed": (packed, 60), "loss": (loss, 40), "methods": (methods, 90),
    "quantized": (quantized, 60), "resume": (resume, 90), "zero2": (zero2, 120), "zero3": (zero3, 120),
    "batching": (batching, 60), "refusal": (refusal, 20), "slots": (slots, 20), "split": (split, 60),
    "zero2-ranks": (zero2_ranks, 120), "zero3-ranks": (zero3_ranks, 120),
}  # fmt: skip
