"""Rows a second of `glm train` and of TRL's SFTTrainer, both whole, on the same rows with the same model.

glm        what `glm train` runs
trl        SFTTrainer as it comes: padded to the longest of a random batch, activations computed anew in the way back
trl, kept  the same without computing activations anew, as `glm train` without --gradient-checkpointing

All weights, and a LoRA of rank 8 on queries, keys and values; batches of 4, float32, one thread, seconds of the
processor from a run's first step to its last. Each run is a process of its own; told are medians. TRL takes the ids and
labels that `glm train` made, so that both learn the same, and is given what it cannot choose here: the CPU and float32.

    pip install trl==1.16.0                beside the train packages; without it glm's rows are all there is
    python tests/bench/trl_bench.py        ten minutes on one core
"""

import argparse
import contextlib
import importlib.util
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from train_bench import GOLDEN, SAMPLE, SEED, vocabulary
from transformers import GlmConfig, GlmForCausalLM, PrinterCallback, TrainerCallback

from entrypoints.checkpoint.layout import Shape
from entrypoints.checkpoint.native import save_tokenizer, write_settings
from entrypoints.checkpoint.tokenizer import Tokenizer
from entrypoints.engines.machine import freed_memory_kept
from entrypoints.prompt import IGNORED, PromptFormat
from entrypoints.training import trainer as glm
from entrypoints.training.arguments import LORA_TARGETS, TrainArguments
from entrypoints.training.preparation import Prepared, prepare

WAYS = ("glm", "trl", "trl, kept")
METHODS = ("full", "lora")


@dataclass(frozen=True)
class Task:
    """What a process needs to know."""

    way: str
    method: str
    model: Path
    file: Path
    output: Path
    rows: int
    batch_size: int


class Clock(TrainerCallback):
    """Seconds of the processor from before the first step until after the last."""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.begin = time.process_time()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.seconds = time.process_time() - self.begin


def main(argv: list[str] | None = None) -> int:
    """Make the model, run the rounds, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=120, help="rows of a run (default: 120)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each way (default: 3)")
    parser.add_argument("--batch-size", type=int, default=4, help="rows of a step (default: 4)")
    parser.add_argument("--layers", type=int, default=4, help="default: 4")
    parser.add_argument("--hidden", type=int, default=256, help="width; the rest has the 6B's proportions")
    parser.add_argument(
        "--toy", action="store_true", help="the demo's rows and vocabulary of 2,409 in place of ADGEN's"
    )
    args = parser.parse_args(argv)
    ways = WAYS if importlib.util.find_spec("trl") else WAYS[:1]
    if ways != WAYS:
        print("trl is not installed: its rows are left out (pip install trl==1.16.0)")
    file = GOLDEN / "adgen_dev.json"
    toy = args.toy or not file.is_file()
    file = SAMPLE if toy else file
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = _model(folder / "model", args.layers, args.hidden, vocabulary(toy))
        print(
            f"{args.rows} rows of {file.name}, {args.layers} layers of {args.hidden}, vocabulary {size:,}, "
            f"batches of {args.batch_size}"
        )
        found = {}
        for round_ in range(args.rounds):
            for method in METHODS:
                for way in ways:
                    output = folder / f"{method}-{way}-{round_}"
                    task = Task(way, method, folder / "model", file, output, args.rows, args.batch_size)
                    found.setdefault((method, way), []).append(_in_a_process(task))
    _report(found)
    return 0


def _model(folder: Path, layers: int, hidden: int, words: tokenizers.Tokenizer) -> int:
    """A checkpoint of random weights; returns the rows of its embedding."""
    torch.manual_seed(SEED)
    tokenizer = Tokenizer(words)
    size = -(-tokenizer.size // 256) * 256
    shape = Shape(layers, hidden, 8, 2, hidden // 8, hidden * 107 // 32, size, 2048, 1e-5, 1)
    config = GlmConfig(**shape.native_config("float32", tokenizer.stop_ids, tokenizer.pad_id))
    GlmForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder, words)
    write_settings(folder, shape, "float32", tokenizer, PromptFormat())
    return size


def _in_a_process(task: Task) -> dict:
    """Its peak memory is then its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_run, task).result()


def _run(task: Task) -> dict:
    torch.set_num_threads(1)
    arguments = TrainArguments(
        task.model, task.file, task.output, method=task.method, per_device_train_batch_size=task.batch_size,
        num_train_epochs=1, max_train_samples=task.rows, device="cpu",
    )  # fmt: skip
    prepared = prepare(arguments)
    trainer = glm.made(arguments, prepared) if task.way == "glm" else _trl(task, arguments, prepared)
    clock = Clock()
    trainer.add_callback(clock)
    with freed_memory_kept() if task.way == "glm" else contextlib.nullcontext():  # as glm train does without a GPU
        loss = trainer.train().training_loss
    return {
        "rows/s": len(prepared.dataset) / clock.seconds,
        "labels": sum(label != IGNORED for row in prepared.dataset["labels"] for label in row) / len(prepared.dataset),
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "loss": loss,
    }


def _trl(task: Task, arguments: TrainArguments, prepared: Prepared) -> object:
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    lora = LoraConfig(
        r=arguments.lora_rank, lora_alpha=arguments.lora_alpha, lora_dropout=arguments.lora_dropout,
        target_modules=list(LORA_TARGETS[arguments.lora_target]), task_type="CAUSAL_LM",
    )  # fmt: skip
    settings = SFTConfig(
        str(task.output), per_device_train_batch_size=task.batch_size, num_train_epochs=1, learning_rate=arguments.rate,
        use_cpu=True, bf16=False, disable_tqdm=True,
        **({"gradient_checkpointing": False} if task.way == "trl, kept" else {}),
    )  # fmt: skip
    trainer = SFTTrainer(
        str(task.model), settings, train_dataset=prepared.dataset.select_columns(["input_ids", "labels"]),
        peft_config=lora if task.method == "lora" else None,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def _report(found: dict[tuple[str, str], list[dict]]) -> None:
    print(f"{'':6} {'':10} {'rows/s':>8} {'labels/s':>9} {'peak GB':>8} {'loss':>7}  rows/s of the rounds")
    for (method, way), rounds in found.items():
        speed = statistics.median(each["rows/s"] for each in rounds)
        memory = max(each["memory"] for each in rounds) / 1e9
        each = ", ".join(f"{one['rows/s']:.2f}" for one in rounds)
        print(
            f"{method:6} {way:10} {speed:8.2f} {speed * rounds[0]['labels']:9.0f} {memory:8.2f} "
            f"{rounds[0]['loss']:7.4f}  {each}"
        )


if __name__ == "__main__":
    sys.exit(main())
