"""Fine-tune a converted checkpoint on your rows, in full or as an adapter; flags as in the ChatGLM scripts.

Flags may be written with dashes or underscores. The result in --output-dir is a complete checkpoint for glm chat, or
with --method lora, qlora or ptuning an adapter for its --adapter.
"""

import argparse
import os

from entrypoints.errors import UserError
from entrypoints.settings import Settings
from entrypoints.training.flags import add_arguments, is_evaluation_only, parse_train_arguments

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Train, and print the output folder."""
    from entrypoints.training import launch, session

    arguments = parse_train_arguments(args, settings)
    if is_evaluation_only(args):
        from entrypoints.training.result import evaluation_run

        if launch.writes_output(os.environ):
            print(evaluation_run.evaluate(arguments, evaluation_run.Parts.of_flags(args)))
        return
    if args.do_eval and arguments.validation_file is None:
        raise UserError("--do-eval needs validation rows", "add --validation-file FILE")
    if launch.is_worker(os.environ):
        output_dir = session.join_as_worker(arguments, args.started_by_glm)
    elif args.gpu_memory:
        from entrypoints.hardware.cards import parse_card
        from entrypoints.training.preflight import planning

        print(planning.plan_run(arguments, parse_card(args.gpu_memory), os.environ, args.words))
        return
    elif args.dry_run:
        print(session.dry_run(arguments, args.words))
        return
    else:
        output_dir = session.fine_tune(arguments, args.words)
    if output_dir:
        print(output_dir)
    launch.exit_worker()
