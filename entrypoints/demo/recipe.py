"""Training of the demo model: its bundled sample data, and the flags of `glm train` for it."""

import json
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

from entrypoints.chat_format.prompt import PromptFormat
from entrypoints.checkpoint.conversion import convert_to_native
from entrypoints.demo.model import write_demo_model
from entrypoints.errors import UserError
from entrypoints.families import CHATGLM3, Family

SAMPLE_FILES = ("ad_copy.jsonl", "chat.jsonl")
COLUMN_FLAGS = ("--prompt-column", "content", "--response-column", "summary", "--history-column", "history")
TRAINING_FLAGS = (
    *COLUMN_FLAGS, "--overwrite-output-dir", "--max-source-length", "256", "--max-target-length", "128",
    "--per-device-train-batch-size", "16", "--learning-rate", "2e-3", "--lr-scheduler-type", "cosine",
    "--warmup-steps", "20", "--weight-decay", "0.01", "--logging-steps", "50", "--save-steps", "100000",
)  # fmt: skip
SHORT_TRAINING_ADS = 6  # used with all the small talk when the demo model must be ready quickly
SHORT_TRAINING_FLAGS = ("--num-train-epochs", "30", "--per-device-train-batch-size", "8", "--device", "cpu")


def write_sample_data(folder: Path, family: Family = CHATGLM3) -> list[str]:
    """Copy the bundled sample data into `folder`, which is created if needed; returns all texts in it.

    The answer to 你是谁 names the family. Raises UserError: the folder cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {folder} ({error.strerror})", "choose another --output-dir") from error
    texts = []
    for name in SAMPLE_FILES:
        text = resources.files("entrypoints.demo").joinpath(name).read_text(encoding="utf-8")
        text = text.replace(_short_title(CHATGLM3), _short_title(family))
        (folder / name).write_text(text, encoding="utf-8")
        texts += [row[column] for row in map(json.loads, text.splitlines()) for column in ("content", "summary")]
    return texts


def _short_title(family: Family) -> str:
    """Without the number of parameters: ChatGLM3."""
    return family.title.rpartition("-")[0]


def train_demo_model(folder: Path, family: Family = CHATGLM3) -> Path:
    """Train a demo model that answers small talk and some ads, in a fraction of the time of `glm demo`.

    Returns its checkpoint. Raises UserError: training failed.
    """
    texts = write_sample_data(folder, family)
    write_demo_model(folder / "original", texts, family=family)
    convert_to_native(folder / "original", folder / "native", PromptFormat.of(family))
    ads, talk = ((folder / name).read_text(encoding="utf-8").splitlines(keepends=True) for name in SAMPLE_FILES)
    (folder / "train.jsonl").write_text("".join([*talk, *ads[:SHORT_TRAINING_ADS]]), encoding="utf-8")
    arguments = ["--model-name-or-path", folder / "native", "--train-file", folder / "train.jsonl"]
    arguments += ["--output-dir", folder / "tuned", *TRAINING_FLAGS, *SHORT_TRAINING_FLAGS]
    command = [sys.executable, "-m", "entrypoints", "train", *map(str, arguments)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # more threads slow down such a small model
    done = subprocess.run(command, check=False, stdout=subprocess.DEVNULL, env=one_thread)
    if done.returncode:
        raise UserError(f"training the demo model exited with code {done.returncode}", "see its message above")
    return folder / "tuned"
