"""Make a toy model in ChatGLM3's layout, then convert, fine-tune, score and ask it, each with the job a user would run.

No network, no GPU, no download; a few minutes on two cores. The toy has 4 million parameters and knows its sample.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from entrypoints.errors import UserError
from entrypoints.settings import Settings

DEV_ROWS = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `glm demo`."""
    parser.add_argument("--output-dir", type=Path, default=Path("demo"), help="folder for everything the demo makes")
    parser.add_argument("--num-train-epochs", type=float, default=30, help="passes over the sample")


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Each step prints its command first; a step that fails ends the demo."""
    start = time.monotonic()
    folder = args.output_dir
    from entrypoints.demo.model import write_toy
    from entrypoints.demo.recipe import COLUMNS, TUNING, lay_out_sample

    texts = lay_out_sample(folder)
    _say(f"A toy model in the original layout, with random weights and its own vocabulary: {folder}/original")
    write_toy(folder / "original", texts)
    _say("The original layout becomes one that plain transformers loads")
    _glm("convert", folder / "original", folder / "native", "--overwrite")
    _say("The sample: ad copy in AdvertiseGen's form, and small talk")
    _glm("data", "split", folder / "ad_copy.jsonl", folder / "ads", "--dev-rows", DEV_ROWS, "--overwrite")
    _join([folder / "ads" / "train.jsonl", folder / "chat.jsonl"], folder / "train.jsonl")
    _glm("data", "check", folder / "train.jsonl", *COLUMNS, "--model", folder / "native")
    _say("Full-parameter fine-tuning")
    _glm("train", "--model-name-or-path", folder / "native", "--train-file", folder / "train.jsonl",
         "--output-dir", folder / "tuned", "--num-train-epochs", args.num_train_epochs, *TUNING)  # fmt: skip
    _say("Scores on the rows it learnt, and on rows it never saw")
    for name in ("train", "dev"):
        _glm("evaluate", "--model", folder / "tuned", "--test-file", folder / "ads" / f"{name}.jsonl",
             "--output-dir", folder / f"scores-{name}", "--per-device-eval-batch-size", 64)  # fmt: skip
    _say("Questions and answers")
    learnt = (folder / "ads" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:2]
    for prompt in (*(json.loads(row)["content"] for row in learnt), "你好", "你是谁"):
        _glm("chat", "--model", folder / "tuned", "--temperature", 0, "--prompt", prompt)
    _summary(folder, time.monotonic() - start)


def _join(files: list[Path], target: Path) -> None:
    target.write_text("".join(file.read_text(encoding="utf-8") for file in files), encoding="utf-8")


def _glm(*words: object) -> None:
    command = [str(word) for word in words]
    print(f"\n$ glm {' '.join(command)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "entrypoints", *command], check=False).returncode
    if code:
        raise UserError(f"glm {command[0]} ended with code {code}", "see its message above")


def _say(text: str) -> None:
    width = min(100, shutil.get_terminal_size().columns)
    print(f"\n{'─' * width}\n{text}", flush=True)


def _summary(folder: Path, seconds: float) -> None:
    scores = {
        name: json.loads((folder / f"scores-{name}" / "predict_results.json").read_text()) for name in ("train", "dev")
    }
    _say(f"Done in {seconds:.0f} seconds. This is a toy: it recites its sample and knows nothing else.")
    for name, label in (("train", "rows it learnt"), ("dev", "rows it never saw")):
        row = scores[name]
        numbers = "  ".join(f"{key} {row[key]:.1f}" for key in ("bleu_4", "rouge_1", "rouge_2", "rouge_l"))
        print(f"  {label:18} {numbers}  ({row['n']} rows, percent)")
    print(f"\nTalk to it:  glm chat --model {folder}/tuned")
