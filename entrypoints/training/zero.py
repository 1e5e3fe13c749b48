"""DeepSpeed's configuration of a run: a preset of ours, or the user's file made to agree with the flags."""

import importlib.util
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from entrypoints.checkpoint.files import locked
from entrypoints.errors import UserError
from entrypoints.training.arguments import PRESETS, TrainArguments

logger = logging.getLogger(__name__)
GATHER = "stage3_gather_16bit_weights_on_model_save"
# What the Trainer compares with its own arguments, after the model is loaded. The flags decide on these: the field of
# TrainArguments, or None where steps or processes count too.
FLAGS = {
    "train_batch_size": None,
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "optimizer.params.lr": "rate",
    "optimizer.params.weight_decay": "weight_decay",
    "scheduler.params.warmup_max_lr": "rate",
    "scheduler.params.warmup_num_steps": None,
    "scheduler.params.total_num_steps": None,
}
# The same, where the Trainer has a number and no flag sets it.
FIXED = {"gradient_clipping": 1.0, "optimizer.params.betas": [0.9, 0.999], "optimizer.params.eps": 1e-8}
PRECISIONS = ("fp16", "bf16")
SECTIONS = (
    "zero_optimization", "zero_optimization.offload_optimizer", "zero_optimization.offload_param", "optimizer",
    "optimizer.params", "scheduler", "scheduler.params", *PRECISIONS,
)  # fmt: skip


def configuration(
    name: str | None, arguments: TrainArguments | None = None, precision: Mapping[str, bool] | None = None
) -> dict | None:
    """The configuration that --deepspeed names, with every field that the flags decide left to them; None without one.

    arguments: the run's. precision: whether it computes in fp16 or bf16; None: as far as the flags alone say it.
    ZeRO-3 always gathers the weights it saves, which would be empty tensors otherwise. Raises UserError: no such
    preset or file, no configuration, another precision than the run's, no package deepspeed.
    """
    if name is None:
        return None
    if importlib.util.find_spec("deepspeed") is None:
        remedy = "pip install 'glm-entrypoints[deepspeed]', or use the image train-cuda"
        raise UserError("--deepspeed needs the package deepspeed", remedy)
    config = read(name)
    if arguments:
        _refuse_other_precision(name, config, _by_flags(arguments) if precision is None else precision)
    if "scheduler" in config:
        logger.warning("%s: its scheduler decides the course of the learning rate, not --lr-scheduler-type", name)
    _leave_to_flags(name, config, arguments)
    zero = config["zero_optimization"]
    if zero.get("stage") == 3 and not zero.get(GATHER):
        zero[GATHER] = True
    return config


def read(name: str | None) -> dict | None:
    """The configuration as it is written, with a section that is null left out; None without a name.

    Raises UserError: no such preset or file, no configuration.
    """
    if name is None:
        return None
    config = _json(name)
    for section in SECTIONS:
        node, key = _node(config, section)
        if node.get(key, {}) is None:
            del node[key]
        if not isinstance(node.get(key, {}), dict):
            raise UserError(f"{name} is no DeepSpeed configuration: {section} is {node[key]!r}", "it is a JSON object")
    config.setdefault("zero_optimization", {})
    return config


def stage(config: dict | None) -> int:
    """Of ZeRO: 0 nothing is divided, 1 the optimizer's state, 2 gradients too, 3 weights too."""
    return config["zero_optimization"].get("stage", 0) if config else 0


def offloads(config: dict | None, what: str) -> bool:
    """Does `what`, optimizer or param, lie in the host's memory?"""
    zero = config["zero_optimization"] if config else {}
    return (zero.get(f"offload_{what}", {}).get("device") or "none") != "none"


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


def _leave_to_flags(name: str, config: dict, arguments: TrainArguments | None) -> None:
    """Make each field `auto` that the Trainer would compare, with a warning where that changes it."""
    told = {field: getattr(arguments, flag) for field, flag in FLAGS.items() if flag} if arguments else {}
    for field in (*FLAGS, *FIXED):
        node, key = _node(config, field)
        written = node.get(key)
        if written is None:
            continue
        node[key] = "auto"
        if written not in ("auto", (told | FIXED).get(field)):
            decides = f"here it is {FIXED[field]}" if field in FIXED else "the flags decide"
            logger.warning("%s: %s is %s; %s", name, field, written, decides)


def _refuse_other_precision(name: str, config: dict, precision: Mapping[str, bool | None]) -> None:
    """To train in another precision than the file says, or than the flags say, would go unseen."""
    for kind in PRECISIONS:
        if kind not in config:
            continue
        written = config[kind].setdefault("enabled", "auto")
        if written == "auto" or precision[kind] is None or bool(written) == precision[kind]:
            continue
        mended = f'write "{kind}": {{"enabled": "auto"}} in the file'
        if written:
            raise UserError(f"{name} has {kind} on, the run does not compute in it", f"add --{kind}, or {mended}")
        leave = "leave out --fp16" if kind == "fp16" else "add --no-bf16"
        raise UserError(f"{name} has {kind} off, the run computes in it", f"{leave}, or {mended}")


def _by_flags(arguments: TrainArguments) -> dict[str, bool | None]:
    """None: the hardware decides."""
    return {"fp16": arguments.fp16, "bf16": False if arguments.fp16 else arguments.bf16}


def _node(config: dict, field: str) -> tuple[dict, str]:
    """The section that a field with dots is in, an empty one where there is none, and its name there."""
    *sections, key = field.split(".")
    for section in sections:
        config = config.get(section, {})
    return config, key


def _json(name: str) -> dict:
    if name in PRESETS:
        return json.loads(resources.files("entrypoints.training").joinpath(f"presets/{name}.json").read_text())
    file = Path(name)
    if not file.is_file():
        raise UserError(f"--deepspeed {name} is no file and no preset", f"name a file, or one of {', '.join(PRESETS)}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is no JSON ({error})", "mend it, or use a preset") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} is no DeepSpeed configuration", "it is a JSON object")
    return config
