"""eval_loss as the mean over all labels: the Trainer averages the means of its batches, which depends on their size."""

from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput


class LabelMeanTrainer(Trainer):
    """A Trainer whose eval_loss is the same for every batch size and number of processes."""

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As the Trainer's; the sums of all rows are gathered, without the rows that fill up the last batch."""
        output: EvalLoopOutput = super().evaluation_loop(*args, **kwargs | {"prediction_loss_only": False})
        sums: Any = output.predictions  # (rows, 2)
        total, labels = sums.astype("float64").sum(axis=0)
        assert output.metrics is not None, "the Trainer measures the time of every evaluation"
        output.metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_loss"] = float(total / labels)
        return output

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, torch.Tensor, None]:
        """Sum of the losses and number of labels of each row, (B, 2), in the place of logits."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return None, model(**inputs, row_sums=True).logits, None
