"""Answer the rows of a file with a model, write the answers to disk, and score them with BLEU-4 and ROUGE-1/2/L.

Writes generated_predictions.jsonl, then predict_results.json; prints the scores. An empty answer scores 0.
Both files of an earlier run are kept in --output-dir/earlier-1 (2, 3 and so on). With several --model, each has its own
folder, and one table is printed and written to comparison.md and comparison.html, with the rows that differ most.
"""

import argparse
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrypoints.dataset.columns import Columns, add_column_flags, add_max_skipped_flag, columns_of_flags
from entrypoints.engines.packages import SCORING_PACKAGES, require_packages
from entrypoints.errors import UserError
from entrypoints.file_writing import indented_json
from entrypoints.settings import DEVICES, Settings

if TYPE_CHECKING:
    from entrypoints.chat_format.sampling import Sampling
    from entrypoints.dataset.json_stream import Row
    from entrypoints.dataset.reader import Example
    from entrypoints.engines.base import Engine
    from entrypoints.engines.options import EngineOptions
    from entrypoints.evaluation.predict import Prediction

logger = logging.getLogger(__name__)
DEFAULT_MAX_LENGTH = 512  # tokens, of a prompt and of an answer
MAX_LOGGED_SKIPS = 10  # rows whose prompts do not fit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `glm evaluate`."""
    parser.add_argument(
        "--model",
        type=Path,
        action="append",
        help="converted checkpoint, or a GGUF file; overrides MODEL_PATH. Several are compared; an adapter is "
        "loaded on the first checkpoint",
    )
    parser.add_argument("--adapter", type=Path, help="converted adapter; overrides ADAPTER_PATH")
    parser.add_argument("--test-file", type=Path, required=True, help="rows to answer")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for predictions and scores")
    add_column_flags(parser)
    add_max_skipped_flag(parser, None)
    parser.add_argument(
        "--max-source-length",
        type=int,
        help=f"maximum tokens of a prompt; default: as in training, else {DEFAULT_MAX_LENGTH}",
    )
    parser.add_argument(
        "--max-target-length",
        type=int,
        help=f"maximum tokens of an answer; default: as in training, else {DEFAULT_MAX_LENGTH}",
    )
    parser.add_argument("--max-predict-samples", type=int, help="answer only the first rows")
    parser.add_argument("--per-device-eval-batch-size", type=int, default=8, help="rows per batch")
    parser.add_argument("--bleu-tokens", choices=("characters", "words"), default="characters", help="tokens of BLEU-4")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy decoding")
    parser.add_argument("--top-p", type=float, default=1.0, help="cumulative probability to sample from")
    parser.add_argument("--seed", type=int, default=42, help="for a temperature above 0")
    parser.add_argument("--device", choices=DEVICES, help="overrides DEVICE")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of the weights"
    )


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Check flags, packages, rows and models, then load each model, answer, score, and print scores or comparison.

    Raises UserError for everything that the checks find, before a model is loaded.
    """
    models = args.model or ([Path(settings.model_path)] if settings.model_path else [])
    if not models:
        raise UserError("no model is given", "add --model DIR or set MODEL_PATH")
    if len(models) > 1 and args.adapter:
        raise UserError("--adapter is for one model", "name the adapter with --model, after its base model")
    _check_positive(args)
    require_packages(*SCORING_PACKAGES)
    from entrypoints.dataset.reader import read_rows
    from entrypoints.evaluation import predict

    all_rows = read_rows(args.test_file, args.encoding)
    adapter = args.adapter or (Path(settings.adapter_path) if settings.adapter_path and len(models) == 1 else None)
    candidates = [(models[0], adapter)] if len(models) == 1 else _with_bases(models)
    provenances = [_provenance(adapter or model) for model, adapter in candidates]
    shared = {name: value for one in reversed(provenances) for name, value in one.items()}  # a base model has none
    evaluations = _with_common_rows(
        [
            _check(candidate, {**shared, **own}, args, settings, all_rows)
            for candidate, own in zip(candidates, provenances, strict=True)
        ]
    )
    output: Path = args.output_dir
    predict.require_other_folder(output)
    predict.create_output_folder(output)
    if len(evaluations) == 1:
        scores, _ = _evaluate(evaluations[0], output, args)
        print(indented_json(scores))
        return
    from entrypoints.evaluation.comparison import Evaluated, read_predictions, write_comparison

    evaluated = []
    for name, one in zip(_names(models), evaluations, strict=True):
        logger.info("%s: answering %d rows", name, len(one.rows))
        scores, seconds = _evaluate(one, output / name, args)
        evaluated.append(Evaluated(name, scores, seconds, read_predictions(output / name)))
    print(write_comparison(evaluated, args.test_file, output), end="")
    logger.info("%s has the answers that differ most", output / "comparison.html")


@dataclass(frozen=True)
class _Evaluation:
    """A model that has been checked, and the rows that it is to answer."""

    model: Path
    options: "EngineOptions"
    rows: "list[Example]"
    n_skipped: int
    max_source: int
    sampling: "Sampling"


def _with_bases(models: Sequence[Path]) -> list[tuple[Path, Path | None]]:
    """Each model, or for an adapter the first complete one with it. Raises UserError: there is none."""
    from entrypoints.checkpoint.adapters import is_adapter

    complete = [model for model in models if model.suffix != ".gguf" and not is_adapter(model)]
    found: list[tuple[Path, Path | None]] = []
    for model in models:
        if model.suffix == ".gguf" or not is_adapter(model):
            found.append((model, None))
        elif complete:
            found.append((complete[0], model))
        else:
            raise UserError(f"{model} is an adapter", "also name its base model: --model BASE")
    return found


def _names(models: Sequence[Path]) -> list[str]:
    """A name for each model: that of its folder, or of its file; with a number if two have the same one."""
    folders = {model.resolve().name for model in models if model.suffix != ".gguf"}
    stems = [
        model.stem if model.suffix == ".gguf" and model.stem not in folders else model.resolve().name
        for model in models
    ]
    return [
        stem if stems.count(stem) == 1 else f"{stem}-{stems[: position + 1].count(stem)}"
        for position, stem in enumerate(stems)
    ]


def _check(
    candidate: tuple[Path, Path | None],
    provenance: dict[str, Any],
    args: argparse.Namespace,
    settings: Settings,
    all_rows: "list[Row]",
) -> _Evaluation:
    """candidate: model and adapter. Raises UserError: unusable rows, or a model that cannot be loaded like this."""
    from entrypoints.chat_format.sampling import Sampling
    from entrypoints.dataset.reader import examples
    from entrypoints.engines.loading import check_engine_options
    from entrypoints.evaluation.prompts import PromptEncoding, answerable_rows

    model, adapter = candidate
    columns = _columns(args, provenance, all_rows)
    rows, skipped = examples(all_rows, columns, args.max_skipped, args.test_file)
    options = _engine_options(adapter, args, settings)
    check_engine_options(model, options)
    max_source = args.max_source_length or provenance.get("max_source_length", DEFAULT_MAX_LENGTH)
    max_target = args.max_target_length or provenance.get("max_target_length", DEFAULT_MAX_LENGTH)
    sampling = Sampling(max_new_tokens=max_target, temperature=args.temperature, top_p=args.top_p, seed=args.seed)
    encoding = PromptEncoding.of_model(model, adapter, max_source)
    rows, all_skipped = answerable_rows(rows[: args.max_predict_samples], skipped, encoding, args.max_skipped)
    for row in all_skipped[len(skipped) :][:MAX_LOGGED_SKIPS]:
        logger.warning("%s: skipped %s:%d: %s", model, row.file, row.line, row.reason)
    return _Evaluation(model, options, rows, len(all_skipped), max_source, sampling)


def _with_common_rows(evaluations: Sequence[_Evaluation]) -> list[_Evaluation]:
    """Only the rows that every model can answer, which are compared: a row can be too long in one prompt format."""
    common = set.intersection(*({row.index for row in one.rows} for one in evaluations))
    if not common:
        raise UserError("no row can be answered by all models", "raise --max-source-length")
    return [_with_rows(one, [row for row in one.rows if row.index in common]) for one in evaluations]


def _with_rows(one: _Evaluation, rows: "list[Example]") -> _Evaluation:
    if dropped := len(one.rows) - len(rows):
        logger.warning("%s: %d rows are skipped because another model cannot answer them", one.model, dropped)
    return replace(one, rows=rows, n_skipped=one.n_skipped + dropped)


def _evaluate(one: _Evaluation, output: Path, args: argparse.Namespace) -> tuple[dict[str, Any], float]:
    """Load the model, answer the rows, write answers and scores to the folder.

    Returns the scores, and the seconds of answering without loading and scoring.
    """
    from entrypoints.evaluation import predict

    batch, tokens = args.per_device_eval_batch_size, one.max_source + one.sampling.max_new_tokens
    with closing(_load(one.model, one.options, batch, tokens)) as engine:
        clock: list[float] = []
        answers = predict.predict(engine, one.rows, one.sampling, one.max_source, batch)
        predictions = _show_progress(_timed(answers, clock), len(one.rows))
        earlier = predict.keep_earlier_results(output)
        if earlier:
            logger.info("the results of the run before are kept in %s", earlier)
        return predict.evaluate(predictions, output, args.bleu_tokens, one.n_skipped), sum(clock)


def _timed(predictions: "Iterator[Prediction]", clock: list[float]) -> "Iterator[Prediction]":
    """Append the seconds until the last prediction to `clock`."""
    start = time.monotonic()
    yield from predictions
    clock.append(time.monotonic() - start)


def _show_progress(predictions: "Iterator[Prediction]", total: int) -> "Iterator[Prediction]":
    """A progress bar on a terminal, otherwise a log line at each tenth of the rows; both on stderr."""
    from tqdm import tqdm

    with tqdm(total=total, desc="answers", disable=None) as bar:
        for number, prediction in enumerate(predictions, start=1):
            yield prediction
            bar.update()
            if bar.disable and number * 10 // total > (number - 1) * 10 // total:
                logger.info("%d of %d rows are answered", number, total)


def _engine_options(adapter: Path | str | None, args: argparse.Namespace, settings: Settings) -> "EngineOptions":
    from entrypoints.engines.options import EngineOptions

    device = args.device or settings.device
    return EngineOptions(adapter=Path(adapter) if adapter else None, device=device, dtype=args.dtype)


def _load(model: Path, options: "EngineOptions", slots: int, tokens: int) -> "Engine":
    """tokens: of the longest prompt and answer together, for which llama.cpp allocates a KV cache in each slot."""
    from entrypoints.engines.loading import load_engine, select_engine

    if select_engine(model) == "llamacpp":
        from entrypoints.checkpoint.gguf_reader import open_gguf

        options = replace(options, slots=slots, context_length=min(tokens, open_gguf(model).context_length))
    return load_engine(model, options)


def _check_positive(args: argparse.Namespace) -> None:
    names = ("max_source_length", "max_target_length", "max_predict_samples", "per_device_eval_batch_size")
    problems = [
        f"--{name.replace('_', '-')} {getattr(args, name)} is below 1"
        for name in names
        if getattr(args, name) is not None and getattr(args, name) < 1
    ]
    if problems:
        raise UserError("; ".join(problems), "see glm evaluate --help")


def _provenance(model: Path) -> dict[str, Any]:
    """How the checkpoint or adapter was fine-tuned (columns, lengths), to query it in the same way; {} without one."""
    if not model.exists():  # reported after the rows
        return {}
    if model.suffix == ".gguf":
        import gguf

        from entrypoints.checkpoint.gguf_reader import PROVENANCE_KEY, open_gguf
        from entrypoints.untrusted import parse_json

        open_gguf(model)
        field = gguf.GGUFReader(model).get_field(PROVENANCE_KEY)
        provenance = parse_json(field.contents(), f"{PROVENANCE_KEY} of {model}") if field else {}
        return dict(provenance.get("source_made", {}))
    from entrypoints.checkpoint.manifest import MANIFEST_FILE, read_manifest

    return dict(read_manifest(model)["provenance"]) if (model / MANIFEST_FILE).is_file() else {}


def _columns(args: argparse.Namespace, provenance: dict[str, Any], rows: "list[Row]") -> Columns:
    """The columns of the flags, else those of training, else those of the shape of the rows."""
    from entrypoints.dataset.reader import column_counts

    given = columns_of_flags(args)
    if given.format != "auto" or given.conversations is not None:
        return given
    trained = Columns(**provenance.get("columns", {}))
    if trained.history not in column_counts(rows):
        trained = replace(trained, history=None)  # the training rows had histories, these have none
    return replace(trained, **{name: value for name, value in asdict(given).items() if value not in (None, "auto")})
