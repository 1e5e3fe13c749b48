"""The flags of `glm train`, as the ChatGLM scripts name them, and the run that they tell."""

import argparse
from dataclasses import fields
from pathlib import Path

from entrypoints.dataset.columns import Columns
from entrypoints.errors import UserError
from entrypoints.prompt import TEMPLATES
from entrypoints.settings import DEVICES
from entrypoints.training.arguments import (
    LEARNING_RATES,
    LORA_TARGETS,
    METHODS,
    PRE_SEQ_LEN,
    PRESETS,
    TrainArguments,
    as_flag,
)

STARTED = "started-by-glm"  # a process that torchrun started for this command, which waits for it
OF_METHODS = {  # flags that the other methods have no use for
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
    data = parser.add_argument_group("data")
    data.add_argument(
        "--train-file",
        type=Path,
        nargs="+",
        required=True,
        help="rows to learn: JSON lines, an array or objects; one file or more",
    )
    data.add_argument(
        "--validation-file", type=Path, help="rows whose loss is logged at the start and after each epoch"
    )
    data.add_argument(
        "--test-file", type=Path, help="rows to answer and score at the end (with --predict-with-generate)"
    )
    data.add_argument("--prompt-column", default="content", help="column of the question")
    data.add_argument("--response-column", default="summary", help="column of the answer")
    data.add_argument("--history-column", help="column of earlier [question, answer] pairs")
    data.add_argument(
        "--conversations-column", help="in place of the three: column of messages, with tools, as the API takes them"
    )
    data.add_argument("--max-skipped", type=int, help="refuse when more rows than this cannot be used")
    data.add_argument("--encoding", default="utf-8", help="of the files; gb18030 for GBK")
    data.add_argument("--template", choices=TEMPLATES, help="prompt format to teach; the base model's if not given")
    data.add_argument("--source-prefix", help="text in front of each question, kept with the checkpoint")
    data.add_argument("--max-source-length", type=int, default=512, help="most tokens of a prompt, frame included")
    data.add_argument("--max-target-length", type=int, default=512, help="most tokens of an answer, end token excluded")
    data.add_argument(
        "--packing", action="store_true", help="several rows in one of full length, none of which sees another"
    )
    data.add_argument("--max-train-samples", type=int, help="use only the first rows")
    data.add_argument("--preprocessing-num-workers", type=int, default=1, help="processes that encode rows")
    data.add_argument("--overwrite-cache", action="store_true", help="accepted; changed rows are always encoded anew")
    _add_method_arguments(parser)
    _add_run_arguments(parser)
    _add_optimizer_arguments(parser)


def _add_method_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("method")
    group.add_argument("--method", choices=METHODS, default="full", help="what is trained; --pre-seq-len means ptuning")
    group.add_argument("--lora-rank", type=int, default=8, help="of the two matrices of each LoRA")
    group.add_argument("--lora-alpha", type=int, default=32, help="a LoRA counts alpha / rank times")
    group.add_argument("--lora-dropout", type=float, default=0.1, help="share of a LoRA's input left out at random")
    group.add_argument("--lora-target", choices=LORA_TARGETS, default="attention", help="layers that get a LoRA")
    group.add_argument("--pre-seq-len", type=int, help=f"places of a P-Tuning v2 prefix, {PRE_SEQ_LEN} if not given")
    group.add_argument("--prefix-projection", action="store_true", help="learn the prefix through an MLP")
    group.add_argument("--freeze-layers", type=int, default=4, help="with freeze: how many last layers are trained")
    group.add_argument(
        "--quantization-bit", type=int, choices=(4, 8), help="hold the base of an adapter in so many bits (CUDA)"
    )


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--model-name-or-path", type=Path, help="converted checkpoint; overrides MODEL_PATH")
    group.add_argument("--output-dir", type=Path, required=True, help="folder for the tuned checkpoint")
    group.add_argument(
        "--overwrite-output-dir", action="store_true", help="replace the checkpoints in a folder that is not empty"
    )
    group.add_argument("--do-train", action="store_true", help="accepted; training is what this job does")
    group.add_argument(
        "--predict-with-generate", action="store_true", help="answer and score --test-file with the tuned model"
    )
    group.add_argument("--logging-steps", type=int, default=10, help="steps between log lines")
    group.add_argument("--save-steps", type=int, default=500, help="steps between checkpoints")
    group.add_argument("--save-total-limit", type=int, help="keep only so many checkpoints, the newest")
    group.add_argument("--seed", type=int, default=42, help="of the order of rows and of dropout")
    group.add_argument("--num-gpus", type=int, help="processes to start on this machine, one for each GPU")
    group.add_argument("--num-processes", type=int, help="processes to start on this machine, without GPUs too")
    group.add_argument("--deepspeed", metavar="PRESET|FILE", help=f"{', '.join(PRESETS)}, or a DeepSpeed configuration")
    group.add_argument("--dry-run", action="store_true", help="print what memory the run needs and how it starts")
    group.add_argument("--local-rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    group.add_argument(f"--{STARTED}", action="store_true", help=argparse.SUPPRESS)
    group.add_argument("--device", choices=DEVICES, help="overrides DEVICE")
    group.add_argument("--resume", metavar="auto|DIR", help="go on from the newest complete checkpoint, or from DIR")


def _add_optimizer_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimizer")
    rates = ", ".join(f"{name} {rate:g}" for name, rate in LEARNING_RATES.items())
    group.add_argument("--learning-rate", type=float, help=f"at its highest; if not given: {rates}")
    group.add_argument(
        "--lr-scheduler-type", choices=("linear", "cosine", "constant"), default="linear", help="its course"
    )
    group.add_argument("--warmup-steps", type=int, default=0, help="steps until it is at its highest")
    group.add_argument("--weight-decay", type=float, default=0.0, help="of AdamW")
    group.add_argument("--num-train-epochs", type=float, default=3.0, help="passes over the rows")
    group.add_argument("--max-steps", type=int, help="optimizer steps; overrides the epochs")
    group.add_argument("--per-device-train-batch-size", type=int, default=4, help="rows at once")
    group.add_argument("--per-device-eval-batch-size", type=int, default=4, help="rows at once when scoring")
    group.add_argument("--gradient-accumulation-steps", type=int, default=1, help="batches for one step")
    group.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    group.add_argument("--fp16", action="store_true", help="compute in float16 (CUDA)")
    group.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, help="compute in bfloat16; if not said: where a GPU has it"
    )
    group.add_argument("--label-smoothing", type=float, default=0.0, help="share of the label given to all tokens")
    group.add_argument("--neftune-noise-alpha", type=float, help="noise on the embeddings while training; 5 is usual")
    group.add_argument("--max-broken-steps", type=int, default=3, help="end after so many steps that taught nothing")


def from_flags(args: argparse.Namespace, model: Path, columns: Columns, device: str) -> TrainArguments:
    """What the flags tell of a run; raises UserError for what cannot work. `device` is that of no flag."""
    given = {field.name: getattr(args, field.name) for field in fields(TrainArguments) if hasattr(args, field.name)}
    by_prefix = args.pre_seq_len is not None and args.method == "full"  # the tutorial has no other word for it
    method = "ptuning" if by_prefix else args.method
    _refuse_idle(given, method)
    return TrainArguments(
        **{
            **given,
            "model_name_or_path": model,
            "train_file": tuple(args.train_file),
            "method": method,
            "columns": columns,
            "device": args.device or device,
        }
    )


def _refuse_idle(given: dict, method: str) -> None:
    """Raise UserError for a flag of another method: who gives it expects that method."""
    usual = {field.name: field.default for field in fields(TrainArguments)}
    for name, methods in OF_METHODS.items():
        if given[name] != usual[name] and method not in methods:
            told = f"{as_flag(name)} belongs to --method {' or '.join(methods)}, and the method is {method}"
            raise UserError(told, f"add --method {methods[0]}, or leave {as_flag(name)} out")
