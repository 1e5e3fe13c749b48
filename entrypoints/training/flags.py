"""The flags of `glm train`, named as in the public ChatGLM scripts, and the TrainArguments parsed from them."""

import argparse
import logging
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from entrypoints.chat_format.prompt import TEMPLATES
from entrypoints.dataset.columns import add_column_flags, add_max_skipped_flag, columns_of_flags
from entrypoints.errors import UserError
from entrypoints.settings import DEVICES, Settings
from entrypoints.training.arguments import (
    DEFAULT_PREFIX_LENGTH,
    LEARNING_RATES,
    LORA_TARGETS,
    METHODS,
    OBJECTIVES,
    PRESETS,
    TrainArguments,
    flag_name,
)
from entrypoints.training.methods.continued_adapter import apply_shape

logger = logging.getLogger(__name__)
STARTED_BY_GLM_FLAG = "started-by-glm"  # set for workers that `glm train` started with torchrun
METHOD_FLAGS = {  # flags that only these methods use
    "lora_rank": ("lora", "qlora"),
    "lora_alpha": ("lora", "qlora"),
    "lora_dropout": ("lora", "qlora"),
    "lora_target": ("lora", "qlora"),
    "pre_seq_len": ("ptuning",),
    "prefix_projection": ("ptuning",),
    "freeze_layers": ("freeze",),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `glm train`; their defaults are those of `TrainArguments`."""
    _add_data_arguments(parser)
    _add_method_arguments(parser)
    _add_run_arguments(parser)
    _add_optimizer_arguments(parser)


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--train-file",
        type=Path,
        nargs="+",
        help="training rows in JSON, CSV, Parquet or Arrow; one or more files, folders or globs",
    )
    group.add_argument(
        "--validation-file", type=Path, help="rows for the loss at the start, after each epoch and at each save"
    )
    group.add_argument("--test-file", type=Path, help="rows to answer and score at the end (--predict-with-generate)")
    add_column_flags(group)
    add_max_skipped_flag(group, 0)
    group.add_argument("--template", choices=TEMPLATES, help="prompt format to train; default: that of the base model")
    group.add_argument("--source-prefix", help="text in front of each question; stored with the checkpoint")
    group.add_argument("--max-source-length", type=int, default=512, help="maximum tokens of a prompt with role tags")
    group.add_argument(
        "--max-target-length", type=int, default=512, help="maximum tokens of an answer without its end token"
    )
    group.add_argument(
        "--packing", action="store_true", help="join rows to full-length sequences with attention isolated between rows"
    )
    group.add_argument(
        "--mix", metavar="FILE:SHARE", help="mix in general rows of FILE, as SHARE (such as 0.1) of all rows"
    )
    group.add_argument("--max-train-samples", type=int, help="use only the first rows")
    group.add_argument("--preprocessing-num-workers", type=int, default=1, help="processes that encode rows")
    group.add_argument("--overwrite-cache", action="store_true", help="accepted; changed rows are always encoded again")


def _add_method_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("method")
    group.add_argument("--method", choices=METHODS, default="full", help="what to train; --pre-seq-len implies ptuning")
    group.add_argument(
        "--objective", choices=OBJECTIVES, default="sft", help="sft: learn the answers; dpo: prefer chosen to rejected"
    )
    group.add_argument("--dpo-beta", type=float, default=0.1, help="with dpo: how near the model stays to its base")
    group.add_argument(
        "--rejected-column", help="with dpo: column with the worse answer (rejected); --response-column: the better one"
    )
    group.add_argument("--lora-rank", type=int, default=8, help="rank of the LoRA matrices")
    group.add_argument("--lora-alpha", type=int, default=32, help="LoRA scale: alpha / rank")
    group.add_argument("--lora-dropout", type=float, default=0.1, help="dropout of the LoRA input")
    group.add_argument("--lora-target", choices=LORA_TARGETS, default="attention", help="layers that get a LoRA")
    group.add_argument(
        "--pre-seq-len", type=int, help=f"length of the P-Tuning v2 prefix; default: {DEFAULT_PREFIX_LENGTH}"
    )
    group.add_argument("--prefix-projection", action="store_true", help="train the prefix through an MLP")
    group.add_argument("--freeze-layers", type=int, default=4, help="with freeze: number of last layers to train")
    group.add_argument(
        "--adapter",
        "--ptuning-checkpoint",
        type=Path,
        help="LoRA or prefix to continue on its base model; sets its shape",
    )
    group.add_argument(
        "--quantization-bit", type=int, choices=(4, 8), help="quantize the base model of an adapter (not on MPS)"
    )


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--model-name-or-path", type=Path, help="converted checkpoint; overrides MODEL_PATH")
    group.add_argument("--output-dir", type=Path, help="folder for the result; required to train")
    group.add_argument(
        "--overwrite-output-dir", action="store_true", help="replace the checkpoints in a folder that is not empty"
    )
    group.add_argument("--do-train", action="store_true", help="train; the default without one of the next two")
    group.add_argument("--do-eval", action="store_true", help="loss of --validation-file, after the training or alone")
    group.add_argument("--do-predict", action="store_true", help="answer and score --test-file, after it or alone")
    group.add_argument(
        "--predict-with-generate", action="store_true", help="answer and score --test-file with the fine-tuned model"
    )
    _add_step_arguments(group)
    group.add_argument("--seed", type=int, default=42, help="seed of new weights, row order and dropout")
    group.add_argument("--num-gpus", type=int, help="processes to start on this node, one for each GPU; 0: on CPUs")
    group.add_argument("--num-processes", type=int, help="processes to start on this node, also without GPUs")
    group.add_argument("--deepspeed", metavar="PRESET|FILE", help=f"{', '.join(PRESETS)}, or a DeepSpeed configuration")
    group.add_argument(
        "--dry-run", action="store_true", help="print the memory estimate and the torchrun command; write nothing"
    )
    group.add_argument(
        "--gpu-memory",
        metavar="GB|CARD",
        help="with --dry-run: plan for GPUs of so many GB, such as 24, or for a card, such as L20; the model may be a "
        "name or a folder with only config.json, and no other flag is needed",
    )
    group.add_argument("--local-rank", help=argparse.SUPPRESS)  # added by the deepspeed launcher
    group.add_argument(f"--{STARTED_BY_GLM_FLAG}", action="store_true", help=argparse.SUPPRESS)
    group.add_argument("--device", choices=DEVICES, help="overrides DEVICE")
    group.add_argument("--resume", metavar="auto|DIR", help="resume from the newest complete checkpoint, or from DIR")


def _add_step_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--logging-steps", type=int, default=10, help="steps between log lines")
    group.add_argument("--save-steps", type=int, default=500, help="steps between checkpoints")
    group.add_argument(
        "--save-total-limit",
        type=int,
        help="number of checkpoints to keep: the newest ones and the one of the lowest validation loss",
    )
    group.add_argument("--eval-steps", type=int, help="steps between validation losses; default: one after each epoch")
    group.add_argument(
        "--eval-samples",
        type=int,
        metavar="N",
        help="answer the first N validation rows at each evaluation; the training page shows the answers",
    )
    group.add_argument(
        "--load-best",
        action="store_true",
        help="the result is the checkpoint of the lowest validation loss; each new lowest loss saves one",
    )


def _add_optimizer_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimizer")
    rates = ", ".join(f"{name} {rate:g}" for name, rate in LEARNING_RATES.items())
    group.add_argument("--learning-rate", type=float, help=f"peak learning rate; default: {rates}")
    group.add_argument(
        "--lr-scheduler-type", choices=("linear", "cosine", "constant"), default="linear", help="learning rate schedule"
    )
    group.add_argument("--warmup-steps", type=int, default=0, help="steps until the peak learning rate")
    group.add_argument("--warmup-ratio", type=float, default=0.0, help="the same as a share of all steps")
    group.add_argument("--weight-decay", type=float, default=0.0, help="of AdamW")
    group.add_argument("--num-train-epochs", type=float, default=3.0, help="passes over the rows")
    group.add_argument("--max-steps", type=int, help="optimizer steps; overrides the epochs")
    group.add_argument("--per-device-train-batch-size", type=int, default=4, help="rows per batch and process")
    group.add_argument("--per-device-eval-batch-size", type=int, default=4, help="rows per batch for loss and scores")
    group.add_argument("--gradient-accumulation-steps", type=int, default=1, help="batches per optimizer step")
    group.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    group.add_argument("--fp16", action="store_true", help="compute in float16 (CUDA)")
    group.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, help="compute in bfloat16; default: where the GPU supports it"
    )
    group.add_argument(
        "--fp16-full-eval", action="store_true", help="--do-eval and --do-predict alone in float16 (CUDA)"
    )
    group.add_argument("--label-smoothing", type=float, default=0.0, help="share of the label spread over all tokens")
    group.add_argument("--neftune-noise-alpha", type=float, help="noise on the embeddings in training; 5 is usual")
    group.add_argument(
        "--max-broken-steps", type=int, default=3, help="stop after so many consecutive steps with an invalid loss"
    )


def parse_train_arguments(args: argparse.Namespace, settings: Settings) -> TrainArguments:
    """The run that the flags and the environment describe; raises UserError for invalid ones."""
    model = args.model_name_or_path or settings.model_path
    if not model:
        raise UserError("no base model given", "add --model-name-or-path DIR or set MODEL_PATH")
    if args.gpu_memory and not args.dry_run:
        raise UserError("--gpu-memory plans for a GPU that need not exist", "add --dry-run")
    if args.output_dir is None and not args.gpu_memory:
        raise UserError("no output folder is given", "add --output-dir DIR")
    given = {field.name: getattr(args, field.name) for field in fields(TrainArguments) if hasattr(args, field.name)}
    # the public P-Tuning script selects the method by --pre_seq_len alone
    method = "ptuning" if args.pre_seq_len is not None and args.method == "full" else args.method
    given, method = apply_shape(given, method)
    _check_method_flags(given, method)
    given["model_name_or_path"] = Path(model)
    given["train_file"] = () if is_evaluation_only(args) else tuple(args.train_file or ())
    given["predict_with_generate"] = _predicts(args)
    given["method"] = method
    given["output_dir"] = args.output_dir or Path("output")
    given["columns"] = replace(columns_of_flags(args), rejected=args.rejected_column)
    given["device"] = _select_device(args, settings)
    return TrainArguments(**given)


def _select_device(args: argparse.Namespace, settings: Settings) -> str:
    if args.num_gpus != 0:
        return args.device or settings.device
    for flag, value in (("--device", args.device), ("--gpu-memory", args.gpu_memory)):
        if value not in (None, "auto", "cpu"):
            raise UserError(f"--num-gpus 0 trains on CPUs, but {flag} is {value}", f"omit --num-gpus or {flag}")
    return "cpu"


def is_evaluation_only(args: argparse.Namespace) -> bool:
    """Whether the flags ask for an evaluation without training, as the evaluation scripts of ChatGLM do."""
    return (args.do_eval or args.do_predict) and not args.do_train


def _predicts(args: argparse.Namespace) -> bool:
    """Whether test rows are answered after the training.

    The public scripts pass --predict-with-generate to every step; without --do-predict it has no effect there.
    """
    if args.do_train and args.predict_with_generate and not args.do_predict and args.test_file is None:
        logger.warning("--predict-with-generate has no effect without --test-file")
        return False
    return bool(args.predict_with_generate or args.do_predict)


def _check_method_flags(given: dict[str, Any], method: str) -> None:
    """Raise UserError for a flag that the method does not use: the user expects another method."""
    defaults = {field.name: field.default for field in fields(TrainArguments)}
    for name, methods in METHOD_FLAGS.items():
        if given[name] != defaults[name] and method not in methods:
            raise UserError(
                f"{flag_name(name)} belongs to --method {' or '.join(methods)}, but the method is {method}",
                f"add --method {methods[0]}, or omit {flag_name(name)}",
            )
