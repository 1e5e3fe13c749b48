"""The DeepSpeed configuration of a run: a bundled preset, or the user's file made consistent with the flags."""

import codecs
import importlib.util
import logging
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from entrypoints.checkpoint.atomic_files import exclusive_lock
from entrypoints.errors import UserError
from entrypoints.training.arguments import PRESETS, TrainArguments
from entrypoints.training.output_files import read_deepspeed_tag
from entrypoints.untrusted import parse_json

logger = logging.getLogger(__name__)
Config = dict[str, Any]
GATHER = "stage3_gather_16bit_weights_on_model_save"
# What the Trainer compares with its own arguments after the model is loaded. The flags determine these: the attribute
# of TrainArguments, or None where the number of steps or processes matters as well.
FLAGS = {
    "train_batch_size": None,
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "optimizer.params.lr": "peak_learning_rate",
    "optimizer.params.weight_decay": "weight_decay",
    "scheduler.params.warmup_max_lr": "peak_learning_rate",
    "scheduler.params.warmup_num_steps": None,
    "scheduler.params.total_num_steps": None,
}
# The same for values of the Trainer that no flag sets.
FIXED = {"gradient_clipping": 1.0, "optimizer.params.betas": [0.9, 0.999], "optimizer.params.eps": 1e-8}
PRECISIONS = ("fp16", "bf16")
UNIVERSAL_CHECKPOINT = "entrypoints.training.checkpoints.universal_checkpoint"  # a program of its own
SECTIONS = (
    "zero_optimization", "zero_optimization.offload_optimizer", "zero_optimization.offload_param", "optimizer",
    "optimizer.params", "scheduler", "scheduler.params", *PRECISIONS,
)  # fmt: skip


def load_config(arguments: TrainArguments) -> Config | None:
    """The configuration that --deepspeed names, with `auto` in every field that flags determine; None without one.

    ZeRO-3 always gathers the weights it saves: they would be empty tensors otherwise. Raises UserError: unknown preset
    or file, not a configuration, another precision than the flags request, package deepspeed not installed.
    """
    name = arguments.deepspeed
    if name is None:
        return None
    if importlib.util.find_spec("deepspeed") is None:
        remedy = "pip install 'glm-entrypoints[deepspeed]', or use the image train-cuda"
        raise UserError("--deepspeed needs the package deepspeed", remedy)
    config = read_config(name)
    check_precision(name, config, requested_precision(arguments))
    if "scheduler" in config:
        logger.warning("%s: its scheduler determines the learning rate, not --lr-scheduler-type", name)
    _set_auto(name, config, arguments)
    zero = config["zero_optimization"]
    if zero_stage(config) == 3 and arguments.quantized_bits:
        raise UserError(
            f"--deepspeed {name}: ZeRO-3 cannot partition a base model in {arguments.quantized_bits} bits",
            "use --deepspeed zero2, or --method lora without --quantization-bit",
        )
    if zero.get("stage") == 3 and not zero.get(GATHER):
        zero[GATHER] = True
    return config


def read_config(name: str) -> Config:
    """The configuration of a preset or file as it is written; sections that are null are removed.

    Raises UserError: unknown preset or file, not a configuration.
    """
    config = _read_json(name)
    for section in SECTIONS:
        node, key = _find_node(config, section)
        if node.get(key, {}) is None:
            del node[key]
        if not isinstance(node.get(key, {}), dict):
            raise UserError(
                f"{name} is not a DeepSpeed configuration: {section} is {node[key]!r}", "write a JSON object there"
            )
    config.setdefault("zero_optimization", {})
    return config


def zero_stage(config: Config | None) -> int:
    """0: nothing is partitioned, 1: optimizer states, 2: gradients as well, 3: weights as well."""
    return int(config["zero_optimization"].get("stage", 0)) if config else 0


def is_offloaded(config: Config | None, part: str) -> bool:
    """Whether `part`, which is optimizer or param, is held in host memory."""
    zero = config["zero_optimization"] if config else {}
    return (zero.get(f"offload_{part}", {}).get("device") or "none") != "none"


