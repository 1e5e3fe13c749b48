"""Inference around a run: the base model answers before it, the saved result is loaded and scored after it."""

import gc
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from entrypoints.chat_format.prompt import Message
from entrypoints.chat_format.sampling import Sampling
from entrypoints.dataset.reader import Example, examples, read_rows
from entrypoints.engines.options import EngineOptions
from entrypoints.engines.transformers.engine import TransformersEngine
from entrypoints.evaluation import metrics, predict
from entrypoints.evaluation.prompts import PromptEncoding, answerable_rows
from entrypoints.training.arguments import TrainArguments
from entrypoints.training.result.report import Answer, write_reports
from entrypoints.training.run_context import RunContext

logger = logging.getLogger(__name__)
BASE_FOLDER = "base-model"  # in the output folder: answers and scores of the base model
REPORTED_ROWS = 3  # test rows whose answers the report shows, before and after training
CHECKED_ROWS = 2  # test rows that the base model answers before the first step
GENERAL_QUESTIONS = ("你好", "介绍一下你自己。")  # the same in every report: they show what the model has forgotten


def encoding_of_run(run: RunContext) -> PromptEncoding:
    """How test rows are asked around a run: in the format of the base model before it, then in that of the result."""
    formats = (run.base.prompt_format, run.prompt_format)
    limit, context_length = run.arguments.max_source_length, run.base.model_config.context_length
    return PromptEncoding(run.base.tokenizer, tuple(dict.fromkeys(formats)), limit, context_length)


@dataclass(frozen=True)
class RowsToAnswer:
    """The usable rows of --test-file, and how many were skipped."""

    usable: list[Example]
    n_skipped: int = 0


def read_test_rows(arguments: TrainArguments, encoding: PromptEncoding) -> RowsToAnswer:
    """The rows of --test-file, none without one; those that cannot be used are logged.

    If they are to be answered, so are those whose prompts exceed the limits. Raises UserError: more of them than
    --max-skipped, no usable row, a prompt that fills the context window.
    """
    if arguments.test_file is None:
        return RowsToAnswer([])
    file = arguments.test_file
    columns = arguments.columns_of(file)
    rows, skipped = examples(read_rows(file, arguments.encoding), columns, arguments.max_skipped, file)
    if arguments.predict_with_generate:
        rows, skipped = answerable_rows(rows, skipped, encoding, arguments.max_skipped)
    if skipped:
        logger.warning(
            "%s: %d rows to answer, %d skipped, the first in line %d: %s",
            arguments.test_file, len(rows), len(skipped), skipped[0].line, skipped[0].reason,
        )  # fmt: skip
    return RowsToAnswer(rows, len(skipped))


def answer_with_base_model(arguments: TrainArguments, test_rows: RowsToAnswer) -> list[str]:
    """Answer and score two test rows, so that a broken evaluation fails before the first step and not hours later.

    Returns the base model's answers for the report; [] without --predict-with-generate.
    """
    if not arguments.predict_with_generate:
        return []
    engine = _load_engine(arguments, fine_tuned=False)
    found = list(predict_rows(engine, arguments, test_rows.usable[:CHECKED_ROWS]))
    metrics.score([row.prediction for row in found], [row.reference for row in found], "characters")
    logger.info("the base model answers the test rows, and the answers can be scored")
    return _answers(engine, arguments, _report_rows(test_rows.usable))


def check_result(arguments: TrainArguments, test_rows: RowsToAnswer, base_answers: Sequence[str]) -> None:
    """Load the saved result and generate a token; score the test rows if requested; write the reports."""
    engine = _load_engine(arguments, fine_tuned=True)
    prompt = engine.prompt_format.encode([Message("user", GENERAL_QUESTIONS[0])], engine.tokenizer)
    list(engine.generate(prompt, Sampling(max_new_tokens=1, temperature=0)))
    logger.info("%s loads and generates", arguments.output_dir)
    if not arguments.predict_with_generate:
        write_reports(arguments)
        return
    predictions = predict_rows(engine, arguments, test_rows.usable)
    scores = predict.evaluate(predictions, arguments.output_dir, n_skipped=test_rows.n_skipped)
    logger.info("scores of %s: %s", arguments.test_file, scores)
    answers = []
    if base_answers:
        rows = _report_rows(test_rows.usable)
        pairs = zip(rows, base_answers, _answers(engine, arguments, rows), strict=True)
        answers = [Answer(row.prompt, before, after) for row, before, after in pairs]
    engine.close()
    del engine
    write_reports(arguments, answers, [_score_base_model(arguments, test_rows), scores])


def _score_base_model(arguments: TrainArguments, test_rows: RowsToAnswer) -> dict[str, Any]:
    """The scores of the base model on the same rows, beside those of the result; the GPU holds one model at a time."""
    gc.collect()
    torch.cuda.empty_cache()
    folder = arguments.output_dir / BASE_FOLDER
    predict.keep_earlier_results(folder)
    predictions = predict_rows(_load_engine(arguments, fine_tuned=False), arguments, test_rows.usable)
    scores = predict.evaluate(predictions, folder, n_skipped=test_rows.n_skipped)
    logger.info("scores of the base model: %s", scores)
    return scores


def _report_rows(test_rows: Sequence[Example]) -> list[Example]:
    """The general questions, with negative indices to sort them first, and the first test rows."""
    general = [
        replace(test_rows[0], index=number - len(GENERAL_QUESTIONS), prompt=question, history=[], turns=[])
        for number, question in enumerate(GENERAL_QUESTIONS)
    ]
    return [*general, *test_rows[:REPORTED_ROWS]]


def _answers(engine: TransformersEngine, arguments: TrainArguments, rows: Sequence[Example]) -> list[str]:
    """Answers in the order of the rows."""
    found = predict_rows(engine, arguments, rows)
    return [row.prediction for row in sorted(found, key=lambda row: row.index)]


def _load_engine(arguments: TrainArguments, fine_tuned: bool) -> TransformersEngine:
    complete = fine_tuned and not arguments.saves_adapter
    bits = arguments.quantized_bits  # the machine that trained the quantized base may have no memory for more
    return TransformersEngine.load(
        arguments.output_dir if complete else arguments.model_name_or_path,
        EngineOptions(
            adapter=arguments.output_dir if fine_tuned and arguments.saves_adapter else None,
            device=arguments.device,
            load_in=f"{bits}bit" if bits else None,
        ),
    )


def predict_rows(
    engine: TransformersEngine, arguments: TrainArguments, rows: Sequence[Example]
) -> Iterator[predict.Prediction]:
    """Answer rows greedily, with the limits of the run."""
    sampling = Sampling(max_new_tokens=arguments.max_target_length, temperature=0)
    return predict.predict(engine, rows, sampling, arguments.max_source_length, arguments.per_device_eval_batch_size)
