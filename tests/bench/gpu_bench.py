"""Speed of the 6B on one GPU: training tokens/s with the share of the card's peak, decoding beside its bandwidth.

    python tests/bench/gpu_bench.py             the shape of ChatGLM3-6B with random weights, made on the GPU
    python tests/bench/gpu_bench.py --small     a tiny model, on a CPU where there is no GPU: does the program run?

training    LoRA, QLoRA and full at 1,024 and 8,192 tokens, batches of 4 and of 1: forward, backward and AdamW as
            `glm train` does them, without reading rows; tokens per second and MFU, the share of the peak that 6 (full)
            or 4 (adapters) floating-point operations for each weight and token are, with the attention's own.
            Activations are recomputed for full and at 8,192 tokens, and where the card is too small otherwise;
            recomputation does not count as work
decoding    1, 8 and 64 answers on the transformers engine's model, greedy; tokens per second beside the limit of the
            bandwidth, at which each step reads all weights and all caches once
first       seconds to the first token of a prompt of 2,048 tokens
start       seconds from an empty process to a model that is ready, without reading it from a disk

Peak and bandwidth are measured on the card first: a large bfloat16 product and a large copy. One table at the end, and
one JSON line for each row. Figures to beat, which other programs published:

- LoRA, 8B, bfloat16, one H100, batches of 4 of 1,024 tokens: 9,621 tokens/s with SDPA, 10,115 with Liger's kernels,
  10,256 with FlashAttention and Liger (TRL's and Liger's documentation); for the 6.24B about 13,200
- one RTX 4090, 8B packed to 2,048: LoRA 3,083 tokens/s, QLoRA 2,413 (torchtune's README)
- vLLM, 8B, one H100, ShareGPT: 13,305 tokens/s in bfloat16, 16,453 in FP8 (vLLM's published benchmarks); not measured
  here: `vllm bench serve` sends the same load to `glm serve --engine vllm`
"""

import argparse
import gc
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests" / "gpu")]
STARTED = time.perf_counter()

from models import SIX_B, TINY, load_trainable, random_batch, random_folder, random_model  # noqa: E402

from entrypoints.checkpoint.layout import ModelConfig  # noqa: E402
from entrypoints.hardware.placement import weight_bytes  # noqa: E402

TRAINING = {  # batch by length
    "lora": {"method": "lora"}, "qlora": {"method": "qlora"}, "full": {"method": "full"},
}  # fmt: skip
Row = dict[str, object]


