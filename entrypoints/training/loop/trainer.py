"""The Hugging Face Trainer with atomic checkpoints, the same row order in resumed runs, and saving by method."""

import contextlib
import functools
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PrinterCallback, TrainerCallback, TrainerState, TrainingArguments

from entrypoints.errors import UserError
from entrypoints.training.checkpoints import store
from entrypoints.training.loop.callbacks import EvaluateCheckpoints, InvalidStepCounter, LossReader
from entrypoints.training.loop.evaluation_loss import LabelMeanTrainer
from entrypoints.training.loop.speed import SpeedMeter
from entrypoints.training.methods import trainable_model
from entrypoints.training.methods.ptuning import GlmForPrefixTuning
from entrypoints.training.output_files import LATEST_FILE, STATE_FILE
from entrypoints.training.preparation import PreparedRun, row_lengths
from entrypoints.training.result import final_model
from entrypoints.training.result.finalize import CheckpointFinalizer
from entrypoints.training.rows.collation import Collator, LengthGroupedSampler

logger = logging.getLogger(__name__)
SAVE_ERRORS = (OSError, RuntimeError, SafetensorError)  # what torch and safetensors raise on a full disk


class GlmTrainer(LabelMeanTrainer):
    """The training loop of one run; every process has one, and all processes call each method."""

    collator: Callable[[int], Callable[[Sequence[dict[str, Any]]], dict[str, torch.Tensor]]] = Collator

    def __init__(
        self, model: torch.nn.Module, settings: TrainingArguments, run: PreparedRun, callbacks: list[TrainerCallback]
    ) -> None:
        arguments = self.arguments = run.arguments
        earlier = final_model.find_best(run) if run.validation else None
        self.evaluations = EvaluateCheckpoints(arguments.load_best, earlier.eval_loss if earlier else None)
        super().__init__(
            model=model,
            args=settings,
            train_dataset=run.dataset,
            eval_dataset=run.validation,
            data_collator=self.collator(run.base.tokenizer.pad_id),
            callbacks=[self.evaluations, *callbacks] if run.validation else callbacks,
        )
        self.remove_callback(PrinterCallback)  # it writes to stdout
        self.trained_model = model
        self.finalizer = CheckpointFinalizer(run.base, run.prompt_format, arguments)
        self.output = arguments.output_dir
        self.save_total_limit = arguments.save_total_limit
        self.row_lengths = row_lengths(run.dataset)
        self.losses = LossReader(InvalidStepCounter(arguments.max_broken_steps))
        self.speed = SpeedMeter()
        self.callback_handler.callbacks.insert(0, self.speed)  # before those that write what it adds
        self._batch_losses: list[torch.Tensor] = []  # of the current optimizer step
        self.run = run
        self._sequence = store.next_sequence(self.output, run.resumed) - 1
        self._saving_result = False
        self._save_errors: list[str] = []
        self._weight_decays: list[float] = []

    def save_result(self) -> None:
        """Move the finished model, or with --load-best that of the best checkpoint, into the output folder."""
        if self.run.arguments.load_best and self._save_best():
            return
        partial = self.output / store.PARTIAL / "result"
        self._saving_result = True
        try:
            self.save_model(str(partial))
            if self.args.should_save:
                self.finalizer.finalize(partial, self._save_dtype or torch.float32)
                (partial / "training_args.bin").rename(self.output / "training_args.bin")
                final_model.replace_result(self.output, partial)
        except SAVE_ERRORS as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise _save_error(error) from error
        self.accelerator.wait_for_everyone()

    def _save_best(self) -> bool:
        """Make the best checkpoint the result; False in all processes if it is the last step, or none was saved."""
        best = final_model.find_best(self.run) if self.args.should_save else None
        if best and best.step == self.state.global_step:
            best = None
        if best:
            try:
                final_model.write_result_of(best, self.run)
            except SAVE_ERRORS as error:
                raise _save_error(error) from error
        return self._is_any(best is not None)

    def _is_any(self, value: bool) -> bool:
        """Whether the value is true in any process; all processes wait for each other."""
        if not torch.distributed.is_initialized():
            return value
        agreed = torch.tensor([int(value)], device=self.args.device)
        torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX)
        return bool(agreed)

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """As the Trainer's, for one batch; raises UserError after too many consecutive invalid steps."""
        self.speed.add_batch(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._batch_losses.append(loss.detach())
        if self.accelerator.sync_gradients:  # the last batch of an optimizer step
            skipped = self.state.global_step > 0 and self.accelerator.optimizer_step_was_skipped
            self.losses.add(torch.stack(self._batch_losses).sum(), skipped, self.state.global_step + 1)
            self._batch_losses.clear()
        return loss

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        prepared = super()._prepare_for_training(  # type: ignore[no-untyped-call]  # transformers: untyped
            max_steps, train_dataloader, resume_from_checkpoint
        )
        if self.is_deepspeed_enabled:
            self._collect_errors_of_deepspeed()
        if resume_from_checkpoint is not None:
            self._use_optimizer_flags()
        if self.is_deepspeed_enabled and resume_from_checkpoint is not None:
            # DeepSpeed 0.19.8 shares one step counter among all groups of a ZeRO-3 state that was saved by another
            # number of processes (stage3.py, line 3681): it would count once for each group
            engine: Any = self.deepspeed
            for state in engine.optimizer.optimizer.state.values():
                state.update({name: value.clone() for name, value in state.items() if name == "step"})
        return prepared

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As the Trainer's; keeps the weight decay of the flags, which a loaded state would replace."""
        optimizer = super().create_optimizer(model)
        self._weight_decays = [group["weight_decay"] for group in optimizer.param_groups]
        return optimizer

    def _use_optimizer_flags(self) -> None:
        """Set learning rate and weight decay to those of the flags: loading a state restores the recorded ones."""
        scheduler: Any = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            return  # of a DeepSpeed configuration
        groups = scheduler.optimizer.param_groups
        decays = self._weight_decays or [self.args.weight_decay] * len(
            groups
        )  # an optimizer of DeepSpeed has one group
        scheduler.base_lrs = [self.args.learning_rate] * len(groups)
        factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
        for group, factor, decay in zip(groups, factors, decays, strict=True):
            group.update(lr=self.args.learning_rate * factor, initial_lr=self.args.learning_rate, weight_decay=decay)
        scheduler._last_lr = [group["lr"] for group in groups]

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        self._sampler = LengthGroupedSampler(self.row_lengths, self.run.plan.rows_per_step, self.args.seed)
        return self._sampler

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any) -> Any:
        """As the Trainer's, with the number of epochs and steps left from the position in the rows."""
        values = list(super().set_initial_training_values(args, dataloader))
        run = self.run
        values[0] = run.plan.epochs_until(run.last_step, run.start, run.first_step)
        values[-1] = run.last_step
        return tuple(values)

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, num_train_epochs: int, checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        """The epoch and the batches to skip in it; intervals of logging and saving are those of the flags."""
        super()._init_training_state(max_steps, steps_per_epoch, num_train_epochs, None, trial)
        if checkpoint is not None:
            self.state = TrainerState.load_from_json(str(Path(checkpoint) / STATE_FILE))
            self.state.train_batch_size = self._train_batch_size
            self.state.compute_steps(self.args, max_steps)  # type: ignore[no-untyped-call]  # transformers: untyped
            self.state.init_training_references(  # type: ignore[no-untyped-call]  # transformers: untyped
                self, max_steps, num_train_epochs, trial
            )
        run = self.run
        return run.start.epoch, run.plan.skipped_steps(run.start) * self.args.gradient_accumulation_steps

    def _run_epoch(self, *args: Any, **values: Any) -> None:
        """One pass over the rows, in the resumed epoch over those that are left."""
        run = self.run
        if values["epoch"] == run.start.epoch and run.start.rows:
            skipped, rows = run.plan.skipped_steps(run.start), run.plan.rows - run.start.rows
            self._sampler.continue_from(run.start, skipped * run.plan.rows_per_step)
            batches = skipped * self.args.gradient_accumulation_steps + run.plan.batches_for(rows)
            steps = skipped + run.plan.steps_for(rows)
            values |= {"steps_in_epoch": batches, "num_update_steps_per_epoch": steps}
        super()._run_epoch(*args, **values)  # type: ignore[no-untyped-call]  # transformers: untyped
        self._sampler.continue_from(None)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.output / store.PARTIAL)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Save a checkpoint; one that cannot be written is logged and removed, and the run continues to its result."""
        partial = self.output / store.PARTIAL / f"checkpoint-{self.state.global_step}"
        self._save_errors.clear()
        with self._collecting_errors():
            super()._save_checkpoint(model, trial)
        if not self._is_any(bool(self._save_errors)) and self.args.should_save:
            with self._collecting_errors():
                self.finalizer.finalize(partial, self._save_dtype or torch.float32)
                store.publish(partial, self.output / partial.name, self._record())
                logger.info("saved %s; --resume auto resumes from it", self.output / partial.name)
                store.remove_oldest(self.output, self.save_total_limit)
        for error in self._save_errors:
            logger.error("saving %s failed (%s); the run continues without it: free disk space", partial.name, error)
        if self._is_any(bool(self._save_errors)) and self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)

    @contextlib.contextmanager
    def _collecting_errors(self) -> Iterator[None]:
        """Keep an error of writing a checkpoint: this process has to take part in what all processes do after it."""
        try:
            yield
        except SAVE_ERRORS as error:
            self._save_errors.append(str(error))  # its traceback would keep files open, and their space occupied

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._collecting_errors():
            super()._save_optimizer_and_scheduler(output_dir)
            if self.is_deepspeed_enabled and self.args.should_save:
                engine: Any = self.deepspeed
                (Path(output_dir) / LATEST_FILE).write_text(f"global_step{engine.global_steps}", encoding="utf-8")

    def _save_rng_state(self, output_dir: str) -> None:
        with self._collecting_errors():
            super()._save_rng_state(output_dir)

    def _collect_errors_of_deepspeed(self) -> None:
        """The same for what DeepSpeed writes between its collective calls, of which the last one is a barrier."""
        engine: Any = self.deepspeed

        def collecting(write: Callable[..., object]) -> Callable[..., None]:
            def collected(*args: Any, **kwargs: Any) -> None:
                with self._collecting_errors():
                    write(*args, **kwargs)

            return collected

        for owner, name in (
            (engine.checkpoint_engine, "makedirs"),
            (engine.checkpoint_engine, "save"),
            (engine, "_copy_recovery_script"),
        ):
            setattr(owner, name, collecting(getattr(owner, name)))
        engine.save_checkpoint = functools.partial(engine.save_checkpoint, save_latest=False)

    def _record(self) -> dict[str, Any]:
        """What the record of a checkpoint says beside its files."""
        self._sequence += 1
        step = self.state.global_step
        position = self.run.position_at(step).as_dict()
        loss = self.evaluations.loss_at(step)
        return {
            "made_with": self.run.settings,
            "step": step,
            "sequence": self._sequence,
            "position": position,
            "eval_loss": loss,
        }

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        assert output_dir is not None, "the Trainer passes the folder to every save of a run"
        folder = Path(output_dir)
        state = self.trained_model.state_dict() if state_dict is None else state_dict
        with contextlib.nullcontext() if self._saving_result else self._collecting_errors():
            trainable_model.save(self.trained_model, state, folder, self.finalizer.base.model_config, self._save_dtype)
            torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if isinstance(self.trained_model, GlmForPrefixTuning):
            trainable_model.load_prefix(self.trained_model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    @property
    def _save_dtype(self) -> torch.dtype | None:
        """The dtype to save weights in; None: as they are, which a checkpoint needs unless DeepSpeed keeps float32."""
        return self.finalizer.base_dtype if self._saving_result or self.is_deepspeed_enabled else None


def _save_error(error: Exception) -> UserError:
    return UserError(
        f"saving the result failed ({error}); the checkpoints are intact",
        "fix the cause, for example free disk space, and continue with --resume auto",
    )
