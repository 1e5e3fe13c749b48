"""DeepSpeed's configuration of a run: a preset of ours, or the user's file made to agree with the flags."""

import json
import logging
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

from entrypoints.checkpoint.files import locked
from entrypoints.errors import UserError
from entrypoints.training.arguments import PRESETS

logger = logging.getLogger(__name__)
BATCH_FIELDS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
GATHER = "stage3_gather_16bit_weights_on_model_save"


def configuration(name: str | None) -> dict | None:
    """The configuration that --deepspeed names; None without one.

    Numbers of a batch become `auto`: the flags decide. ZeRO-3 always gathers the weights it saves, which would be
    empty tensors otherwise. Raises UserError: no such preset or file, no JSON object.
    """
    if name is None:
        return None
    config = _read(name)
    for field in BATCH_FIELDS:
        if config.get(field, "auto") != "auto":
            logger.warning("%s: %s is %s; the flags decide", name, field, config[field])
            config[field] = "auto"
    zero = config.setdefault("zero_optimization", {})
    if zero.get("stage") == 3 and not zero.get(GATHER):
        zero[GATHER] = True
    return config


def stage(config: dict | None) -> int:
    """Of ZeRO: 0 nothing is divided, 1 the optimizer's state, 2 gradients too, 3 weights too."""
    return config["zero_optimization"].get("stage", 0) if config else 0


def offloads(config: dict | None, what: str) -> bool:
    """Does `what`, optimizer or param, lie in the host's memory?"""
    zero = config["zero_optimization"] if config else {}
    return zero.get(f"offload_{what}", {}).get("device", "none") != "none"


def divide_anew(config: dict, checkpoint: Path) -> None:
    """Let a checkpoint of any number of processes be loaded by another number: DeepSpeed's universal form of it.

    The form is made once, beside the checkpoint's own state. Raises UserError when DeepSpeed cannot make it.
    """
    config["checkpoint"] = {**config.get("checkpoint", {}), "load_universal": True}
    tag = (checkpoint / "latest").read_text(encoding="utf-8").strip()
    target = checkpoint / f"{tag}_universal"
    with locked(checkpoint / ".universal.lock"):
        if not target.is_dir():
            logger.info("dividing the state of %s anew", checkpoint)
            partial = checkpoint / ".universal.partial"
            shutil.rmtree(partial, ignore_errors=True)
            words = ["--input_folder", checkpoint / tag, "--output_folder", partial, "--inject_missing_state"]
            words += ["--num_extract_workers", 1, "--num_merge_workers", 1]
            command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *map(str, words)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                raise UserError(
                    f"DeepSpeed cannot divide the state of {checkpoint} anew ({last})",
                    "go on with as many processes as before",
                )
            partial.rename(target)
        (checkpoint / "latest_universal").write_text(target.name, encoding="utf-8")


def _read(name: str) -> dict:
    if name in PRESETS:
        return json.loads(resources.files("entrypoints.training").joinpath(f"presets/{name}.json").read_text())
    file = Path(name)
    if not file.is_file():
        raise UserError(f"--deepspeed {name} is no file and no preset", f"name a file, or one of {', '.join(PRESETS)}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is no JSON ({error})", "mend it, or use a preset") from error
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization", {}), dict):
        raise UserError(f"{file} is no DeepSpeed configuration", "it is a JSON object")
    return config
