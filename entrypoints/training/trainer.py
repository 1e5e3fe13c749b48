"""One fine-tuning run of all parameters in one process: checks, rows, the Hugging Face Trainer, a complete folder.

Several processes, DeepSpeed, LoRA and resuming are not here.
"""

import logging
import math
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

from entrypoints.checkpoint import native
from entrypoints.checkpoint.files import require_space
from entrypoints.checkpoint.manifest import read_manifest, write_manifest
from entrypoints.checkpoint.native import NativeCheckpoint, open_native
from entrypoints.checkpoint.original import TensorFiles, open_tensors
from entrypoints.dataset.reading import Example, examples, read_rows
from entrypoints.errors import UserError
from entrypoints.training.arguments import TrainArguments
from entrypoints.training.batches import Collator, RowEncoder, encode_rows

logger = logging.getLogger(__name__)


def train(arguments: TrainArguments) -> Path:
    """Run it; returns the output folder, a native checkpoint with the prompt format and the run's origin in it.

    Raises UserError, before the model is loaded, for everything that can be known by then.
    """
    precision = _precision(arguments)
    base = open_native(arguments.model_name_or_path)
    rows = _read(arguments.train_file, arguments)[: arguments.max_train_samples]
    held_out = _read_held_out(arguments)
    prompt_format = arguments.prompt_format or base.prompt_format
    encoder = RowEncoder(base.tokenizer, prompt_format, arguments.max_source_length, arguments.max_target_length)
    _check_output(arguments, base)
    dataset = encode_rows(rows, encoder, arguments.preprocessing_num_workers)
    _check_window(dataset, base)
    validation = encode_rows(held_out, encoder) if held_out else None
    _clear_output(arguments.output_dir)
    finishing = _Finishing(base, encoder, arguments)
    trainer = _trainer(arguments, precision, dataset, validation, finishing)
    result = trainer.train()
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    trainer.model.to(
        getattr(torch, _dtype_name(base.files))
    )  # as the base is stored, not in the precision of the optimizer
    trainer.save_model()
    finishing.complete(arguments.output_dir)
    return arguments.output_dir


def _read(file: Path, arguments: TrainArguments) -> list[Example]:
    used, skipped = examples(read_rows(file, arguments.encoding), arguments.columns)
    for row in skipped[:10]:
        logger.warning("skipped %s:%d: %s", row.file.name, row.line, row.reason)
    logger.info("%s: %d rows used, %d skipped", file, len(used), len(skipped))
    return used


def _read_held_out(arguments: TrainArguments) -> list[Example]:
    file = arguments.validation_file
    if file is None:
        return []
    if file.is_file() and file.stat().st_size == 0:
        logger.warning("%s is empty: no evaluation during training", file)
        return []
    return _read(file, arguments)


def _check_window(dataset: Dataset, base: NativeCheckpoint) -> None:
    longest = max(dataset["length"])
    if longest > base.shape.window:
        raise UserError(
            f"the longest row has {longest} tokens, the model's window is {base.shape.window}",
            "lower --max-source-length or --max-target-length",
        )


def _precision(arguments: TrainArguments) -> dict:
    """Weights and optimizer stay in float32; fp16 and bf16 are what the forward pass computes in."""
    cuda = torch.cuda.is_available() and arguments.device in ("auto", "cuda")
    if arguments.device == "cuda" and not cuda:
        raise UserError("--device cuda: this machine has no CUDA device", "use --device auto")
    if arguments.fp16 and not cuda:
        raise UserError("--fp16 needs a CUDA device", "leave it out, or use --bf16")
    use_cpu = not cuda and (arguments.device == "cpu" or not torch.backends.mps.is_available())
    return {"fp16": arguments.fp16, "bf16": arguments.bf16, "use_cpu": use_cpu}


def _check_output(arguments: TrainArguments, base: NativeCheckpoint) -> None:
    folder = arguments.output_dir
    if folder.is_file():
        raise UserError(f"--output-dir {folder} is a file", "name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not arguments.overwrite_output_dir:
        raise UserError(f"--output-dir {folder} is not empty", "choose another folder, or add --overwrite-output-dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make --output-dir {folder} ({error.strerror})", "choose another folder") from error
    require_space(folder, base.files.size)


def _clear_output(folder: Path) -> None:
    """Remove an earlier run's checkpoints: last of all, when nothing the user can mend stops this run any more."""
    for old in (*folder.glob("checkpoint-*"), *native.model_files(folder), folder / "manifest.json"):
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)