def main(argv: list[str] | None = None) -> int:
    """Measure everything that fits, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model, also on a CPU")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each training (default: 5)")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.small:
        parser.error("no CUDA device: only --small runs here")
    shape = TINY if args.small else SIX_B
    peak, bandwidth = measure_card(device, args.small)
    print(f"peak {peak / 1e12:.3g} TFLOP/s in bfloat16, bandwidth {bandwidth / 1e9:.4g} GB/s, both measured")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for row in itertools.chain(
            decoding(shape, device, bandwidth, args.small), training(shape, device, peak, args, Path(folder))
        ):
            print(json.dumps(row), flush=True)
            rows.append(row)
    print_table(rows)
    return 0


def measure_card(device: str, small: bool) -> tuple[float, float]:
    """Floating-point operations per second of a product, and bytes per second that a copy reads and writes."""
    size, count = (256, 1 << 20) if small else (8192, 1 << 31)
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    product = seconds_of(lambda: left @ right, device)
    source, target = (torch.empty(count, dtype=torch.uint8, device=device) for _ in range(2))
    copied = seconds_of(lambda: target.copy_(source), device)
    return 2 * size**3 / product, 2 * count / copied


def seconds_of(function: Callable[[], object], device: str, repeats: int = 10) -> float:
    """Median seconds, after warm-up."""
    times = []
    for number in range(repeats + 3):
        synchronize(device)
        begin = time.perf_counter()
        function()
        synchronize(device)
        if number >= 3:
            times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2]


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def training(shape: ModelConfig, device: str, peak: float, args: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """A row for each method and length."""
    base = random_folder(folder, shape, device)
    for name in TRAINING:
        for length, batch in ((32, 2), (64, 1)) if args.small else ((1024, 4), (8192, 1)):
            for recompute in (False, True) if name != "full" and length <= 1024 else (True,):
                row: Row = {"what": f"train {name}", "tokens": length, "batch": batch, "recomputed": recompute}
                try:
                    seconds, gib = _seconds_of_method(name, base, shape, (batch, length), device, args.steps, recompute)
                except (ImportError, torch.OutOfMemoryError) as error:  # no bitsandbytes, or a smaller card
                    row["skipped"] = str(error).splitlines()[0][:120]
                else:
                    speed = batch * length / seconds
                    work = speed * flops_of_token(shape, length, 6 if name == "full" else 4)
                    row |= {"tokens_per_s": round(speed, 1), "share_of_limit": round(work / peak, 4), "gib": gib}
                free_memory(device)
                yield row
                if "skipped" not in row:
                    break


def _seconds_of_method(
    name: str, base: Path, shape: ModelConfig, size: tuple[int, int], device: str, steps: int, recompute: bool
) -> tuple[float, float]:
    """Seconds of a step and its peak memory in GiB; nothing of the model outlives the call."""
    model = load_trainable(base, shape, device, gradient_checkpointing=recompute, **TRAINING[name])
    return _seconds_of_step(model, random_batch(shape, *size, device), device, steps)


def free_memory(device: str) -> None:
    """Return what an error or an earlier model left behind."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _seconds_of_step(model: torch.nn.Module, batch: dict, device: str, steps: int) -> tuple[float, float]:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-5, fused=True)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = seconds_of(step, device, steps)
    return seconds, round(torch.cuda.max_memory_allocated() / (1 << 30), 1) if device == "cuda" else 0.0


def flops_of_token(shape: ModelConfig, length: int, passes: int) -> float:
    """Of one token: `passes` for each weight but the embedding, which is read, and those of causal attention."""
    weights = weight_bytes(shape, 1) - shape.vocab_size * shape.hidden_size
    attention = shape.num_layers * 2 * shape.num_heads * shape.head_dim * length / 2
    return passes * weights + 6 * attention


@torch.inference_mode()
def decoding(shape: ModelConfig, device: str, bandwidth: float, small: bool) -> Iterator[Row]:
    """A row for each number of answers, and those of the first token and of the start."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = random_model(shape, device, dtype)
    model.generation_config.eos_token_id = None  # every answer has its full length
    synchronize(device)
    yield {"what": "start to ready", "s": round(time.perf_counter() - STARTED, 2)}
    prompt, new = (16, 8) if small else (512, 64)
    generate = {"do_sample": False, "pad_token_id": 0}
    for answers in (1, 8, 64):
        row: Row = {"what": "decode", "answers": answers}
        try:
            ids = random_batch(shape, answers, prompt, device)["input_ids"]
            first = seconds_of(lambda ids=ids: model.generate(ids, max_new_tokens=1, **generate), device, 3)
            whole = seconds_of(lambda ids=ids: model.generate(ids, max_new_tokens=1 + new, **generate), device, 3)
        except torch.OutOfMemoryError as error:
            yield {**row, "skipped": str(error).splitlines()[0][:120]}
            continue
        speed = answers * new / (whole - first)
        cache = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * dtype.itemsize * (prompt + new / 2)
        step = weight_bytes(shape, dtype.itemsize) - shape.vocab_size * shape.hidden_size * dtype.itemsize
        limit = answers * bandwidth / (step + answers * cache)
        row |= {"tokens_per_s": round(speed, 1), "limit": round(limit, 1), "share_of_limit": round(speed / limit, 4)}
        yield row
    free_memory(device)
    ids = random_batch(shape, 1, 32 if small else 2048, device)["input_ids"]
    first = seconds_of(lambda: model.generate(ids, max_new_tokens=1, **generate), device, 5)
    yield {"what": "first token", "tokens": ids.shape[1], "s": round(first, 4)}


def print_table(rows: list[Row]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([str(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    print("\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells))


if __name__ == "__main__":
    sys.exit(main())
