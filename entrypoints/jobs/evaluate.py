"""Answer the rows of a file with a model, write the answers down, and score them with BLEU-4 and ROUGE-1/2/L.

Writes generated_predictions.jsonl, then predict_results.json; prints the scores. An empty answer counts as 0.
"""

import argparse
import json
import logging
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from entrypoints.errors import UserError
from entrypoints.settings import DEVICES, Settings

if TYPE_CHECKING:
    from entrypoints.engines.base import Engine

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `glm evaluate`."""
    parser.add_argument("--model", type=Path, help="converted checkpoint, or a GGUF file; overrides MODEL_PATH")
    parser.add_argument("--adapter", type=Path, help="converted adapter; overrides ADAPTER_PATH")
    parser.add_argument("--test-file", type=Path, required=True, help="rows to answer")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for answers and scores")
    parser.add_argument("--prompt-column", help="column of the question; as in training if not given, else content")
    parser.add_argument("--response-column", help="column of the reference; as in training if not given, else summary")
    parser.add_argument("--history-column", help="column of earlier pairs; as in training if not given")
    parser.add_argument("--conversations-column", help="in place of the three: column of messages")
    parser.add_argument("--encoding", default="utf-8", help="of the file; gb18030 for GBK")
    parser.add_argument(
        "--max-source-length", type=int, help="most tokens of a prompt; as in training if not given, else 512"
    )
    parser.add_argument(
        "--max-target-length", type=int, help="most tokens of an answer; as in training if not given, else 512"
    )
    parser.add_argument("--max-predict-samples", type=int, help="answer only the first rows")
    parser.add_argument("--per-device-eval-batch-size", type=int, default=8, help="rows at once")
    parser.add_argument(
        "--bleu-tokens", choices=("characters", "words"), default="characters", help="what BLEU-4 counts"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 always takes the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, help="share of probability to choose from")
    parser.add_argument("--seed", type=int, default=42, help="for a temperature above 0")
    parser.add_argument("--device", choices=DEVICES, help="overrides DEVICE")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of the weights"
    )


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Check the rows, then the scorer, then load the model and answer."""
    model = args.model or settings.model_path
    if not model:
        raise UserError("no model is named", "add --model DIR or set MODEL_PATH")
    _refuse_low_numbers(args)
    from entrypoints import evaluation, scoring
    from entrypoints.dataset.reading import Columns, column_counts, examples, read_rows
    from entrypoints.sampling import Sampling

    adapter = args.adapter or settings.adapter_path or None
    _check_model(Path(model), adapter, args, settings)  # what is wrong with it shows now, not after the rows
    origin = _training_origin(Path(adapter or model))
    file_rows = read_rows(args.test_file, args.encoding)
    columns = Columns(**{**origin.get("columns", {}), **_given_columns(args)})
    if not args.history_column and columns.history not in column_counts(file_rows):
        columns = replace(columns, history=None)  # learnt with histories, but these rows have none
    source = args.max_source_length or origin.get("max_source_length", 512)
    target = args.max_target_length or origin.get("max_target_length", 512)
    rows, skipped = examples(file_rows, columns)
    sampling = Sampling(max_new_tokens=target, temperature=args.temperature, top_p=args.top_p, seed=args.seed)
    evaluation.make_folder(args.output_dir)
    scoring.self_test()
    from tqdm import tqdm

    rows = rows[: args.max_predict_samples]
    with closing(_load(Path(model), adapter, args, settings, source + target)) as engine:
        predictions = evaluation.predict(engine, rows, sampling, source, args.per_device_eval_batch_size)
        scores = evaluation.evaluate(
            tqdm(predictions, total=len(rows), desc="answers", disable=None), args.output_dir, args.bleu_tokens
        )
    print(json.dumps({**scores.as_dict(), "n_skipped": len(skipped)}, ensure_ascii=False, indent=2))


def _check_model(model: Path, adapter: Path | str | None, args: argparse.Namespace, settings: Settings) -> None:
    from entrypoints.engines.loading import check, engine_for

    adapters = {"adapter": Path(adapter)} if adapter else {}
    check(engine_for(model), model, adapters, device=args.device or settings.device, dtype=args.dtype)


def _load(
    model: Path, adapter: Path | str | None, args: argparse.Namespace, settings: Settings, tokens: int
) -> "Engine":
    """tokens: of the longest prompt and answer together, for each of which llama.cpp keeps room."""
    from entrypoints.engines.loading import engine_for

    if engine_for(model) == "llamacpp":
        from entrypoints.checkpoint.gguf import open_gguf
        from entrypoints.engines.llamacpp_engine import LlamaCppEngine

        window = min(tokens, open_gguf(model).window)
        return LlamaCppEngine.load(model, slots=args.per_device_eval_batch_size, window=window)
    from entrypoints.engines.transformers_engine import TransformersEngine

    device = args.device or settings.device
    return TransformersEngine.load(model, Path(adapter) if adapter else None, device, args.dtype)


def _refuse_low_numbers(args: argparse.Namespace) -> None:
    flags = ("max_source_length", "max_target_length", "max_predict_samples", "per_device_eval_batch_size")
    low = [name for name in flags if getattr(args, name) is not None and getattr(args, name) < 1]
    if low:
        given = "; ".join(f"--{name.replace('_', '-')} {getattr(args, name)} is below 1" for name in low)
        raise UserError(given, "see glm evaluate --help")


def _training_origin(model: Path) -> dict:
    """What the checkpoint was tuned with, so that it is asked the same way."""
    if model.suffix == ".gguf":
        import gguf

        from entrypoints.checkpoint.gguf import PROVENANCE_KEY

        field = gguf.GGUFReader(model).get_field(PROVENANCE_KEY)
        return json.loads(field.contents()).get("source_made", {}) if field else {}
    from entrypoints.checkpoint.manifest import MANIFEST_FILE, read_manifest

    return read_manifest(model)["provenance"] if (model / MANIFEST_FILE).is_file() else {}


def _given_columns(args: argparse.Namespace) -> dict:
    given = {"prompt": args.prompt_column, "response": args.response_column, "history": args.history_column}
    given["conversations"] = args.conversations_column
    return {name: column for name, column in given.items() if column is not None}
