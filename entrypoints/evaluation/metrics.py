"""BLEU-4 and ROUGE as ChatGLM's fine-tuning scripts define them, in percent; no text raises an error.

BLEU-4 is nltk's sentence BLEU with smoothing method 3, on characters (as ChatGLM2's P-Tuning script) or on jieba words
(as ChatGLM3's finetune_hf.py, which does not multiply by 100: its 0.03 is 3 here). ROUGE-1/2/L are F-scores of
rouge_chinese on jieba words. Each row is rounded to 4 digits, then averaged. Texts are scored as given, not stripped.

Parts of the definition that look like bugs:
- ROUGE-1 and ROUGE-2 compare sets: repeating one correct word 50 times costs nothing; see `repetition`.
- ROUGE-2 of a text of one word is 0, even if it equals the reference: it has no bigram.
- BLEU-4 of an exact match of fewer than 4 tokens is below 100: method 3 fills the missing orders.

nltk and jieba are imported when the first row is scored.
"""

import logging
import warnings
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any

from entrypoints.errors import UserError

BLEU_TOKENS = ("characters", "words")
REPETITION_CHARACTERS = 4


@dataclass(frozen=True)
class RowScores:
    """Scores of one prediction, in percent, rounded to 4 digits."""

    bleu_4: float
    rouge_1: float
    rouge_2: float
    rouge_l: float


@dataclass(frozen=True)
class Scores:
    """Means over the rows in percent, and counts; all 0 without rows."""

    bleu_4: float
    rouge_1: float
    rouge_2: float
    rouge_l: float
    n: int  # rows, empty ones included
    n_empty_predictions: int  # empty or whitespace; such a row scores 0
    n_empty_references: int
    mean_length_ratio: float  # characters of prediction / reference, mean over rows with a reference
    repetition: float  # fraction of character 4-grams that occurred before in the same prediction, 0 to 1
    bleu_tokens: str

    def as_dict(self) -> dict[str, Any]:
        """The fields, and `definition`: a description of unit and tokenization."""
        return {**asdict(self), "definition": _definition(self.bleu_tokens)}


def score(predictions: list[str], references: list[str], bleu_tokens: str = "characters") -> Scores:
    """Score a corpus; a row with an empty or whitespace-only side scores 0 and is counted.

    Raises UserError: lists of different lengths, or `bleu_tokens` neither "characters" nor "words".
    """
    if len(predictions) != len(references):
        raise UserError(
            f"{len(predictions)} predictions but {len(references)} references", "pass one prediction for each reference"
        )
    pairs = list(zip(predictions, references, strict=True))
    rows = [score_row(prediction, reference, bleu_tokens) for prediction, reference in pairs]
    means = {name.name: _mean([getattr(row, name.name) for row in rows]) for name in fields(RowScores)}
    return Scores(
        **means,
        n=len(rows),
        n_empty_predictions=sum(not prediction.strip() for prediction in predictions),
        n_empty_references=sum(not reference.strip() for reference in references),
        mean_length_ratio=_mean(
            [len(prediction) / len(reference) for prediction, reference in pairs if reference.strip()]
        ),
        repetition=_repetition(predictions),
        bleu_tokens=bleu_tokens,
    )


def score_row(prediction: str, reference: str, bleu_tokens: str = "characters") -> RowScores:
    """Score one row; all 0 if a side is empty or whitespace.

    Raises UserError: `bleu_tokens` neither "characters" nor "words".
    """
    if bleu_tokens not in BLEU_TOKENS:
        raise UserError(f"BLEU on {bleu_tokens} is not defined", f"choose one of {', '.join(BLEU_TOKENS)}")
    if not prediction.strip() or not reference.strip():
        return RowScores(0.0, 0.0, 0.0, 0.0)
    words = [list(_segmenter().cut(text)) for text in (prediction, reference)]
    bleu = _bleu_4(*words) if bleu_tokens == "words" else _bleu_4(list(prediction), list(reference))
    rouge = _rouge(*(" ".join(tokens) for tokens in words))
    return RowScores(*(round(100 * value, 4) for value in (bleu, *rouge)))


def _definition(bleu_tokens: str) -> str:
    tokens = "jieba words" if bleu_tokens == "words" else bleu_tokens
    return (
        f"percent, mean over rows; BLEU-4: nltk sentence BLEU on {tokens}, smoothing method 3; ROUGE-1/2/L: F-scores "
        "of rouge_chinese on jieba words; rows with an empty side count as 0; repetition and length ratio on characters"
    )


def _mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 4) if values else 0.0


def _repetition(predictions: list[str]) -> float:
    total = distinct = 0
    for text in predictions:
        grams = [text[i : i + REPETITION_CHARACTERS] for i in range(len(text) - REPETITION_CHARACTERS + 1)]
        total += len(grams)
        distinct += len(set(grams))
    return round(1 - distinct / total, 4) if total else 0.0


@cache
def _segmenter() -> Any:
    """A private jieba tokenizer that reads the dictionary of the package and not jieba's cache file in /tmp.

    The cache fails on read-only file systems and if another user wrote it, and is unmarshalled without a check. It
    saves nothing: 0.48 s to read the dictionary, 0.53 s to load the cache (jieba 0.42.1, Python 3.11).
    """
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # invalid escape sequences in jieba's source, printed to stderr from Python 3.12 on
        import jieba
    jieba.setLogLevel(logging.WARNING)
    segmenter = jieba.Tokenizer()
    segmenter.FREQ, segmenter.total = segmenter.gen_pfdict(segmenter.get_dict_file())
    segmenter.initialized = True
    return segmenter


def _bleu_4(prediction: list[str], reference: list[str]) -> float:
    from nltk.translate import bleu_score

    method3 = bleu_score.SmoothingFunction().method3
    return float(bleu_score.sentence_bleu([reference], prediction, smoothing_function=method3))


def _rouge(prediction: str, reference: str) -> tuple[float, float, float]:
    """ROUGE-1, 2 and L of texts with words separated by spaces, between 0 and 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as for jieba
        from rouge_chinese import Rouge
    rouge = Rouge(metrics=["rouge-1", "rouge-2"])
    grams = rouge.get_scores(prediction, reference)[0]
    words = [
        [word for sentence in rouge.cut_sent(text) if sentence for word in " ".join(sentence.split()).split(" ")]
        for text in (prediction, reference)
    ]
    return grams["rouge-1"]["f"], grams["rouge-2"]["f"], _rouge_l(*words)


def _rouge_l(prediction: list[str], reference: list[str]) -> float:
    """F-score of the longest common subsequence, bit for bit the formula of rouge_chinese.

    rouge_chinese fills a dict with an entry for every pair of words: gigabytes for 5,000 words each.
    """
    common = _common_subsequence(prediction, reference)
    precision, recall = common / len(prediction), common / len(reference)
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))


def _common_subsequence(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence; each row of the dynamic programming table is one integer.

    Bit i is 0 where the row increases at column i. Source: Hyyrö 2004, Bit-Parallel LCS-length Computation Revisited.
    """
    positions: dict[str, int] = {}
    for i, word in enumerate(a):
        positions[word] = positions.get(word, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    for word in b:
        matches = row & positions.get(word, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(a) - row.bit_count()
