"""The Hugging Face Trainer with what it lacks: checkpoints that appear whole, an order of rows that a resumed run has
too, saving by method, and an end to steps that teach nothing."""

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PrinterCallback, Trainer

from entrypoints.errors import UserError
from entrypoints.training import checkpoints, methods
from entrypoints.training.arguments import TrainArguments
from entrypoints.training.batches import GroupedByLength
from entrypoints.training.prefix import PrefixLearner
from entrypoints.training.result import Finishing, result_files
from entrypoints.training.watching import BrokenSteps

logger = logging.getLogger(__name__)


class GlmTrainer(Trainer):
    """One run's loop; every process has one, and all of them call each method."""

    def __init__(self, *args, finishing: Finishing, arguments: TrainArguments, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)  # it writes to stdout
        self.finishing = finishing
        self.output = arguments.output_dir
        self.keep = arguments.save_total_limit
        self.broken = BrokenSteps(arguments.max_broken_steps)
        self._losses: list[float] = []  # of the step's batches so far
        self.made_with = {
            "method": arguments.method,
            **arguments.shape_of_learnt,
            "processes": self.args.world_size,
            "zero_stage": self._zero_stage(),
        }
        self._final = False

    def save_result(self) -> None:
        """Put the finished model into the output folder, file by file, the manifest last."""
        partial = self.output / checkpoints.PARTIAL / "result"
        self._final = True
        with self._saving(partial):
            self.save_model(str(partial))
            if self.args.should_save:
                self.finishing.complete(partial, self._dtype or torch.float32)
                for old in result_files(self.output):
                    old.unlink()
                new = result_files(partial)
                for file in (*new, partial / "training_args.bin"):
                    file.rename(self.output / file.name)
                shutil.rmtree(partial.parent)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """As the Trainer's, of one batch; it ends the run after too many steps that taught nothing."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._losses.append(loss.item())
        if self.accelerator.sync_gradients:  # the last batch of a step
            skipped = self.state.global_step > 0 and self.accelerator.optimizer_step_was_skipped
            self.broken.note(sum(self._losses), skipped, self.state.global_step + 1)
            self._losses.clear()
        return loss

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.is_deepspeed_enabled and resume_from_checkpoint is not None:
            # DeepSpeed 0.19.8 gives all groups of a ZeRO-3 state loaded by another number of processes one and the
            # same counter of steps (stage3.py, line 3681), which then counts once for each group
            for state in self.deepspeed.optimizer.optimizer.state.values():
                state.update({name: value.clone() for name, value in state.items() if name == "step"})
        return prepared

    def _get_train_sampler(self, train_dataset=None) -> GroupedByLength:
        settings = self.args
        rows = settings.train_batch_size * settings.gradient_accumulation_steps * settings.world_size
        return GroupedByLength(self.train_dataset["length"][:], rows, settings.seed)

    def _get_output_dir(self, trial) -> str:
        return str(self.output / checkpoints.PARTIAL)

    def _save_checkpoint(self, model, trial) -> None:
        partial = self.output / checkpoints.PARTIAL / f"checkpoint-{self.state.global_step}"
        with self._saving(partial):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.finishing.complete(partial, self._dtype or torch.float32)
                checkpoints.publish(partial, self.output / partial.name, self.made_with)
                logger.info("%s is whole: --resume auto goes on from it", self.output / partial.name)
                checkpoints.rotate(self.output, self.keep)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir)
        state = self.model.state_dict() if state_dict is None else state_dict
        methods.save(self.model, state, folder, self.finishing.base.shape, self._dtype)
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if isinstance(self.model, PrefixLearner):
            methods.load_prefix(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    @property
    def _dtype(self) -> torch.dtype | None:
        """What to save in: a checkpoint to resume from needs float32, unless DeepSpeed keeps that beside."""
        return self.finishing.stored_dtype if self._final or self.is_deepspeed_enabled else None

    def _zero_stage(self) -> int:
        plugin = self.accelerator.state.deepspeed_plugin
        return plugin.zero_stage if plugin else 0

    @contextlib.contextmanager
    def _saving(self, partial: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:  # what a full disk makes of torch and safetensors
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(
                f"saving {partial.name} failed ({error}); what was saved before it is whole",
                "mend the cause, free space perhaps, and go on with --resume auto",
            ) from error
        self.accelerator.wait_for_everyone()
