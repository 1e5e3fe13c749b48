"""How the demo's toy is taught: its bundled rows laid out as files, and the flags of `glm train` for them."""

import json
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

from entrypoints.checkpoint.conversion import convert_to_native
from entrypoints.demo.model import write_toy
from entrypoints.errors import UserError
from entrypoints.prompt import PromptFormat

SAMPLE = ("ad_copy.jsonl", "chat.jsonl")
COLUMNS = ("--prompt-column", "content", "--response-column", "summary", "--history-column", "history")
TUNING = (
    *COLUMNS, "--overwrite-output-dir", "--max-source-length", "256", "--max-target-length", "128",
    "--per-device-train-batch-size", "16", "--learning-rate", "2e-3", "--lr-scheduler-type", "cosine",
    "--warmup-steps", "20", "--weight-decay", "0.01", "--logging-steps", "50", "--save-steps", "100000",
)  # fmt: skip
QUICK_ADS = 6  # beside all the small talk, for the toy that is to answer soon
QUICK = ("--num-train-epochs", "30", "--per-device-train-batch-size", "8", "--device", "cpu")  # until it recites them


def lay_out_sample(folder: Path) -> list[str]:
    """Copy the bundled rows into `folder`, made if it is not there; returns their texts.

    Raises UserError when the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {folder} ({error.strerror})", "choose another --output-dir") from error
    texts = []
    for name in SAMPLE:
        text = resources.files("entrypoints.demo").joinpath(name).read_text(encoding="utf-8")
        (folder / name).write_text(text, encoding="utf-8")
        texts += [row[column] for row in map(json.loads, text.splitlines()) for column in ("content", "summary")]
    return texts


def make_quickly(folder: Path) -> Path:
    """Make a toy that answers small talk and some ads, in a fraction of the demo's time; returns its checkpoint."""
    texts = lay_out_sample(folder)
    write_toy(folder / "original", texts)
    convert_to_native(folder / "original", folder / "native", PromptFormat())
    ads, talk = ((folder / name).read_text(encoding="utf-8").splitlines(keepends=True) for name in SAMPLE)
    (folder / "train.jsonl").write_text("".join([*talk, *ads[:QUICK_ADS]]), encoding="utf-8")
    words = ["--model-name-or-path", folder / "native", "--train-file", folder / "train.jsonl"]
    words += ["--output-dir", folder / "tuned", *TUNING, *QUICK]
    command = [sys.executable, "-m", "entrypoints", "train", *map(str, words)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # more cost more than they bring with so small a model
    done = subprocess.run(command, check=False, stdout=subprocess.DEVNULL, env=one_thread)
    if done.returncode:
        raise UserError(f"training the demo model ended with code {done.returncode}", "see its message above")
    return folder / "tuned"