def requested_precision(arguments: TrainArguments) -> dict[str, bool | None]:
    """fp16 and bf16 as the flags request them; None: the hardware decides."""
    return {"fp16": arguments.fp16, "bf16": False if arguments.fp16 else arguments.bf16}


def check_precision(name: str, config: Config, precision: Mapping[str, bool | None]) -> None:
    """Raise UserError where the file enables another precision than the run uses; None: not known yet.

    A section without `enabled` gets `auto`: DeepSpeed takes a missing value for false and would train in float32.
    """
    for kind in PRECISIONS:
        if kind not in config:
            continue
        enabled, used = config[kind].setdefault("enabled", "auto"), precision[kind]
        if enabled == "auto" or used is None or bool(enabled) == used:
            continue
        file_fix = f'set "{kind}": {{"enabled": "auto"}} in the file'
        if enabled:
            raise UserError(f"{name} enables {kind}, but the run does not use it", f"add --{kind}, or {file_fix}")
        flag_fix = "omit --fp16" if kind == "fp16" else "add --no-bf16"
        raise UserError(f"{name} disables {kind}, but the run uses it", f"{flag_fix}, or {file_fix}")


def convert_to_universal(config: Config, checkpoint: Path) -> None:
    """Let the checkpoint be loaded by another number of processes: DeepSpeed's universal checkpoint format.

    The converted state is written once, next to the original one. Raises UserError when DeepSpeed cannot convert it.
    """
    config["checkpoint"] = {**config.get("checkpoint", {}), "load_universal": True}
    tag = read_deepspeed_tag(checkpoint)
    if tag is None:
        raise UserError(f"{checkpoint} was saved without DeepSpeed", "resume with as many processes as before")
    target = checkpoint / f"{tag}_universal"
    with exclusive_lock(checkpoint / ".universal.lock"):
        if not target.is_dir():
            logger.info("converting the state of %s for another number of processes", checkpoint)
            partial = checkpoint / ".universal.partial"
            shutil.rmtree(partial, ignore_errors=True)
            options = ["--input_folder", checkpoint / tag, "--output_folder", partial, "--inject_missing_state"]
            options += ["--num_extract_workers", 1, "--num_merge_workers", 1]
            command = [
                sys.executable,
                "-m",
                "entrypoints.training.checkpoints.universal_checkpoint",
                *map(str, options),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                last_line = (done.stderr.strip().splitlines() or ["no error message"])[-1]
                raise UserError(
                    f"DeepSpeed cannot convert the state of {checkpoint} for another number of processes ({last_line})",
                    "resume with as many processes as before",
                )
            partial.rename(target)
        (checkpoint / "latest_universal").write_text(target.name, encoding="utf-8")


def _set_auto(name: str, config: Config, arguments: TrainArguments) -> None:
    """Set each field that the Trainer would compare to `auto`, with a warning where that changes its value."""
    from_flags = {field: getattr(arguments, attribute) for field, attribute in FLAGS.items() if attribute}
    for field in (*FLAGS, *FIXED):
        node, key = _find_node(config, field)
        written = node.get(key)
        if written is None:
            continue
        node[key] = "auto"
        if written not in ("auto", (from_flags | FIXED).get(field)):
            used = f"{FIXED[field]} is used" if field in FIXED else "the flags determine it"
            logger.warning("%s: %s is %s; %s", name, field, written, used)


def _find_node(config: Config, field: str) -> tuple[Config, str]:
    """The section of a dotted field (an empty one if it does not exist) and the last part of its name."""
    *sections, key = field.split(".")
    for section in sections:
        config = config.get(section, {})
    return config, key


def _read_json(name: str) -> Config:
    if name in PRESETS:
        text = resources.files("entrypoints.training").joinpath(f"presets/{name}.json").read_bytes()
    else:
        file = Path(name)
        if not file.is_file():
            raise UserError(
                f"--deepspeed {name} is neither a file nor a preset", f"name a file, or one of {', '.join(PRESETS)}"
            )
        text = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    config = parse_json(text, name, "fix it and save it as UTF-8, or use a preset")
    if not isinstance(config, dict):
        raise UserError(f"{name} is not a DeepSpeed configuration", "write a JSON object")
    return config
