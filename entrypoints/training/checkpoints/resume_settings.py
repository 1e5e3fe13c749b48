"""What happens to each setting that differs between a checkpoint and the run that resumes from it.

The rows and what is trained must be the same: otherwise UserError names the flag. Everything else is used as the flags
of the resumed run say, with a log line. The table in README.md lists the settings; a test compares it with this module.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy
from datasets import Dataset

from entrypoints.errors import UserError
from entrypoints.training.arguments import ADAPTER_METHODS, TRAINABLE_FIELDS, TrainArguments, flag_name
from entrypoints.training.methods import deepspeed_config
from entrypoints.training.rows.packing import PackedDataset

logger = logging.getLogger(__name__)
# must be the same: method, what it trains, and these
SAME = ("objective", "dpo_beta", "seed", "packing", "quantization_bit")
# determine the token ids of the rows; reported when the rows differ
ROWS = (
    "template", "source_prefix", "max_source_length", "max_target_length", "max_train_samples", "max_skipped",
    "encoding", "columns", "mix",
)  # fmt: skip
# used as the flags of the resumed run say, and logged
APPLIED = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "warmup_ratio", "weight_decay", "label_smoothing",
    "neftune_noise_alpha", "lora_dropout", "num_train_epochs", "max_steps", "precision", "rows_per_step",
)  # fmt: skip
NOT_FLAGS = {"precision": "precision", "rows_per_step": "rows per optimizer step"}


def rows_fingerprint(rows: Dataset | PackedDataset) -> str:
    """One hash of the token ids and labels of all rows, in order; equal for equal rows in another file format."""
    digest = hashlib.sha256()
    if isinstance(rows, PackedDataset):
        digest.update(json.dumps(rows.packs).encode())
        rows = rows.rows
    columns = ("length", "input_ids", "labels", "rejected_ids", "rejected_labels")
    for column in [name for name in columns if name in rows.column_names]:
        for chunk in rows.data.column(column).chunks:
            values = chunk if column == "length" else chunk.flatten()
            digest.update(numpy.ascontiguousarray(values.to_numpy(zero_copy_only=False)).data)
    return digest.hexdigest()


def check_same(saved: Mapping[str, Any], current: Mapping[str, Any], origin: Path) -> None:
    """Raise UserError naming the first setting in which a run cannot differ from the checkpoint `origin`.

    A setting that is not recorded passes: older versions recorded fewer.
    """
    method = current["method"]
    for name in ("method", *_trainable_names(method), "deepspeed", "zero_stage", *SAME):
        had, has = _describe(name, saved.get(name, current.get(name))), _describe(name, current.get(name))
        if had != has:
            raise UserError(
                f"{origin} was saved with {had}, this run has {has}",
                f"resume with {had}, or start without --resume in another --output-dir",
            )
    if current["deepspeed"]:
        had, has = saved.get("precision", current["precision"]), current["precision"]
        if had != has:
            raise UserError(
                f"the DeepSpeed states of {origin} are of a run in {had}, this run computes in {has}",
                f"resume in {had} (--bf16, --fp16 or --no-bf16), or start without --resume in another --output-dir",
            )
    _check_rows(saved, current, origin)


def log_changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Log each setting that the resumed run uses in place of the recorded one."""
    for name in APPLIED:
        if name in saved and name in current and saved[name] != current[name]:
            label = NOT_FLAGS.get(name, flag_name(name))
            logger.warning("resuming with %s %s in place of %s", label, current[name], saved[name])


def describe(
    arguments: TrainArguments, run: Mapping[str, Any], config: deepspeed_config.Config | None
) -> dict[str, Any]:
    """The settings to record in a checkpoint; `run`: those that the flags alone do not determine."""
    recorded = {name: getattr(arguments, name) for name in (*SAME, *ROWS, *APPLIED) if hasattr(arguments, name)}
    if arguments.method not in ("lora", "qlora"):
        del recorded["lora_dropout"]
    return {
        **recorded,
        "method": arguments.method,
        **arguments.trainable_config,
        "columns": {name: column for name, column in asdict(arguments.columns).items() if column},
        "learning_rate": arguments.peak_learning_rate,
        "deepspeed": config is not None,
        "zero_stage": deepspeed_config.zero_stage(config),
        **run,
    }


def _trainable_names(method: str) -> list[str]:
    return ["pre_seq_len" if name == "prefix_length" else name for name in TRAINABLE_FIELDS[method]]


def _describe(name: str, value: Any) -> str:
    """A setting as the user writes it: `--lora-rank 8`, `--packing`, `no --packing`."""
    if name == "zero_stage":
        return f"a --deepspeed configuration of ZeRO stage {value}"
    if name == "columns":
        return f"the columns {', '.join(map(str, dict(value or {}).values()))}"
    flag = flag_name(name)
    if value is None or value is False:
        return f"no {flag}"
    return flag if value is True else f"{flag} {value}"


def _check_rows(saved: Mapping[str, Any], current: Mapping[str, Any], origin: Path) -> None:
    if saved.get("rows", current["rows"]) == current["rows"]:
        return
    changed = [
        f"{_describe(name, saved[name])} then, {_describe(name, current.get(name))} now"
        for name in ROWS
        if name in saved and saved[name] != current.get(name)
    ]
    weights = "--adapter" if current["method"] in ADAPTER_METHODS else "--model-name-or-path"
    raise UserError(
        f"{origin} was trained on other rows ({'; '.join(changed) or 'the content of --train-file has changed'})",
        "resume with the same rows; to train its weights on these, start without --resume in another --output-dir with "
        f"{weights} {origin}",
    )
