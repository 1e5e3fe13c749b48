"""The probe of a run: the loss of general rows and of rows of the task, before the first step and after the last.

A task is learned if its loss falls; a loss of the general rows that rises shows what was forgotten.
"""

import json
import logging
import math
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from entrypoints.chat_format.prompt import Message
from entrypoints.errors import UserError
from entrypoints.file_writing import write_json
from entrypoints.training.loop.trainer import GlmTrainer
from entrypoints.training.output_files import PROBE_FILE
from entrypoints.training.preparation import PreparedRun
from entrypoints.training.rows.collation import Collator, RowEncoder
from entrypoints.training.rows.packing import PackedDataset
from entrypoints.untrusted import read_json_file

logger = logging.getLogger(__name__)
GENERAL_FILE = "general_rows.jsonl"  # written for this project: common questions in two languages
TASK_ROWS = 16
GENERAL, TASK = "general", "task"


class Probe(TrainerCallback):
    """Measures the mean loss over labels of each set, and writes both values of each to PROBE_FILE."""

    def __init__(self, trainer: GlmTrainer, run: PreparedRun) -> None:
        self.trainer = trainer
        self.file = run.arguments.output_dir / PROBE_FILE
        self.sets = {GENERAL: _general_rows(run), TASK: _task_rows(run)}
        self.collator = Collator(run.base.tokenizer.pad_id)
        self.batch_size = run.arguments.per_device_eval_batch_size
        self.before: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the first step; a resumed run keeps the values of its start."""
        self.before = _read_before(self.file)
        if state.global_step == 0:
            self.before = self._measure()
            self._write(state, {})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the last step; not after an interrupt."""
        if state.global_step < state.max_steps:
            return
        after = self._measure()
        self._write(state, after)
        for name, rows in self.sets.items():
            before = self.before.get(name, math.nan)
            logger.info("loss of %d %s rows: %.3f before, %.3f after", len(rows), name, before, after[name])

    def _write(self, state: TrainerState, after: Mapping[str, float]) -> None:
        if state.is_world_process_zero:
            values = {
                name: {"rows": len(rows), "before": self.before.get(name), "after": after.get(name)}
                for name, rows in self.sets.items()
            }
            write_json(self.file, values)

    def _measure(self) -> dict[str, float]:
        model = self.trainer.trained_model
        training = model.training
        model.eval()
        found = {name: self._mean_loss(model, rows) for name, rows in self.sets.items()}
        model.train(training)
        return found

    def _mean_loss(self, model: torch.nn.Module, rows: list[dict[str, Any]]) -> float:
        """Every process computes all rows, so that none waits for another."""
        total = torch.zeros(2, dtype=torch.float64)
        for start in range(0, len(rows), self.batch_size):
            batch = self.trainer._prepare_inputs(self.collator(rows[start : start + self.batch_size]))
            with torch.no_grad(), self.trainer.compute_loss_context_manager():
                total += model(**batch, row_sums=True).logits.sum(0).double().cpu()
        return float(total[0] / total[1].clamp(min=1))


def _general_rows(run: PreparedRun) -> list[dict[str, Any]]:
    arguments = run.arguments
    encoder = RowEncoder(
        run.base.tokenizer, run.prompt_format, arguments.max_source_length, arguments.max_target_length
    )
    text = resources.files("entrypoints.training.loop").joinpath(GENERAL_FILE).read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    encoded = []
    for row in rows:
        turns = [Message("user", row["content"]), Message("assistant", row["summary"])]
        encoded.append(encoder({"prompt": "", "response": "", "history": [], "turns": turns}))
    return [{name: row[name] for name in ("input_ids", "labels")} for row in encoded]


def _task_rows(run: PreparedRun) -> list[dict[str, Any]]:
    """Rows that are not trained on, if there are any; of a preference row the chosen answer."""
    source: Any = run.validation or run.dataset
    rows = source.rows if isinstance(source, PackedDataset) else source
    chosen = rows.select(range(min(TASK_ROWS, len(rows)))).select_columns(["input_ids", "labels"])
    found: list[dict[str, Any]] = chosen.to_list()
    return found


def _read_before(file: Path) -> dict[str, float]:
    try:
        return {name: float(values["before"]) for name, values in dict(read_json_file(file)).items()}
    except (OSError, UserError, ValueError, KeyError, TypeError):
        return {}
