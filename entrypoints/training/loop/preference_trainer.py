"""Direct preference optimization: the chosen answer becomes more likely than the rejected one, against a reference.

The reference is the model before training. With an adapter it is the same model with the adapter disabled. Otherwise
its log probabilities are computed once before the first step, so no second model is in memory.
"""

import logging
from typing import Any

import torch

from entrypoints.training.loop.trainer import GlmTrainer
from entrypoints.training.rows.collation import PairCollator

logger = logging.getLogger(__name__)


class PreferenceTrainer(GlmTrainer):
    """The training loop with the loss of DPO, averaged over pairs."""

    collator = PairCollator

    def prepare_reference(self) -> None:
        """Compute the log probabilities of the reference, unless the model has an adapter to disable."""
        self.model_accepts_loss_kwargs = False  # the mean over pairs needs no count of labels
        if self.arguments.saves_adapter:
            return
        for name in ("train_dataset", "eval_dataset"):
            rows = getattr(self, name)
            if rows is not None:
                logger.info("computing the log probabilities of the reference model for %d pairs", len(rows))
                setattr(self, name, self._with_reference(rows))

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The mean loss of the pairs of a batch."""
        return self._losses(model, inputs).mean()

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, torch.Tensor, None]:
        """Loss and number 1 of each pair, (B, 2): their mean is eval_loss."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            losses = self._losses(model, inputs)
        return None, torch.stack([losses, torch.ones_like(losses)], dim=1), None

    def _losses(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """The loss of each pair, (B,)."""
        inputs = dict(inputs)
        reference = inputs.pop("reference", None)  # (2B,)
        if reference is None:
            unwrapped: Any = self.accelerator.unwrap_model(model)
            with torch.no_grad(), unwrapped.disable_adapter():
                reference = _log_probabilities(model, inputs)
        rewards = self.arguments.dpo_beta * (_log_probabilities(model, inputs) - reference)
        chosen, rejected = rewards.chunk(2)  # (B,) each
        return -torch.nn.functional.logsigmoid(chosen - rejected)

    def _with_reference(self, rows: Any) -> Any:
        model = self.trained_model.to(self.args.device)
        training, size = model.training, self.args.per_device_eval_batch_size
        model.eval()
        values: list[torch.Tensor] = []
        for start in range(0, len(rows), size):
            pairs = rows.select(range(start, min(start + size, len(rows)))).to_list()
            batch = self._prepare_inputs(self.data_collator(pairs))
            with torch.no_grad(), self.compute_loss_context_manager():
                values.append(_log_probabilities(model, batch).reshape(2, -1).cpu())
        model.train(training)
        chosen, rejected = torch.cat(values, dim=1).tolist()
        return rows.add_column("reference_chosen", chosen).add_column("reference_rejected", rejected)


def _log_probabilities(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """Of each answer given its prompt, (2B,)."""
    sums: torch.Tensor = model(**inputs, row_sums=True).logits[:, 0]
    return -sums
