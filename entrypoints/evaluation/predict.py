"""Generate answers to test rows, write each one to disk, then score them."""

import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from entrypoints.chat_format.answer_parser import Answer, parse_answer
from entrypoints.chat_format.prompt import Message, split_answer
from entrypoints.chat_format.sampling import Sampling
from entrypoints.chat_format.tool_calls import parse_any_call, write_tool_call
from entrypoints.dataset.reader import Example
from entrypoints.engines.base import Engine
from entrypoints.errors import UserError
from entrypoints.evaluation import metrics
from entrypoints.evaluation.prompts import encode_prompt
from entrypoints.file_writing import write_json

logger = logging.getLogger(__name__)
PREDICTIONS_FILE = "generated_predictions.jsonl"
SCORES_FILE = "predict_results.json"
EARLIER = "earlier"


@dataclass(frozen=True)
class Prediction:
    """An answer and its reference; `index` and `line` are the position of the row in its file."""

    index: int
    line: int
    prompt: str
    reference: str
    prediction: str


def predict(
    engine: Engine, rows: Sequence[Example], sampling: Sampling, max_source_length: int, batch_size: int
) -> Iterator[Prediction]:
    """Answer all rows in batches of similar length, with the prompt format of training; yields batch by batch.

    Raises UserError: a prompt fills the context window; before the first batch, as the longest prompts come last.
    """
    prompts = [(row, encode_prompt(row, engine.prompt_format, engine.tokenizer, max_source_length)) for row in rows]
    prompts.sort(key=lambda pair: len(pair[1]))
    if prompts and (longest := len(prompts[-1][1])) >= engine.context_length:
        raise UserError(
            f"the longest prompt has {longest} tokens, the context length is {engine.context_length}",
            "lower --max-source-length",
        )
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        for (row, _), ids in zip(batch, engine.generate_batch([ids for _, ids in batch], sampling), strict=True):
            before, reference = split_answer(row.messages())
            answer = parse_answer(ids, engine.tokenizer, _tool_names([*before, *reference]))
            yield Prediction(row.index, row.line, row.prompt, _reference_text(reference), _answer_text(answer))


def _tool_names(turns: Sequence[Message]) -> set[str]:
    """Tools that a row offers or calls: their calls in an answer are compared as calls."""
    return {tool["name"] for turn in turns for tool in turn.tools} | {turn.metadata for turn in turns if turn.metadata}


def _reference_text(answer: Sequence[Message]) -> str:
    parsed = [(turn, parse_any_call(turn.metadata, turn.content) if turn.metadata else None) for turn in answer]
    parts = [_call_text(call.name, call.arguments) if call else _turn_text(turn) for turn, call in parsed]
    return "\n".join(part for part in parts if part)


def _turn_text(turn: Message) -> str:
    return f"{turn.metadata}\n{turn.content}" if turn.metadata else turn.content


def _answer_text(answer: Answer) -> str:
    calls = [_call_text(call.name, call.arguments) for call in answer.tool_calls]
    return "\n".join(part for part in (answer.content, *calls) if part)


def _call_text(name: str, arguments: dict[str, Any]) -> str:
    """A call in one form, so that quotes and blanks in the generated code do not count."""
    return f"{name}\n{write_tool_call(arguments)}"


def evaluate(
    predictions: Iterable[Prediction], output: Path, bleu_tokens: str = "characters", n_skipped: int = 0
) -> dict[str, Any]:
    """Write each prediction as it arrives, at the end all in the order of the rows; write and return the scores.

    n_skipped: rows of the file that could not be used, which the scores name.
    """
    create_output_folder(output)
    file = output / PREDICTIONS_FILE
    found: list[Prediction] = []
    # JSON allows lone surrogates, UTF-8 does not: they are escaped
    with file.open("w", encoding="utf-8", errors="backslashreplace") as stream:
        for prediction in predictions:
            found.append(prediction)
            stream.write(_json_line(prediction))
            stream.flush()
    found.sort(key=lambda prediction: prediction.index)
    text = "".join(_json_line(prediction) for prediction in found)
    file.write_text(text, encoding="utf-8", errors="backslashreplace")
    scores = metrics.score([row.prediction for row in found], [row.reference for row in found], bleu_tokens)
    result = {**scores.as_dict(), "n_skipped": n_skipped}
    write_json(output / SCORES_FILE, result)
    return result


def keep_earlier_results(output: Path) -> Path | None:
    """Move the predictions and scores of an earlier run to output/earlier-1 (2, 3, …); returns that folder."""
    found = [output / name for name in (PREDICTIONS_FILE, SCORES_FILE) if (output / name).exists()]
    if not found:
        return None
    kept = next(path for number in itertools.count(1) if not (path := output / f"{EARLIER}-{number}").exists())
    create_output_folder(kept)
    for file in found:
        file.rename(kept / file.name)
    return kept


def require_other_folder(output: Path) -> None:
    """Raise UserError if `output` holds a model or an adapter: its manifest would no longer describe the folder."""
    if any((output / name).exists() for name in ("config.json", "adapter_config.json", "manifest.json")):
        raise UserError(
            f"--output-dir {output} is the folder of a model or adapter", f"use one of its own: {output / 'scores'}"
        )


def create_output_folder(output: Path) -> None:
    """Create the folder of predictions and scores; raises UserError when that fails."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create --output-dir {output} ({error.strerror})", "choose another folder") from error


def _json_line(prediction: Prediction) -> str:
    return json.dumps(asdict(prediction), ensure_ascii=False) + "\n"
