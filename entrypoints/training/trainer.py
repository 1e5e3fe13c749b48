"""One fine-tuning run, from flags to a complete folder. Every process of a run calls `train`."""

import contextlib
import logging
import os
import shutil
import warnings
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, TrainingArguments  # noqa: F401 - tests stop the loading here
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import logging as transformers_logging

from entrypoints.engines.machine import freed_memory_kept
from entrypoints.training import methods
from entrypoints.training.arguments import TrainArguments
from entrypoints.training.batches import Collator
from entrypoints.training.checkpoints import Checkpoint
from entrypoints.training.launch import LostProcess, is_loss, is_worker
from entrypoints.training.loop import GlmTrainer
from entrypoints.training.preparation import Prepared, compute_dtype, prepare
from entrypoints.training.result import Finishing
from entrypoints.training.watching import Interrupts, Progress

logger = logging.getLogger(__name__)


def train(arguments: TrainArguments) -> Path:
    """Run it; returns the output folder: a native checkpoint, or an adapter, with the run's origin in it.

    Raises UserError, before the model is loaded, for everything that can be known by then.
    """
    prepared = prepare(arguments, int(os.environ.get("WORLD_SIZE", "1")) if is_worker(os.environ) else 1)
    trainer = made(arguments, prepared)
    _run(trainer, prepared.resumed)
    del trainer
    unset_hf_deepspeed_config()  # ZeRO-3 would divide the result too when it is loaded to answer
    torch.cuda.empty_cache()  # whoever loads the result needs the memory that the optimizer had
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return arguments.output_dir


def _run(trainer: GlmTrainer, resumed: Checkpoint | None) -> None:
    interrupts = Interrupts()
    trainer.add_callback(interrupts)
    going_on = {}
    if resumed:
        logger.info("going on from %s", resumed.folder)
        going_on["resume_from_checkpoint"] = str(resumed.folder)
    with interrupts.caught(), freed_memory_kept() if trainer.args.use_cpu else contextlib.nullcontext():
        try:
            result = trainer.train(**going_on)
        except RuntimeError as error:
            if torch.distributed.is_initialized() and is_loss(error):
                raise LostProcess(error) from error
            raise
        interrupts.raise_if_any()
        trainer.broken.end()
    if trainer.is_world_process_zero():
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    trainer.save_result()


def made(arguments: TrainArguments, prepared: Prepared) -> GlmTrainer:
    """The loop of a run with its model loaded, one step from its start."""
    transformers_logging.disable_progress_bar()
    dtype = compute_dtype(prepared.precision)
    # made first: where ZeRO-3 divides the weights, loading asks it how
    settings = TrainingArguments(**_settings(arguments, prepared))
    if settings.n_gpu > 1:  # the Trainer would copy the model to all of them in each step
        settings._n_gpu = 1
        logger.info("one of the GPUs is used; --num-gpus uses more")
    if prepared.deepspeed:
        import deepspeed

        if shutil.which(os.environ.get("CXX", "c++")) is None:
            # compiled at every start: shared memory between processors of one host, in place of gloo's sockets
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # its collectives have new names in torch, and every call would say so
        warnings.filterwarnings("ignore", ".*torch.distributed.*is deprecated", FutureWarning)
        deepspeed.init_distributed(dist_backend="gloo" if settings.use_cpu else None, verbose=False)
    logger.info("loading %s, method %s, computing in %s", arguments.model_name_or_path, arguments.method, dtype)
    return GlmTrainer(
        model=methods.load(arguments, prepared.base.shape, dtype, divided=prepared.deepspeed is not None),
        args=settings,
        train_dataset=prepared.dataset,
        eval_dataset=prepared.validation,
        data_collator=Collator(prepared.base.tokenizer.pad_id),
        callbacks=[Progress()],
        finishing=Finishing(prepared.base, prepared.prompt_format, arguments),
        arguments=arguments,
    )


def _settings(arguments: TrainArguments, prepared: Prepared) -> dict:
    """What the Trainer is told under its own names."""
    same = (
        "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "num_train_epochs",
        "lr_scheduler_type", "warmup_steps", "weight_decay", "logging_steps", "save_steps", "seed",
        "neftune_noise_alpha",
    )  # fmt: skip
    return {
        **{name: getattr(arguments, name) for name in same},
        **prepared.precision,
        "output_dir": str(arguments.output_dir),
        "activation_checkpointing": arguments.gradient_checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        "ddp_find_unused_parameters": False,
        "deepspeed": prepared.deepspeed,
        "eval_strategy": "epoch" if prepared.validation else "no",
        "eval_on_start": bool(prepared.validation),  # what fails here would fail after the first epoch
        "label_names": ["labels"],  # the Trainer would look for them in a signature, which a prefix's does not show
        "learning_rate": arguments.rate,
        "max_steps": arguments.max_steps or -1,
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "report_to": ["tensorboard"],
    }