def _trainer(
    arguments: TrainArguments, precision: dict, dataset: Dataset, validation: Dataset | None, finishing: "_Finishing"
) -> Trainer:
    transformers_logging.disable_progress_bar()
    logger.info("loading %s", arguments.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model_name_or_path, dtype=torch.float32, local_files_only=True
    )
    settings = TrainingArguments(
        output_dir=str(arguments.output_dir),
        per_device_train_batch_size=arguments.per_device_train_batch_size,
        per_device_eval_batch_size=arguments.per_device_eval_batch_size,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        activation_checkpointing=arguments.gradient_checkpointing,
        num_train_epochs=arguments.num_train_epochs,
        max_steps=arguments.max_steps or -1,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type=arguments.lr_scheduler_type,
        warmup_steps=arguments.warmup_steps,
        weight_decay=arguments.weight_decay,
        logging_steps=arguments.logging_steps,
        logging_nan_inf_filter=False,
        save_steps=arguments.save_steps,
        save_total_limit=arguments.save_total_limit,
        eval_strategy="epoch" if validation is not None else "no",
        train_sampling_strategy="group_by_length",
        length_column_name="length",
        seed=arguments.seed,
        disable_tqdm=True,
        report_to="none",
        **precision,
    )
    trainer = Trainer(
        model=model,
        args=settings,
        train_dataset=dataset,
        eval_dataset=validation,
        data_collator=Collator(finishing.base.tokenizer.pad_id),
        callbacks=[_Progress(), finishing],
    )
    trainer.remove_callback(PrinterCallback)  # it writes to stdout
    return trainer


class _Finishing(TrainerCallback):
    """Makes every saved folder a complete checkpoint: vocabulary, prompt format, manifest with the run's origin."""

    def __init__(self, base: NativeCheckpoint, encoder: RowEncoder, arguments: TrainArguments) -> None:
        self.base = base
        self.encoder = encoder
        self.origin = {
            "made_by": "glm train",
            "base": base.folder.resolve().name,
            "base_provenance": _provenance(base.folder),
            "columns": asdict(arguments.columns),
            "max_source_length": arguments.max_source_length,
            "max_target_length": arguments.max_target_length,
        }

    def on_save(self, args, state, control, **kwargs) -> None:
        self.complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def complete(self, folder: Path) -> None:
        """Add what the Trainer does not save, then describe all model files in the manifest."""
        native.copy_vocabulary(self.base.folder, folder)
        native.write_settings(
            folder, self.base.shape, _dtype_name(open_tensors(folder)), self.base.tokenizer, self.encoder.prompt_format
        )
        files = native.model_files(folder)
        for file in files:
            file.chmod(0o644)
        write_manifest(folder, self.origin, files)


class _Progress(TrainerCallback):
    """A bar on stderr, the numbers as log lines, and an end to a run whose numbers broke."""

    bar: tqdm

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.bar = tqdm(total=state.max_steps, desc="train", unit="step", disable=None)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        numbers = {
            name: value
            for name, value in (logs or {}).items()
            if name in ("loss", "eval_loss", "train_loss", "learning_rate")
        }
        if not numbers:
            return
        for name in ("loss", "eval_loss", "train_loss"):  # train_loss: the mean of all steps, at the end
            if not math.isfinite(numbers.get(name, 0.0)):
                raise UserError(
                    f"the {name} at step {state.global_step} is {numbers[name]}",
                    "lower --learning-rate, and prefer --bf16 or float32 to --fp16",
                )
        with tqdm.external_write_mode():
            logger.info(
                "step %d: %s", state.global_step, ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
            )

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.bar.close()


def _provenance(folder: Path) -> dict:
    return read_manifest(folder)["provenance"] if (folder / "manifest.json").is_file() else {}


def _dtype_name(files: TensorFiles) -> str:
    return str(next(iter(files.tensors.values())).dtype).removeprefix("torch.")
