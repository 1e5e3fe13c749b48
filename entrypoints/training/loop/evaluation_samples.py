"""Answers to a few validation rows at each evaluation, which show what a loss does not."""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from entrypoints.chat_format.answer_parser import decode
from entrypoints.chat_format.prompt import IGNORE_INDEX
from entrypoints.training.output_files import EVALUATION_SAMPLES_FILE
from entrypoints.training.preparation import PreparedRun

if TYPE_CHECKING:
    from entrypoints.training.loop.trainer import GlmTrainer

logger = logging.getLogger(__name__)
MAX_NEW_TOKENS = 128


class EvaluationSamples(TrainerCallback):
    """Appends one JSON object per row and evaluation: `step`, `prompt`, `reference` and the greedy `prediction`.

    A row with several turns is asked its first question. Every process answers all rows, because with ZeRO-3 each one
    has a part of the weights.
    """

    def __init__(self, trainer: "GlmTrainer", run: PreparedRun, rows: int) -> None:
        self.trainer = trainer
        self.tokenizer = run.base.tokenizer
        self.file: Path = run.arguments.output_dir / EVALUATION_SAMPLES_FILE
        assert run.validation, "the flag needs validation rows"
        chosen = run.validation.select(range(min(rows, len(run.validation)))).select_columns(["input_ids", "labels"])
        self.rows: list[dict[str, Any]] = chosen.to_list()
        self.max_new_tokens = min(MAX_NEW_TOKENS, run.arguments.max_target_length)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Answer the rows with the model as it is at this step."""
        model = self.trainer.trained_model
        training = model.training
        model.eval()
        samples = [self._answer(row, state.global_step, args.device) for row in self.rows]
        model.train(training)
        if state.is_world_process_zero:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)

    def _answer(self, row: dict[str, Any], step: int, device: torch.device) -> dict[str, Any]:
        ids, labels = row["input_ids"], row["labels"]
        start = next(index for index, label in enumerate(labels) if label != IGNORE_INDEX)
        end = next((index for index in range(start, len(labels)) if labels[index] == IGNORE_INDEX), len(labels))
        prompt = torch.tensor([ids[:start]], device=device)  # (1, T)
        model: Any = self.trainer.trained_model
        with torch.no_grad(), self.trainer.compute_loss_context_manager():
            output = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                eos_token_id=list(self.tokenizer.stop_ids),
                pad_token_id=self.tokenizer.pad_id,
                synced_gpus=is_deepspeed_zero3_enabled(),  # type: ignore[no-untyped-call]  # transformers: untyped
            )
        return {
            "step": step,
            "prompt": decode(ids[:start], self.tokenizer).strip(),
            "reference": decode(ids[start:end], self.tokenizer).strip(),
            "prediction": decode(output[0, start:].tolist(), self.tokenizer).strip(),
        }
