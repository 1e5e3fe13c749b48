"""Rows per second of complete runs of `glm train` and of TRL's SFTTrainer, on the same rows with the same model.

glm        what `glm train` runs
trl        SFTTrainer with its defaults: padded to the longest row of a random batch, activations recomputed
trl, kept  the same without recomputing activations, as `glm train` without --gradient-checkpointing

All parameters, and LoRA of rank 8 on queries, keys and values; batches of 4, float32, one thread, CPU seconds from the
first step of a run to its last. Each run is a process of its own; medians are reported. TRL receives the ids and labels
that `glm train` created, so that both train on the same labels, and the settings it cannot detect: CPU and float32.

    pip install trl==1.16.0                next to the training packages; without it only `glm train` is measured
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

from entrypoints.chat_format.prompt import IGNORE_INDEX, PromptFormat
from entrypoints.checkpoint.layout import ModelConfig
from entrypoints.checkpoint.native import save_tokenizer, write_config_files
from entrypoints.checkpoint.tokenizer import Tokenizer
from entrypoints.hardware.resources import retain_freed_memory
from entrypoints.training.arguments import LORA_TARGETS, TrainArguments
from entrypoints.training.preparation import PreparedRun, prepare
from entrypoints.training.run import build_trainer
from entrypoints.training.run_context import open_run

WAYS = ("glm", "trl", "trl, kept")
METHODS = ("full", "lora")


@dataclass(frozen=True)
class Task:
    """Parameters of one process."""

    way: str
    method: str
    model: Path
    file: Path
    output: Path
    rows: int
    batch_size: int


class Clock(TrainerCallback):
    """CPU seconds from before the first step until after the last."""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.begin = time.process_time()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.seconds = time.process_time() - self.begin


def main(argv: list[str] | None = None) -> int:
    """Create the model, run all rounds, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=120, help="rows per run (default: 120)")
    parser.add_argument("--rounds", type=int, default=3, help="runs per way (default: 3)")
    parser.add_argument("--batch-size", type=int, default=4, help="rows per step (default: 4)")
    parser.add_argument("--layers", type=int, default=4, help="layers of the model (default: 4)")
    parser.add_argument(
        "--hidden", type=int, default=256, help="hidden size (default: 256); other sizes in proportion to the 6B"
    )
    parser.add_argument(
        "--toy", action="store_true", help="rows and vocabulary of the demo (2,409 tokens) instead of AdvertiseGen"
    )
    args = parser.parse_args(argv)
    ways = WAYS if importlib.util.find_spec("trl") else WAYS[:1]
    if ways != WAYS:
        print("trl is not installed and not measured: pip install trl==1.16.0")
    file = GOLDEN / "adgen_dev.json"
    toy = args.toy or not file.is_file()
    file = SAMPLE if toy else file
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = _model(folder / "model", args.layers, args.hidden, vocabulary(toy))
        print(
            f"{args.rows} rows of {file.name}, {args.layers} layers of width {args.hidden}, vocabulary {size:,}, "
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
    """Write a checkpoint with random weights; returns its vocabulary size."""
    torch.manual_seed(SEED)
    tokenizer = Tokenizer(words)
    size = -(-tokenizer.size // 256) * 256
    model_config = ModelConfig(layers, hidden, 8, 2, hidden // 8, hidden * 107 // 32, size, 2048, 1e-5, 1)
    config = GlmConfig(**model_config.native_config("float32", tokenizer.stop_ids, tokenizer.pad_id))
    GlmForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder, words)
    write_config_files(folder, model_config, "float32", tokenizer, PromptFormat())
    return size


def _in_a_process(task: Task) -> dict:
    """Run in a new process, so that the peak memory is that of this task."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_run, task).result()


def _run(task: Task) -> dict:
    torch.set_num_threads(1)
    arguments = TrainArguments(
        task.model, task.file, task.output, method=task.method, per_device_train_batch_size=task.batch_size,
        num_train_epochs=1, max_train_samples=task.rows, device="cpu",
    )  # fmt: skip
    prepared = prepare(open_run(arguments, None))
    trainer = build_trainer(prepared) if task.way == "glm" else _trl(task, arguments, prepared)
    clock = Clock()
    trainer.add_callback(clock)
    with retain_freed_memory() if task.way == "glm" else contextlib.nullcontext():  # as glm train does without a GPU
        loss = trainer.train().training_loss
    return {
        "rows/s": len(prepared.dataset) / clock.seconds,
        "labels": sum(label != IGNORE_INDEX for row in prepared.dataset["labels"] for label in row)
        / len(prepared.dataset),
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "loss": loss,
    }


def _trl(task: Task, arguments: TrainArguments, prepared: PreparedRun) -> object:
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    lora = LoraConfig(
        r=arguments.lora_rank, lora_alpha=arguments.lora_alpha, lora_dropout=arguments.lora_dropout,
        target_modules=list(LORA_TARGETS[arguments.lora_target]), task_type="CAUSAL_LM",
    )  # fmt: skip
    settings = SFTConfig(
        str(task.output), per_device_train_batch_size=task.batch_size, num_train_epochs=1,
        learning_rate=arguments.peak_learning_rate,
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
