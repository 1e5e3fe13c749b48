"""Fine-tune a converted checkpoint on prompt/response rows, in full or as an adapter; flags as in the ChatGLM scripts.

Flags may be written with dashes or underscores. The result in --output-dir is a complete checkpoint for glm chat, or
with --method lora, qlora or ptuning an adapter for its --adapter.
"""

import argparse
import logging
import os
from dataclasses import fields, replace
from pathlib import Path

from entrypoints.errors import UserError
from entrypoints.prompt import TEMPLATES, PromptFormat
from entrypoints.settings import DEVICES, Settings
from entrypoints.training.arguments import LEARNING_RATES, LORA_TARGETS, METHODS, PRE_SEQ_LEN, PRESETS, TrainArguments

logger = logging.getLogger(__name__)
REPORTED = 3  # test rows whose answers stand in the report, before and after
STARTED = "started-by-glm"  # a process that torchrun started for this command, which waits for it


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
    data.add_argument("--validation-file", type=Path, help="rows whose loss is logged after each epoch")
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


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Train, prove that the saved folder answers, score --test-file if asked, print the folder."""
    if args.predict_with_generate and not args.test_file:
        raise UserError("--predict-with-generate has no rows to answer", "add --test-file FILE")
    model = args.model_name_or_path or settings.model_path
    if not model:
        raise UserError("no model is named", "add --model-name-or-path DIR or set MODEL_PATH")
    from entrypoints.dataset.reading import Columns, examples, read_rows
    from entrypoints.training import early

    columns = Columns(args.prompt_column, args.response_column, args.history_column, args.conversations_column)
    tests, _ = examples(read_rows(args.test_file, args.encoding), columns) if args.test_file else ([], [])
    arguments = _arguments(args, Path(model), columns, settings)
    if not os.environ.get("LOCAL_RANK"):  # a process of a launcher may find what another one has written already
        early.check(arguments)
    arguments = replace(arguments, prompt_format=_prompt_format(args, Path(model)))
    from entrypoints.training import launch, preflight

    if launch.is_worker(os.environ):
        _take_part(arguments, args, tests)
        return
    layout = launch.layout(arguments, os.environ, preflight.usable_gpus(arguments))
    if args.dry_run:
        _dry_run(arguments, layout, args.words)
        return
    _preflight(arguments, layout)
    before = _rehearse(arguments, args, tests) if layout.node_rank == 0 else []
    if layout.processes == 1 and not arguments.deepspeed:  # DeepSpeed runs only where a launcher started it
        from entrypoints.training.trainer import train

        train(arguments)
    else:
        from entrypoints.training.preparation import prepare

        prepare(arguments, layout.processes)  # mistakes show and rows are encoded before a process starts
        launch.start(layout, [*args.words, f"--{STARTED}"])
    if layout.node_rank == 0:
        _prove(arguments, args, tests, before)
        print(args.output_dir)


def _take_part(arguments: object, args: argparse.Namespace, tests: list) -> None:
    """One process of several; the one that started them proves the result, or rank 0 where torchrun was called."""
    from entrypoints.training import launch, preflight
    from entrypoints.training.trainer import train

    launch.end_with_launcher()
    preflight.refuse_small_shared_memory(launch.beside(os.environ))
    main, answers = launch.is_main(os.environ), os.dup(1)
    os.dup2(2, 1)  # DeepSpeed prints
    if not main:
        logging.getLogger().setLevel(logging.ERROR)
    alone = main and not args.started_by_glm
    try:
        before = _rehearse(arguments, args, tests) if alone else []
        train(arguments)
    except UserError as error:
        if args.started_by_glm and launch.report(error, os.environ):
            raise SystemExit(1) from None
        raise
    if alone:
        _prove(arguments, args, tests, before)
        os.write(answers, f"{args.output_dir}\n".encode())


def _preflight(arguments: object, layout: object) -> None:
    from entrypoints.engines.machine import available_memory
    from entrypoints.training import preflight

    gpu, host = preflight.free_of_each_gpu(preflight.usable_gpus(arguments)), available_memory()
    plan = preflight.plan(arguments, layout)
    preflight.refuse_small_shared_memory(layout.per_node)
    preflight.refuse_hopeless(plan, gpu, host)
    need = plan.need()
    logger.info(
        "memory: %.1f GB for each process, %.1f of them for the longest batch; %.1f GB of the host (--dry-run: table)",
        need.total / 1e9, need.activations / 1e9, need.host / 1e9,
    )  # fmt: skip


def _dry_run(arguments: object, layout: object, words: list[str]) -> None:
    """The memory table of this run and of what could be changed, and the launch line; nothing is written."""
    from entrypoints.engines.machine import available_memory
    from entrypoints.training import preflight

    plan = preflight.plan(arguments, layout)
    print(preflight.table(plan, preflight.free_of_each_gpu(preflight.usable_gpus(arguments)), available_memory()))
    line = [word for word in words if word != "--dry-run"]
    print(" ".join(["torchrun", *layout.torchrun_words(), "-m", "entrypoints", "train", *line]))


def _arguments(args: argparse.Namespace, model: Path, columns: object, settings: Settings) -> TrainArguments:
    given = {field.name: getattr(args, field.name) for field in fields(TrainArguments) if hasattr(args, field.name)}
    by_prefix = args.pre_seq_len is not None and args.method == "full"  # the tutorial has no other word for it
    return TrainArguments(
        **{
            **given,
            "model_name_or_path": model,
            "train_file": tuple(args.train_file),
            "method": "ptuning" if by_prefix else args.method,
            "columns": columns,
            "device": args.device or settings.device,
        }
    )


def _prompt_format(args: argparse.Namespace, model: Path) -> PromptFormat:
    from entrypoints.checkpoint.native import read_prompt_format

    taught = read_prompt_format(model)
    prefix = taught.source_prefix if args.source_prefix is None else args.source_prefix
    return PromptFormat(args.template or taught.template, prefix)


def _rehearse(arguments: object, args: argparse.Namespace, tests: list) -> list[str]:
    """Answer and score two test rows with the base model, so that a broken evaluation fails now and not after hours.

    Returns what the base says to the report's questions.
    """
    if not args.predict_with_generate:
        return []
    from entrypoints import scoring

    engine = _engine(arguments, tuned=False)
    scoring.self_test()
    found = list(_predictions(engine, args, tests[:2]))
    scoring.score([row.prediction for row in found], [row.reference for row in found], "characters")
    logger.info("the base model answers, and its answers are scored")
    return [row.prediction for row in _predictions(engine, args, tests[:REPORTED])]


def _prove(arguments: object, args: argparse.Namespace, tests: list, before: list[str] | None = None) -> None:
    """The saved folder must load and answer; then the test rows, if scores are asked for, and the report."""
    from entrypoints import evaluation
    from entrypoints.conversation import Chat
    from entrypoints.training import report

    engine = _engine(arguments, tuned=True)
    Chat(engine).chat("你好", max_new_tokens=1, temperature=0)
    logger.info("%s loads and answers", args.output_dir)
    if not args.predict_with_generate:
        report.write(arguments)
        return
    scores = evaluation.evaluate(_predictions(engine, args, tests), args.output_dir)
    logger.info("scores of %s: %s", args.test_file, scores.as_dict())
    asked = tests[: len(before or [])]
    after = [row.prediction for row in _predictions(engine, args, asked)]
    report.write(arguments, [row.prompt for row in asked], before or [], after, scores.as_dict())


def _engine(arguments: object, tuned: bool) -> object:
    from entrypoints.engines.transformers_engine import TransformersEngine

    whole = tuned and not arguments.makes_adapter
    model = arguments.output_dir if whole else arguments.model_name_or_path
    adapter = arguments.output_dir if tuned and arguments.makes_adapter else None
    return TransformersEngine.load(model, adapter, device=arguments.device)


def _predictions(engine: object, args: argparse.Namespace, rows: list) -> object:
    from entrypoints import evaluation
    from entrypoints.sampling import Sampling

    sampling = Sampling(max_new_tokens=args.max_target_length, temperature=0)
    found = evaluation.predict(engine, rows, sampling, args.max_source_length, args.per_device_eval_batch_size)
    return sorted(found, key=lambda row: row.index) if len(rows) <= REPORTED else found
