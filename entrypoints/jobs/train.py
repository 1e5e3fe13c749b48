"""Fine-tune a converted checkpoint on prompt/response rows, in full or as an adapter; flags as in the ChatGLM scripts.

Flags may be written with dashes or underscores. The result in --output-dir is a complete checkpoint for glm chat, or
with --method lora, qlora or ptuning an adapter for its --adapter.
"""

import argparse
import logging
import os
from dataclasses import replace
from pathlib import Path

from entrypoints.errors import UserError
from entrypoints.prompt import PromptFormat
from entrypoints.settings import Settings
from entrypoints.training.flags import STARTED, add_arguments, from_flags  # noqa: F401 - add_arguments is the command's

logger = logging.getLogger(__name__)
REPORTED = 3  # test rows whose answers stand in the report, before and after
ASKED = ("你好", "介绍一下你自己。")  # and, in front of them, the same in every run: what was lost shows here


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Train, prove that the saved folder answers, score --test-file if asked, print the folder."""
    if args.predict_with_generate and not args.test_file:
        raise UserError("--predict-with-generate has no rows to answer", "add --test-file FILE")
    model = args.model_name_or_path or settings.model_path
    if not model:
        raise UserError("no model is named", "add --model-name-or-path DIR or set MODEL_PATH")
    from entrypoints.dataset.reading import Columns
    from entrypoints.training import early

    columns = Columns(args.prompt_column, args.response_column, args.history_column, args.conversations_column)
    tests = _tests(args, columns)
    arguments = from_flags(args, Path(model), columns, settings.device)
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
    preflight.check(arguments, layout)
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


def _tests(args: argparse.Namespace, columns: object) -> list:
    from entrypoints.dataset.reading import examples, read_rows

    if not args.test_file:
        return []
    rows, skipped = examples(read_rows(args.test_file, args.encoding), columns)
    if skipped:
        told = f"the first in line {skipped[0].line}: {skipped[0].reason}"
        logger.warning("%s: %d rows to answer, %d skipped, %s", args.test_file, len(rows), len(skipped), told)
    return rows


def _take_part(arguments: object, args: argparse.Namespace, tests: list) -> None:
    """One process of several; the one that started them proves the result, or rank 0 where torchrun was called."""
    from entrypoints.training import launch, preflight
    from entrypoints.training.trainer import train

    launch.end_with_launcher()
    preflight.refuse_small_shared_memory(launch.beside(os.environ))
    if not args.started_by_glm:
        preflight.check_joined(arguments, os.environ)
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
    launch.leave()


def _dry_run(arguments: object, layout: object, words: list[str]) -> None:
    """The memory table of this run and of what could be changed, and the launch line; nothing is written."""
    from entrypoints.engines.machine import available_memory
    from entrypoints.training import preflight

    plan = preflight.plan(arguments, layout)
    print(preflight.table(plan, preflight.free_of_each_gpu(preflight.usable_gpus(arguments)), available_memory()))
    line = [word for word in words if word != "--dry-run"]
    print(" ".join(["torchrun", *layout.torchrun_words(), "-m", "entrypoints", "train", *line]))


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
    return _answers(engine, args, tests)


def _answers(engine: object, args: argparse.Namespace, tests: list) -> list[str]:
    """To the report's questions, in their order."""
    found = _predictions(engine, args, _reported(tests))
    return [row.prediction for row in sorted(found, key=lambda row: row.index)]


def _reported(tests: list) -> list:
    asked = [
        replace(tests[0], index=number - len(ASKED), prompt=text, history=[], turns=[])
        for number, text in enumerate(ASKED)
    ]
    return [*asked, *tests[:REPORTED]]


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
    questions = [row.prompt for row in _reported(tests)] if before else []
    after = _answers(engine, args, tests) if before else []
    report.write(arguments, questions, before or [], after, scores.as_dict())


def _engine(arguments: object, tuned: bool) -> object:
    from entrypoints.engines.transformers_engine import TransformersEngine

    whole = tuned and not arguments.makes_adapter
    model = arguments.output_dir if whole else arguments.model_name_or_path
    adapter = arguments.output_dir if tuned and arguments.makes_adapter else None
    in_bits = f"{arguments.base_bits}bit" if arguments.base_bits else None  # where it could be trained, it fits
    return TransformersEngine.load(model, adapter, device=arguments.device, load_in=in_bits)


def _predictions(engine: object, args: argparse.Namespace, rows: list) -> object:
    from entrypoints import evaluation
    from entrypoints.sampling import Sampling

    sampling = Sampling(max_new_tokens=args.max_target_length, temperature=0)
    return evaluation.predict(engine, rows, sampling, args.max_source_length, args.per_device_eval_batch_size)
