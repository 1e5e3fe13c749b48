"""Answers to held-out rows, written down as they come, then scored."""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from entrypoints import scoring
from entrypoints.answer import read_answer
from entrypoints.dataset.reading import Example
from entrypoints.engines.base import Engine
from entrypoints.errors import UserError
from entrypoints.sampling import Sampling

logger = logging.getLogger(__name__)
PREDICTIONS_FILE = "generated_predictions.jsonl"
SCORES_FILE = "predict_results.json"


@dataclass(frozen=True)
class Prediction:
    """One answer beside its reference; `index` and `line` are the row's place in its file."""

    index: int
    line: int
    prompt: str
    reference: str
    prediction: str


def predict(
    engine: Engine, rows: Sequence[Example], sampling: Sampling, max_source_length: int, batch_size: int
) -> Iterator[Prediction]:
    """Answer all rows in batches of like length, asked as in training; the order is that of the batches."""
    prompts = [(row, _prompt(engine, row, max_source_length)) for row in rows]
    prompts.sort(key=lambda pair: len(pair[1]))
    if prompts and (longest := len(prompts[-1][1])) >= engine.window:  # now, not at the last batch
        raise UserError(
            f"the longest prompt has {longest} tokens, the model's window is {engine.window}",
            "lower --max-source-length",
        )
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        for (row, _), ids in zip(batch, engine.generate_batch([ids for _, ids in batch], sampling), strict=True):
            answer = read_answer(ids, engine.tokenizer).content
            yield Prediction(row.index, row.line, row.prompt, row.response, answer)


def evaluate(predictions: Iterable[Prediction], output: Path, bleu_tokens: str = "characters") -> scoring.Scores:
    """Write each prediction as it comes, put them in the file's order at the end, then score and write the scores."""
    make_folder(output)
    file, found = output / PREDICTIONS_FILE, []
    with file.open("w", encoding="utf-8", errors="backslashreplace") as stream:  # half an emoji, as JSON writes it
        for prediction in predictions:
            found.append(prediction)
            stream.write(_line(prediction))
            stream.flush()
    found.sort(key=lambda prediction: prediction.index)
    text = "".join(_line(prediction) for prediction in found)
    file.write_text(text, encoding="utf-8", errors="backslashreplace")
    scores = scoring.score([row.prediction for row in found], [row.reference for row in found], bleu_tokens)
    (output / SCORES_FILE).write_text(
        json.dumps(scores.as_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return scores


def make_folder(output: Path) -> None:
    """Make the folder for answers and scores; raises UserError when it cannot be made."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make --output-dir {output} ({error.strerror})", "choose another folder") from error


def _prompt(engine: Engine, row: Example, max_source_length: int) -> list[int]:
    turns, _ = engine.prompt_format.cut(row.messages()[:-1], engine.tokenizer, max_source_length)
    return engine.prompt_format.encode(turns, engine.tokenizer)


def _line(prediction: Prediction) -> str:
    return json.dumps(asdict(prediction), ensure_ascii=False) + "\n"
