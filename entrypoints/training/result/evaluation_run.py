"""`glm train --do_eval` and `--do_predict` without `--do_train`, as in the evaluation scripts of ChatGLM: no training.

The model is --model-name-or-path with --adapter (--ptuning-checkpoint). Nothing of --output-dir is removed.
"""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from entrypoints.chat_format.prompt import IGNORE_INDEX
from entrypoints.dataset.reader import check_rows, examples, read_rows
from entrypoints.dataset.skipped_rows import usable_rows
from entrypoints.engines.options import EngineOptions
from entrypoints.engines.transformers.engine import TransformersEngine
from entrypoints.errors import UserError
from entrypoints.evaluation import predict
from entrypoints.evaluation.prompts import PromptEncoding
from entrypoints.file_writing import write_json
from entrypoints.training.arguments import TrainArguments
from entrypoints.training.methods.precision import resolve_precision
from entrypoints.training.output_files import EVALUATION_FILE
from entrypoints.training.result import checks
from entrypoints.training.rows.collation import Collator, EncodedRow, RowEncoder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """What to evaluate: the loss of validation rows, the answers to test rows; half: in float16."""

    loss: bool
    answers: bool
    half: bool = False

    @classmethod
    def of_flags(cls, args: argparse.Namespace) -> "Parts":
        """Those of --do-eval, --do-predict and --fp16-full-eval."""
        return cls(args.do_eval, args.do_predict, args.fp16_full_eval)


def evaluate(arguments: TrainArguments, parts: Parts) -> Path:
    """Write eval_results.json, and answers with their scores, into the output folder; returns it.

    Raises UserError: a missing file or flag, a model or adapter that cannot be loaded.
    """
    if parts.loss and arguments.validation_file is None:
        raise UserError("--do-eval needs validation rows", "add --validation-file FILE")
    if parts.loss and arguments.objective == "dpo":
        problem = "--do-eval computes the loss of --objective dpo only beside a training"
        raise UserError(problem, "add --do-train, or use --do-predict to answer a --test-file")
    for file in (arguments.validation_file if parts.loss else None, arguments.test_file if parts.answers else None):
        if file is not None:
            check_rows(file, arguments.encoding, arguments.columns_of(file), arguments.max_skipped)
    resolve_precision(arguments)
    encoding = PromptEncoding.of_model(arguments.model_name_or_path, arguments.adapter, arguments.max_source_length)
    encoded = _encode_validation_rows(arguments, encoding) if parts.loss else None
    test_rows = checks.read_test_rows(arguments, encoding) if parts.answers else None
    predict.create_output_folder(arguments.output_dir)
    engine = _load(arguments, parts.half)
    if encoded:
        _write_loss(engine, arguments, *encoded)
    if test_rows:
        if earlier := predict.keep_earlier_results(arguments.output_dir):
            logger.info("the results of the run before are kept in %s", earlier)
        predictions = checks.predict_rows(engine, arguments, test_rows.usable)
        scores = predict.evaluate(predictions, arguments.output_dir, n_skipped=test_rows.n_skipped)
        logger.info("scores of %s: %s", arguments.test_file, scores)
    return arguments.output_dir


def _load(arguments: TrainArguments, half: bool) -> TransformersEngine:
    bits = arguments.quantized_bits
    options = EngineOptions(
        adapter=arguments.adapter,
        device=arguments.device,
        dtype="float16" if half else "auto",
        load_in=f"{bits}bit" if bits else None,
    )
    return TransformersEngine.load(arguments.model_name_or_path, options)


def _encode_validation_rows(arguments: TrainArguments, encoding: PromptEncoding) -> tuple[list[EncodedRow], int]:
    """The rows of --validation-file, and how many were skipped; before the model is loaded."""
    file = arguments.validation_file
    assert file, "checked before"
    columns, limit = arguments.columns_of(file), arguments.max_skipped
    rows, skipped = examples(read_rows(file, arguments.encoding), columns, limit, file)
    limits = arguments.max_source_length, arguments.max_target_length
    encoder = RowEncoder(encoding.tokenizer, encoding.formats[0], *limits)
    encoded, skipped = usable_rows(rows, skipped, encoder.encode_example, limit)
    return encoded, len(skipped)


def _write_loss(
    engine: TransformersEngine, arguments: TrainArguments, encoded: Sequence[EncodedRow], n_skipped: int
) -> None:
    loss = mean_loss(engine, encoded, arguments)
    file = arguments.validation_file
    logger.info("%s: eval_loss %.4f of %d rows, %d skipped", file, loss, len(encoded), n_skipped)
    metrics = {"eval_loss": loss, "eval_samples": len(encoded), "eval_skipped": n_skipped}
    write_json(arguments.output_dir / EVALUATION_FILE, metrics)


@torch.inference_mode()
def mean_loss(engine: TransformersEngine, encoded: Sequence[EncodedRow], arguments: TrainArguments) -> float:
    """The mean loss of a label, over the labels of all rows."""
    collate, size = Collator(engine.tokenizer.pad_id), arguments.per_device_eval_batch_size
    total, labels = 0.0, 0
    for start in range(0, len(encoded), size):
        batch = collate([dict(row) for row in encoded[start : start + size]])
        inputs = {name: batch[name].to(engine.model.device) for name in ("input_ids", "attention_mask")}
        logits = engine.model(**inputs).logits[:, :-1].float()  # (B, T - 1, V)
        following = batch["labels"][:, 1:].to(logits.device)  # (B, T - 1)
        total += float(
            torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), following.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
            )
        )
        labels += int((following != IGNORE_INDEX).sum())
    if not labels:
        raise UserError(f"{arguments.validation_file} has no label to evaluate", "check its response column")
    return total / labels
