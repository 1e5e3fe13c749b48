"""Rows per second and peak memory of five ways to train the same model on the same rows with the same optimizer.

tutorial   rows in random order, each padded to max_source_length + max_target_length + 1 = 1025 tokens (ChatGLM2's
           ptuning/main.py); every row costs the same, so a few of them suffice
kept       the same, with freed memory retained for the next step, as glm train does without a GPU
plain      rows in random order, padded to the longest of a batch, as a plain Trainer script does
ours       glm train: rows grouped by length, logits computed only before labels, freed memory retained
packing    glm train --packing: whole rows concatenated to 1025 tokens; a step has as many tokens as the packs contain

Each round of each way runs in its own process: random weights from one seed, one warm-up step, then its rows through
forward, backward and AdamW in float32. One thread and CPU seconds, which other load on the machine affects little.
Medians are reported, and the largest difference between the mean losses per label before the first step.
"batches" are the medians for forward and backward only: AdamW takes the same time for a short batch as for a long one,
and with gradient accumulation it runs once for many batches.

    python tests/bench/train_bench.py                                 a small model with ChatGLM3's vocabulary
    python tests/bench/train_bench.py --vocabulary 2560 --hidden 512  about the share of the vocabulary in the 6B
"""

import argparse
import contextlib
import multiprocessing
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import datasets
import tokenizers
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from transformers import GlmConfig, GlmForCausalLM  # noqa: E402

from entrypoints.chat_format.prompt import IGNORE_INDEX, PromptFormat  # noqa: E402
from entrypoints.checkpoint.layout import ModelConfig  # noqa: E402
from entrypoints.checkpoint.tokenizer import Tokenizer, convert_vocabulary  # noqa: E402
from entrypoints.dataset.columns import Columns  # noqa: E402
from entrypoints.dataset.reader import examples, read_rows  # noqa: E402
from entrypoints.demo.model import write_demo_model  # noqa: E402
from entrypoints.hardware.resources import retain_freed_memory  # noqa: E402
from entrypoints.training.methods.loss import GlmForFineTuning  # noqa: E402
from entrypoints.training.rows.collation import Collator, LengthGroupedSampler, RowEncoder  # noqa: E402
from entrypoints.training.rows.packing import pack_rows  # noqa: E402

GOLDEN = Path(os.environ.get("GOLDEN_DIR", REPOSITORY.parent / "shared" / "golden"))
SAMPLE = REPOSITORY / "entrypoints" / "demo" / "ad_copy.jsonl"
SOURCE, TARGET = 512, 512  # tokens, the defaults of glm train
PADDED = SOURCE + TARGET + 1
SEED = 42
COMPARED_ROWS = 8  # whose loss is compared


@dataclass(frozen=True)
class Task:
    """Parameters of one process."""

    way: str
    rows: list[dict]
    batch_size: int
    model_config: ModelConfig


def main(argv: list[str] | None = None) -> int:
    """Encode the rows once, run all rounds, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=120, help="rows per round (default: 120)")
    parser.add_argument("--tutorial-rows", type=int, default=8, help="rows per round of the tutorial (default: 8)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds per way (default: 3)")
    parser.add_argument("--batch-size", type=int, default=4, help="rows per step (default: 4, as in the tutorial)")
    parser.add_argument("--layers", type=int, default=4, help="layers of the model (default: 4)")
    parser.add_argument(
        "--hidden", type=int, default=256, help="hidden size (default: 256); other sizes in proportion to the 6B"
    )
    parser.add_argument("--vocabulary", type=int, help="size of the vocabulary (default: that of the 6B)")
    args = parser.parse_args(argv)
    file = GOLDEN / "adgen_dev.json"
    file = file if file.is_file() else SAMPLE
    tokenizer = Tokenizer(vocabulary())
    size = args.vocabulary or -(-tokenizer.size // 256) * 256  # 65,024 of the original
    rows = _encoded(file, tokenizer, args.rows, size)
    model_config = ModelConfig(
        args.layers, args.hidden, 8, 2, args.hidden // 8, args.hidden * 107 // 32, size, 2048, 1e-5, 1
    )
    lengths = [row["length"] for row in rows]
    print(
        f"{len(rows)} rows of {file.name}, {statistics.mean(lengths):.1f} tokens on average, {max(lengths)} at most; "
        f"{args.layers} layers of width {args.hidden}, vocabulary {size:,}, batches of {args.batch_size}"
    )
    few = rows[: args.tutorial_rows]
    shares = {"tutorial": few, "kept": few, "plain": rows, "ours": rows, "packing": rows}
    found = {way: [] for way in shares}
    for _ in range(args.rounds):
        for way, part in shares.items():
            found[way].append(_in_a_process(Task(way, part, args.batch_size, model_config)))
    _report(found)
    return 0


def _in_a_process(task: Task) -> dict:
    """Run in a new process, so that the peak memory is that of this task."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_round, task).result()


