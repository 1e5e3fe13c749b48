"""The training of one run: model, Trainer, result. Every process of a run calls `train`."""

import contextlib
import logging
import pickle
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import logging as transformers_logging

from entrypoints.checkpoint.pickle_files import format_load_error, restricted_unpickling
from entrypoints.errors import UserError
from entrypoints.hardware.resources import retain_freed_memory
from entrypoints.training.checkpoints.folders import Checkpoint
from entrypoints.training.checkpoints.training_log import TrainingLog
from entrypoints.training.launch import WorkerLostError, is_connection_lost
from entrypoints.training.loop.callbacks import LogProgress, SaveOnSignal
from entrypoints.training.loop.evaluation_samples import EvaluationSamples
from entrypoints.training.loop.preference_trainer import PreferenceTrainer
from entrypoints.training.loop.probe import Probe
from entrypoints.training.loop.trainer import GlmTrainer
from entrypoints.training.methods import trainable_model
from entrypoints.training.methods.deepspeed_config import zero_stage
from entrypoints.training.output_files import REJECTED_REMEDY
from entrypoints.training.preparation import PreparedRun

logger = logging.getLogger(__name__)
LOADING_FUNCTIONS = {  # of the Trainer and of DeepSpeed
    "_load_from_checkpoint", "_load_optimizer_and_scheduler", "_load_scaler", "_load_rng_state", "load_from_json",
    "deepspeed_load_checkpoint",
}  # fmt: skip
SAME_NAMES = (  # fields that have the same name in TrainArguments and in the Trainer's TrainingArguments
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "num_train_epochs",
    "lr_scheduler_type", "weight_decay", "logging_steps", "save_steps", "seed", "neftune_noise_alpha",
)  # fmt: skip


def train(run: PreparedRun) -> Path:
    """Train; returns the output folder with the result: a native checkpoint, or an adapter.

    Raises UserError: diverged loss, failed save, another process of the run died.
    """
    trainer = build_trainer(run)
    _train(trainer, run.resumed)
    del trainer
    # ZeRO-3 would also partition the result when it is loaded for inference
    unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]  # transformers: untyped
    torch.cuda.empty_cache()  # loading the result needs the memory that the optimizer had
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return run.arguments.output_dir


def _train(trainer: GlmTrainer, resumed: Checkpoint | None) -> None:
    signals = SaveOnSignal()
    trainer.add_callback(signals)
    if resumed:
        logger.info("resuming from %s", resumed.folder)
    with signals.handling(), retain_freed_memory() if trainer.args.use_cpu else contextlib.nullcontext():
        try:
            with restricted_unpickling():  # DeepSpeed loads its states with weights_only=False
                result = trainer.train(resume_from_checkpoint=str(resumed.folder) if resumed else None)
        except Exception as error:
            if torch.distributed.is_initialized() and isinstance(error, RuntimeError) and is_connection_lost(error):
                raise WorkerLostError(error) from error
            if resumed is None or not _is_load_error(error):
                raise
            raise UserError(f"{resumed.folder}: a file {_describe_load_error(error)}", REJECTED_REMEDY) from error
        signals.raise_received()
        trainer.losses.check_last()
    trainer.save_result()
    if trainer.is_world_process_zero():
        trainer.save_metrics("train", result.metrics)
        loss = trainer.evaluations.loss_at(trainer.state.global_step)
        if loss is not None:
            trainer.save_metrics("eval", {"eval_loss": loss})
        trainer.save_state()


def _is_load_error(error: Exception) -> bool:
    """Was it raised by a function that loads the state of a checkpoint, rather than by the training itself?"""
    return any(frame.f_code.co_name in LOADING_FUNCTIONS for frame, _ in traceback.walk_tb(error.__traceback__))


def _describe_load_error(error: Exception) -> str:
    """A file can have the recorded hash and be wrong: whoever sends a folder also writes its record."""
    if isinstance(error, pickle.UnpicklingError):
        return format_load_error(error)
    return f"holds another state than that of this run ({type(error).__name__}: {format_load_error(error)})"


def build_trainer(run: PreparedRun) -> GlmTrainer:
    """The Trainer of a run with its model loaded."""
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers: untyped
    arguments, dtype = run.arguments, run.precision.compute_dtype
    # before the model is loaded: with ZeRO-3, loading reads from these settings how to partition the weights
    settings = TrainingArguments(**_trainer_settings(run))
    if settings.n_gpu > 1:  # the Trainer would copy the model to all of them in each step
        settings._n_gpu = 1
        logger.info("using one of the GPUs; --num-gpus uses more")
    if run.deepspeed:
        _initialize_deepspeed(settings.use_cpu)
    logger.info("loading %s, method %s, computing in %s", arguments.model_name_or_path, arguments.method, dtype)
    set_seed(arguments.seed)  # the weights that a method adds; the Trainer seeds after the model is made
    # each process reads the weights into its own device: all of them would not fit into the memory of the host
    device = None if settings.use_cpu or zero_stage(run.deepspeed) == 3 else settings.device
    model = trainable_model.load(arguments, run.base.model_config, dtype, run.deepspeed is not None, device)
    trainer_class = PreferenceTrainer if arguments.objective == "dpo" else GlmTrainer
    trainer = trainer_class(model, settings, run, [LogProgress(), TrainingLog(arguments.output_dir)])
    if isinstance(trainer, PreferenceTrainer):
        trainer.prepare_reference()
    trainer.add_callback(Probe(trainer, run))
    if arguments.eval_samples and run.validation:
        trainer.add_callback(EvaluationSamples(trainer, run, arguments.eval_samples))
    return trainer


def _initialize_deepspeed(use_cpu: bool) -> None:
    import deepspeed

    # shared memory between the CPU processes of a host, in place of gloo's sockets: it would be compiled at the first
    # start and for every environment, and its kernels need AVX-512
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed calls collectives by names that torch has deprecated; every call would warn
    warnings.filterwarnings("ignore", ".*torch.distributed.*is deprecated", FutureWarning)
    deepspeed.init_distributed(dist_backend="gloo" if use_cpu else None, verbose=False)


def _trainer_settings(run: PreparedRun) -> dict[str, Any]:
    """Keyword arguments of the Trainer's TrainingArguments."""
    arguments = run.arguments
    return {
        **{name: getattr(arguments, name) for name in SAME_NAMES},
        "fp16": run.precision.fp16,
        "bf16": run.precision.bf16,
        "use_cpu": run.precision.use_cpu,
        "dataloader_num_workers": 0 if run.precision.use_cpu else 1,  # makes the next batches while a GPU computes
        "output_dir": str(arguments.output_dir),
        "activation_checkpointing": bool(arguments.gradient_checkpointing),
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        "ddp_find_unused_parameters": False,
        "deepspeed": run.deepspeed,
        "eval_strategy": ("steps" if arguments.eval_steps else "epoch") if run.validation else "no",
        "eval_steps": arguments.eval_steps,
        "warmup_steps": arguments.warmup_ratio or arguments.warmup_steps,  # transformers: below 1, a share of all steps
        "eval_on_start": bool(run.validation)
        and not run.resumed,  # what fails here would otherwise fail after the first epoch
        "label_names": ["labels"],  # the Trainer derives them from a signature, which GlmForPrefixTuning does not have
        "learning_rate": arguments.peak_learning_rate,
        "max_steps": arguments.max_steps or -1,
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "report_to": ["tensorboard"],
    }
