"""Create a demo model in a family's layout, then convert, fine-tune, evaluate and query it with the real commands.

Needs no network, no GPU and no download; takes a few minutes on two CPU cores. The model has 4 million parameters and
knows only its training sample.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from entrypoints.errors import UserError
from entrypoints.families import CHATGLM3, FAMILIES
from entrypoints.settings import Settings

DEV_ROWS = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `glm demo`."""
    parser.add_argument("--output-dir", type=Path, default=Path("demo"), help="folder for all files of the demo")
    parser.add_argument("--family", choices=FAMILIES, default=CHATGLM3.name, help="model family to imitate")
    parser.add_argument("--num-train-epochs", type=float, default=30, help="passes over the training sample")


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Run the steps; each prints its command first.

    Raises UserError: the folder cannot be created, or a step failed.
    """
    start = time.monotonic()
    folder = args.output_dir
    from entrypoints.demo.model import write_demo_model
    from entrypoints.demo.recipe import COLUMN_FLAGS, TRAINING_FLAGS, write_sample_data

    family = FAMILIES[args.family]
    texts = write_sample_data(folder, family)
    _print_heading(
        f"Create a model in the original layout, with random weights and its own vocabulary: {folder}/original"
    )
    write_demo_model(folder / "original", texts, family=family)
    _print_heading("Convert it to the layout that plain transformers loads")
    _glm("convert", folder / "original", folder / "native", "--overwrite")
    _print_heading("Split and check the sample data: ads in the format of AdvertiseGen, and small talk")
    _glm("data", "split", folder / "ad_copy.jsonl", folder / "ads", "--dev-rows", DEV_ROWS, "--overwrite")
    _concatenate([folder / "ads" / "train.jsonl", folder / "chat.jsonl"], folder / "train.jsonl")
    _glm("data", "check", folder / "train.jsonl", *COLUMN_FLAGS, "--model", folder / "native")
    _print_heading("Fine-tune all parameters")
    _glm("train", "--model-name-or-path", folder / "native", "--train-file", folder / "train.jsonl",
         "--output-dir", folder / "tuned", "--num-train-epochs", args.num_train_epochs, *TRAINING_FLAGS)  # fmt: skip
    _print_heading("Evaluate on training rows and on held-out rows")
    for name in ("train", "dev"):
        _glm("evaluate", "--model", folder / "tuned", "--test-file", folder / "ads" / f"{name}.jsonl",
             "--output-dir", folder / f"scores-{name}", "--per-device-eval-batch-size", 64)  # fmt: skip
    _print_heading("Ask questions")
    rows = (folder / "ads" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:2]
    for prompt in (*(json.loads(row)["content"] for row in rows), "你好", "你是谁"):
        _glm("chat", "--model", folder / "tuned", "--temperature", 0, "--prompt", prompt)
    _print_summary(folder, time.monotonic() - start)


def _concatenate(files: list[Path], target: Path) -> None:
    target.write_text("".join(file.read_text(encoding="utf-8") for file in files), encoding="utf-8")


def _glm(*arguments: str | Path | float) -> None:
    command = [str(argument) for argument in arguments]
    print(f"\n$ glm {' '.join(command)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "entrypoints", *command], check=False).returncode
    if code:
        raise UserError(f"glm {command[0]} exited with code {code}", "see its message above")


def _print_heading(text: str) -> None:
    width = min(100, shutil.get_terminal_size().columns)
    print(f"\n{'─' * width}\n{text}", flush=True)


def _print_summary(folder: Path, seconds: float) -> None:
    scores = {
        name: json.loads((folder / f"scores-{name}" / "predict_results.json").read_text()) for name in ("train", "dev")
    }
    _print_heading(f"Done in {seconds:.0f} seconds. The demo model has memorized its sample and knows nothing else.")
    for name, label in (("train", "training rows"), ("dev", "held-out rows")):
        row = scores[name]
        metrics = "  ".join(f"{key} {row[key]:.1f}" for key in ("bleu_4", "rouge_1", "rouge_2", "rouge_l"))
        print(f"  {label:14} {metrics}  ({row['n']} rows, in percent)")
    print(f"\nChat with it:  glm chat --model {folder}/tuned")