def _round(task: Task) -> dict:
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    kind = GlmForFineTuning if task.way in ("ours", "packing") else GlmForCausalLM
    model = kind(GlmConfig(**task.model_config.native_config("float32", (0,), 0)))
    loss = _mean_loss(model, list(_batches(task.way, task.rows[:COMPARED_ROWS], task.batch_size)))
    batches = list(_batches(task.way, task.rows, task.batch_size))
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4, fused=True)  # the default of the Trainer
    as_usual = task.way in ("tutorial", "plain")
    with contextlib.nullcontext() if as_usual else retain_freed_memory():
        _steps(model, optimizer, batches[:1])
        begin = time.process_time()
        of_batches = _steps(model, optimizer, batches)
    return {
        "seconds": time.process_time() - begin,
        "seconds_of_batches": of_batches,
        "rows": len(task.rows),
        "ids": sum(batch["input_ids"].numel() for batch in batches),
        "labels": sum((batch["labels"] != IGNORE_INDEX).sum().item() for batch in batches),
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "loss": loss,
    }


def _steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: list[dict]) -> float:
    """Train, and return the seconds of forward and backward alone."""
    seconds = 0.0
    for batch in batches:
        begin = time.process_time()
        model(**batch, use_cache=False).loss.backward()
        seconds += time.process_time() - begin
        optimizer.step()
        optimizer.zero_grad()
    return seconds


@torch.inference_mode()
def _mean_loss(model: torch.nn.Module, batches: list[dict]) -> float:
    model.eval()
    labels = sum((batch["labels"] != IGNORE_INDEX).sum() for batch in batches)
    return sum(model(**batch, use_cache=False, num_items_in_batch=labels).loss.item() for batch in batches)


def _batches(way: str, rows: list[dict], size: int) -> Iterator[dict]:
    collate = Collator(0)
    if way == "packing":
        packs = pack_rows(datasets.Dataset.from_list(rows), PADDED)
        for pack in packs:
            yield collate([pack])
        return
    if way == "ours":
        order = list(LengthGroupedSampler([row["length"] for row in rows], size, SEED))
    else:
        order = random.Random(SEED).sample(range(len(rows)), len(rows))
    for start in range(0, len(rows), size):
        batch = [rows[number] for number in order[start : start + size]]
        yield _padded(batch) if way in ("tutorial", "kept") else collate(batch)


def _padded(batch: list[dict]) -> dict:
    """As main.py prepares rows: without attention mask."""

    def full(name: str, filler: int) -> torch.Tensor:
        return torch.tensor([row[name] + [filler] * (PADDED - row["length"]) for row in batch])

    return {"input_ids": full("input_ids", 0), "labels": full("labels", IGNORE_INDEX)}


def _report(found: dict[str, list[dict]]) -> None:
    print(
        f"{'':10} {'tokens/row':>10} {'rows/s':>8} {'labels/s':>9} {'peak GB':>8} {'times':>6} {'batches':>8}"
        "  rows/s of the rounds"
    )
    speeds = {way: [one["rows"] / one["seconds"] for one in rounds] for way, rounds in found.items()}
    alone = {way: [one["rows"] / one["seconds_of_batches"] for one in rounds] for way, rounds in found.items()}
    slowest, slowest_alone = (statistics.median(ways["tutorial"]) for ways in (speeds, alone))
    for way, rounds in found.items():
        one, speed = rounds[0], statistics.median(speeds[way])
        memory = max(each["memory"] for each in rounds) / 1e9
        each = ", ".join(f"{value:.2f}" for value in speeds[way])
        print(
            f"{way:10} {one['ids'] / one['rows']:10.1f} {speed:8.2f} {speed * one['labels'] / one['rows']:9.0f} "
            f"{memory:8.2f} {speed / slowest:6.1f} {statistics.median(alone[way]) / slowest_alone:8.1f}  {each}"
        )
    losses = [rounds[0]["loss"] for rounds in found.values()]
    print(f"mean loss per label: {losses[0]:.4f}, largest difference {max(losses) - min(losses):.1e}")


def _encoded(file: Path, tokenizer: Tokenizer, count: int, vocabulary: int) -> list[dict]:
    encoder = RowEncoder(tokenizer, PromptFormat(), SOURCE, TARGET)
    used, _ = examples(read_rows(file)[:count], Columns())
    rows = [encoder({"prompt": row.prompt, "response": row.response, "history": row.history}) for row in used]
    return [
        {
            "input_ids": [id_ % vocabulary for id_ in row["input_ids"]],
            "labels": [label if label == IGNORE_INDEX else label % vocabulary for label in row["labels"]],
            "length": row["length"],
        }
        for row in rows
    ]


def vocabulary(toy: bool = False) -> tokenizers.Tokenizer:
    """ChatGLM3's vocabulary, or that of the demo model if it is missing or `toy` is set."""
    original = GOLDEN / "original-tiny" / "tokenizer.model"
    if original.is_file() and not toy:
        return convert_vocabulary(original)
    with tempfile.TemporaryDirectory() as folder:
        write_demo_model(Path(folder), SAMPLE.read_text(encoding="utf-8").splitlines())
        return convert_vocabulary(Path(folder, "tokenizer.model"))


if __name__ == "__main__":
    sys.exit(main())
