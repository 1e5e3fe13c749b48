"""All that can be known before the model is loaded: files, flags, folders and the encoded rows."""

import logging
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset

from entrypoints.checkpoint.files import require_space
from entrypoints.checkpoint.manifest import refuse_other_base
from entrypoints.checkpoint.native import NativeCheckpoint, open_native
from entrypoints.engines.driver import check_driver
from entrypoints.errors import UserError
from entrypoints.prompt import PromptFormat
from entrypoints.training import checkpoints, early, rows, zero
from entrypoints.training.arguments import TrainArguments, as_flag
from entrypoints.training.batches import RowEncoder
from entrypoints.training.checkpoints import Checkpoint
from entrypoints.training.launch import is_main
from entrypoints.training.packing import Packs, packed
from entrypoints.training.result import result_files

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to load its model; every process of it makes the same one."""

    base: NativeCheckpoint
    prompt_format: PromptFormat
    dataset: Dataset | Packs
    validation: Dataset | None
    resumed: Checkpoint | None
    precision: dict  # fp16, bf16, use_cpu, as the Trainer takes them
    deepspeed: dict | None


def prepare(arguments: TrainArguments, processes: int = 1) -> Prepared:
    """Check everything, encode the rows, and clear the output folder last of all.

    processes: of the whole run. Raises UserError for whatever the user can mend.
    """
    computes = precision(arguments)
    deepspeed = zero.configuration(arguments.deepspeed, arguments, computes)
    base = open_native(arguments.model_name_or_path)
    files = list(arguments.train_files)
    early.check_files(arguments)
    early.check_layers(arguments, base.shape)
    prompt_format = arguments.prompt_format or base.prompt_format
    encoder = RowEncoder(base.tokenizer, prompt_format, arguments.max_source_length, arguments.max_target_length)
    if is_main(os.environ):  # the others come when this one may have written already
        _check_output(arguments, base)
    resumed = checkpoints.to_resume(arguments.resume, arguments.output_dir)
    if resumed:
        _check_resumed(resumed, arguments, deepspeed, processes)
    dataset = rows.encoded(files, arguments, encoder, arguments.max_train_samples)
    _check_window(dataset, base, arguments)
    if arguments.packing:
        longest = arguments.max_source_length + arguments.max_target_length + 1
        unpacked, dataset = len(dataset), packed(dataset, min(longest, base.shape.window))
        logger.info("%d rows packed into %d", unpacked, len(dataset))
    validation = rows.encoded([arguments.validation_file], arguments, encoder) if _validates(arguments) else None
    if is_main(os.environ):
        _clear_output(arguments.output_dir, resumed)
    return Prepared(base, prompt_format, dataset, validation, resumed, computes, deepspeed)


def _validates(arguments: TrainArguments) -> bool:
    file = arguments.validation_file
    if file is not None and file.is_file() and file.stat().st_size == 0:
        logger.warning("%s is empty: no evaluation during training", file)
        return False
    return file is not None


def _check_window(dataset: Dataset, base: NativeCheckpoint, arguments: TrainArguments) -> None:
    room = base.shape.window - arguments.prefix_length
    longest = max(dataset["length"])
    if longest > room:
        beside = "" if room == base.shape.window else f", {arguments.prefix_length} of them the prefix"
        raise UserError(
            f"the longest row has {longest} tokens, the model's window is {base.shape.window}{beside}",
            "lower --max-source-length or --max-target-length",
        )


def compute_dtype(precision: dict) -> torch.dtype:
    """What the forward pass computes in."""
    names = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return next((names[name] for name in names if precision[name]), torch.float32)


def precision(arguments: TrainArguments) -> dict:
    """fp16 and bf16, what the forward pass computes in, and use_cpu; what learns stays in float32 in any case.

    Raises UserError for what this machine cannot do.
    """
    if arguments.device in ("auto", "cuda"):
        check_driver()
    cuda = torch.cuda.is_available() and arguments.device in ("auto", "cuda")
    if arguments.device == "cuda" and not cuda:
        raise UserError("--device cuda: this machine has no CUDA device", "use --device auto")
    if arguments.fp16 and not cuda:
        raise UserError("--fp16 needs a CUDA device", "leave it out, or use --bf16")
    if arguments.base_bits and not cuda:
        raise UserError(
            f"a base in {arguments.base_bits} bits needs a CUDA device: bitsandbytes computes there",
            "leave out --quantization-bit, and use --method lora in place of qlora",
        )
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, which accelerate imports, warns otherwise
    if shutil.which("ninja") is None:  # DeepSpeed builds its ops with the one beside this interpreter
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    use_cpu = not cuda and (arguments.device == "cpu" or not torch.backends.mps.is_available())
    has_bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    bf16 = has_bf16 and not arguments.fp16 if arguments.bf16 is None else arguments.bf16
    return {"fp16": arguments.fp16, "bf16": bf16, "use_cpu": use_cpu}


def _check_output(arguments: TrainArguments, base: NativeCheckpoint) -> None:
    early.check_output(arguments)
    folder = arguments.output_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make --output-dir {folder} ({error.strerror})", "choose another folder") from error
    require_space(folder, 0 if arguments.makes_adapter else base.files.size)


def _check_resumed(resumed: Checkpoint, arguments: TrainArguments, deepspeed: dict | None, processes: int) -> None:
    now = {"method": arguments.method, **arguments.shape_of_learnt, "zero_stage": zero.stage(deepspeed)}
    for name, value in now.items():
        made_with = resumed.made_with.get(name, value)  # not every version wrote all of them
        if made_with != value:
            flag = "ZeRO stage" if name == "zero_stage" else as_flag(name)
            raise UserError(
                f"{resumed.folder} was made with {flag} {made_with}, not {value}",
                "go on as it was made, or start without --resume",
            )
    refuse_other_base(resumed.folder, arguments.model_name_or_path)
    if deepspeed and resumed.made_with["processes"] != processes:
        zero.divide_anew(deepspeed, resumed.folder)


def _clear_output(folder: Path, resumed: Checkpoint | None) -> None:
    """Remove an earlier run's results: last of all, when nothing the user can mend stops this run any more."""
    shutil.rmtree(folder / checkpoints.PARTIAL, ignore_errors=True)
    if resumed:
        return
    for old in checkpoints.by_step(folder):
        shutil.rmtree(old)
    for old in result_files(folder):
        old.unlink(missing_ok=True)
