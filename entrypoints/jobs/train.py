"""Fine-tune all parameters of a converted checkpoint on prompt/response rows; flags as in the ChatGLM scripts.

Flags may be written with dashes or underscores. The result in --output-dir is a complete checkpoint for glm chat.
"""

import argparse
import logging
from pathlib import Path

from entrypoints.errors import UserError
from entrypoints.prompt import TEMPLATES
from entrypoints.settings import DEVICES, Settings

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `glm train`; their defaults are those of `TrainArguments`."""
    data = parser.add_argument_group("data")
    data.add_argument("--train-file", type=Path, required=True, help="rows to learn: JSON lines, an array or objects")
    data.add_argument("--validation-file", type=Path, help="rows whose loss is logged after each epoch")
    data.add_argument(
        "--test-file", type=Path, help="rows to answer and score at the end (with --predict-with-generate)"
    )
    data.add_argument("--prompt-column", default="content", help="column of the question")
    data.add_argument("--response-column", default="summary", help="column of the answer")
    data.add_argument("--history-column", help="column of earlier [question, answer] pairs")
    data.add_argument("--encoding", default="utf-8", help="of the files; gb18030 for GBK")
    data.add_argument("--template", choices=TEMPLATES, help="prompt format to teach; the base model's if not given")
    data.add_argument("--source-prefix", help="text in front of each question, kept with the checkpoint")
    data.add_argument("--max-source-length", type=int, default=512, help="most tokens of a prompt, frame included")
    data.add_argument("--max-target-length", type=int, default=512, help="most tokens of an answer, end token excluded")
    data.add_argument("--max-train-samples", type=int, help="use only the first rows")
    data.add_argument("--preprocessing-num-workers", type=int, default=1, help="processes that encode rows")
    data.add_argument("--overwrite-cache", action="store_true", help="accepted; rows are encoded anew in every run")
    _add_run_arguments(parser)
    _add_optimizer_arguments(parser)


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
    group.add_argument("--device", choices=DEVICES, help="overrides DEVICE")
    group.add_argument(
        "--quantization-bit", type=int, choices=(4, 8), help="refused: quantised weights cannot be tuned in full"
    )


def _add_optimizer_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimizer")
    group.add_argument("--learning-rate", type=float, default=5e-5, help="at its highest")
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
    group.add_argument("--bf16", action="store_true", help="compute in bfloat16")


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Train, prove that the saved folder answers, score --test-file if asked, print the folder."""
    if args.quantization_bit:
        raise UserError(
            f"--quantization-bit {args.quantization_bit}: int{args.quantization_bit} weights cannot be tuned in full",
            "leave it out and name an unquantised checkpoint",
        )
    if args.predict_with_generate and not args.test_file:
        raise UserError("--predict-with-generate has no rows to answer", "add --test-file FILE")
    model = args.model_name_or_path or settings.model_path
    if not model:
        raise UserError("no model is named", "add --model-name-or-path DIR or set MODEL_PATH")
    from entrypoints.dataset.reading import Columns, examples, read_rows

    columns = Columns(args.prompt_column, args.response_column, args.history_column)
    tests, _ = examples(read_rows(args.test_file, args.encoding), columns) if args.test_file else ([], [])
    arguments = _arguments(args, Path(model), columns, settings)
    from entrypoints.training.trainer import train

    _prove(train(arguments), args, tests)
    print(args.output_dir)


def _arguments(args: argparse.Namespace, model: Path, columns: object, settings: Settings) -> object:
    from dataclasses import fields

    from entrypoints.checkpoint.native import read_prompt_format
    from entrypoints.training.arguments import TrainArguments

    given = {field.name: getattr(args, field.name) for field in fields(TrainArguments) if hasattr(args, field.name)}
    taught = read_prompt_format(model)
    prompt_format = type(taught)(
        args.template or taught.template, taught.source_prefix if args.source_prefix is None else args.source_prefix
    )
    return TrainArguments(
        **{
            **given,
            "model_name_or_path": model,
            "columns": columns,
            "prompt_format": prompt_format,
            "device": args.device or settings.device,
        }
    )


def _prove(folder: Path, args: argparse.Namespace, tests: list) -> None:
    """The saved folder alone must load and answer; then the test rows, if scores are asked for."""
    from entrypoints import evaluation, scoring
    from entrypoints.conversation import Chat
    from entrypoints.engines.transformers_engine import TransformersEngine
    from entrypoints.sampling import Sampling

    engine = TransformersEngine.load(folder, device=args.device or "auto")
    Chat(engine).chat("你好", max_new_tokens=1, temperature=0)
    logger.info("%s loads and answers", folder)
    if args.predict_with_generate:
        scoring.self_test()
        sampling = Sampling(max_new_tokens=args.max_target_length, temperature=0)
        predictions = evaluation.predict(
            engine, tests, sampling, args.max_source_length, args.per_device_eval_batch_size
        )
        scores = evaluation.evaluate(predictions, folder)
        logger.info("scores of %s: %s", args.test_file, scores.as_dict())
