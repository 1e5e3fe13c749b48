"""BLEU-4 and ROUGE: values calculated by hand, equality with the libraries, and texts that make other scorers fail."""

import math
import os
import random
import subprocess
import sys

import jieba
import pytest
from nltk.translate import bleu_score
from rouge_chinese import Rouge

from entrypoints.errors import UserError
from entrypoints.evaluation import metrics
from entrypoints.evaluation.metrics import RowScores, score, score_row

ZERO = RowScores(0.0, 0.0, 0.0, 0.0)


def test_a_row_has_the_scores_calculated_by_hand():
    """5 of 6 characters: precision 5/5, 3/4, 2/3, 1/2, brevity exp(-.2). Words: 今天天气 / 好, 今天天气 / 很 / 好."""
    row = score_row("今天天气好", "今天天气很好")
    assert row.bleu_4 == pytest.approx(100 * math.exp(-0.2) * 0.25**0.25, abs=1e-4)
    assert row.rouge_1 == pytest.approx(100 * 2 * (1 * 2 / 3) / (1 + 2 / 3), abs=1e-4)
    assert row.rouge_2 == 0.0
    assert row.rouge_l == pytest.approx(80.0, abs=1e-4)


def test_spaces_separate_words_of_other_scripts():
    """The words a b c d against a b d c e: 4 of 4 and 4 of 5 words; 1 of 3 and 1 of 4 pairs; a b c in order."""
    row = score_row("a b c d", "a b d c e")
    assert row.rouge_1 == pytest.approx(100 * 2 * 0.8 / 1.8, abs=1e-4)
    assert row.rouge_2 == pytest.approx(100 * 2 / 7, abs=1e-4)
    assert row.rouge_l == pytest.approx(200 / 3, abs=1e-4)


def test_an_exact_match_of_some_length_scores_a_hundred():
    assert score_row("今天天气很好", "今天天气很好") == RowScores(100.0, 100.0, 100.0, 100.0)


def random_text(generator):
    words = [
        "今天",
        "天气",
        "好",
        "设计",
        "面料",
        " ",
        "。",
        "！",
        "？",
        "?",
        "……",
        "......",
        ".",
        "”",
        "’",
        "，",
        "\n",
        "\n \n",
    ]
    words += ["a", "bc", "3.5", "\u3000", "\t", "…", "<UNK>", "😀"]
    return "".join(generator.choice(words) for _ in range(generator.randint(1, 40)))


def library_scores(prediction, reference):
    """As in the fine-tuning scripts: jieba words joined by spaces, scored by rouge_chinese and nltk."""
    cut = [list(jieba.cut(text)) for text in (prediction, reference)]
    rouge = Rouge().get_scores(*(" ".join(words) for words in cut))[0]
    method3 = bleu_score.SmoothingFunction().method3
    bleu = bleu_score.sentence_bleu([list(reference)], list(prediction), smoothing_function=method3)
    words_bleu = bleu_score.sentence_bleu([cut[1]], cut[0], smoothing_function=method3)
    return [round(100 * value, 4) for value in (bleu, *(rouge[f"rouge-{n}"]["f"] for n in "12l"), words_bleu)]


@pytest.mark.slow
def test_rows_equal_the_libraries_to_the_last_digit_on_random_texts(tmp_path):
    """The texts contain sentence marks and blank lines, where rouge_chinese splits and can produce an empty word."""
    jieba.setLogLevel(60)
    jieba.dt.tmp_dir = str(tmp_path)
    draw = random.Random(0)
    compared = 0
    for _ in range(1500):
        prediction, reference = random_text(draw), random_text(draw)
        if prediction.strip() and reference.strip():
            row = score_row(prediction, reference)
            words = score_row(prediction, reference, "words").bleu_4
            assert [row.bleu_4, row.rouge_1, row.rouge_2, row.rouge_l, words] == library_scores(prediction, reference)
            compared += 1
    assert compared > 1000


def test_the_longest_common_subsequence_equals_the_table_of_rouge_chinese():
    from rouge_chinese.rouge_score import _len_lcs

    draw = random.Random(1)
    for size in [1, 2, 3, 5, 8, 13, 40, 70] * 40:
        a, b = ([draw.choice("abcdefgh"[: draw.randint(1, 8)]) for _ in range(draw.randint(1, size))] for _ in range(2))
        assert metrics._common_subsequence(a, b) == _len_lcs(a, b)


def test_an_empty_or_whitespace_side_scores_zero_and_is_counted():
    """The package rouge raises `Hypothesis is empty.`, which would come after hours of generation."""
    full = score_row("好", "好")
    scores = score(["", "   ", "好"], ["好", "好", "好"])
    assert (scores.n, scores.n_empty_predictions, scores.n_empty_references) == (3, 2, 0)
    assert scores.rouge_1 == pytest.approx(full.rouge_1 / 3, abs=1e-4)
    assert scores.bleu_4 == pytest.approx(full.bleu_4 / 3, abs=1e-4)
    scores = score(["好", "好", "好"], ["", "\n\u3000", "好"])
    assert (scores.n, scores.n_empty_predictions, scores.n_empty_references) == (3, 0, 2)
    assert scores.rouge_1 == pytest.approx(full.rouge_1 / 3, abs=1e-4)


@pytest.mark.parametrize("text", ["", " ", "\n", "\u3000", "\x1c", "\t \r\n"])
@pytest.mark.parametrize("tokens", metrics.BLEU_TOKENS)
def test_no_whitespace_text_raises(text, tokens):
    assert score_row(text, "好", tokens) == score_row("好", text, tokens) == score_row(text, text, tokens) == ZERO


@pytest.mark.parametrize("text", ["\u200b", "\ufeff", "\x00", "。", "\ud83d", "．", "......", "\n。\n", "?”", "🏳️‍🌈"])
def test_no_unusual_text_raises(text):
    score_row(text, "好。")
    score_row("好。", text)
    assert score_row(text, text).rouge_1 == 100.0


def test_missing_ngram_orders_are_smoothed_by_method_3():
    """1 of 2 characters, then no bigram, trigram or 4-gram: method 3 fills in 1/2, 1/4 and 1/8."""
    assert score_row("好裤", "好裙").bleu_4 == pytest.approx(100 * (1 / 128) ** 0.25, abs=1e-4)


def test_no_rows_score_zero():
    scores = score([], [])
    assert (scores.n, scores.bleu_4, scores.mean_length_ratio, scores.repetition) == (0, 0.0, 0.0, 0.0)


def test_lists_of_different_lengths_are_rejected():
    with pytest.raises(UserError, match="2 predictions but 1 references"):
        score(["a", "b"], ["a"])


def test_an_unknown_bleu_tokenization_is_rejected():
    with pytest.raises(UserError, match="choose one of characters, words"):
        score(["a"], ["a"], "bytes")


def test_bleu_is_in_percent_on_characters_or_words_and_the_result_names_which():
    """Of the fine-tuning scripts one scores characters in percent, the other words from 0 to 1. Here 9 or 4 tokens."""
    characters = score(["我来到北京清华大学"], ["我来到北京大学"])
    words = score(["我来到北京清华大学"], ["我来到北京大学"], "words")
    assert characters.bleu_4 == pytest.approx(100 * (5 / 72) ** 0.25, abs=1e-4)
    assert words.bleu_4 == pytest.approx(
        100 * (2 / 4 * 1 / 3 * 1 / 4 * 1 / 4) ** 0.25, abs=1e-4
    )  # method 3: 1/2 of 2, 1/4 of 1
    # ROUGE-1: 2 of 4 words, 2 of 3; ROUGE-2: 1 of 3 bigrams, 1 of 2; ROUGE-L: 2 of 4, 2 of 3
    expected = pytest.approx((400 / 7, 40.0, 400 / 7), abs=1e-4)
    assert (characters.rouge_1, characters.rouge_2, characters.rouge_l) == expected
    assert characters.rouge_l == words.rouge_l
    assert "percent" in characters.as_dict()["definition"]
    assert "BLEU on characters" in characters.as_dict()["definition"]
    assert "BLEU on jieba words" in words.as_dict()["definition"]
    assert words.as_dict()["bleu_tokens"] == "words"


def test_means_are_over_rounded_rows():
    pairs = [("今天天气好", "今天天气很好"), ("好", "好"), ("", "好")]
    rows = [score_row(*pair).bleu_4 for pair in pairs]
    assert score(*zip(*pairs, strict=True)).bleu_4 == round(sum(rows) / 3, 4)


def test_rouge_ignores_repetition_and_the_repetition_score_shows_it():
    """ROUGE-N compares sets."""
    scores = score(["好看 " * 50], ["好看"])
    assert scores.rouge_1 == 100.0
    assert scores.mean_length_ratio == 75.0
    assert scores.repetition == round(1 - 3 / 147, 4)  # 150 characters, 147 groups of four, 3 of them different
    assert score(["简约而不简单的牛仔外套"], ["好"]).repetition == 0.0


def test_rouge_2_of_a_match_of_one_word_is_zero():
    """It has no bigram."""
    assert score_row("好看", "好看").rouge_2 == 0.0


def test_the_length_ratio_excludes_rows_without_a_reference():
    assert score(["ab", "abcd", "x"], ["abcd", "ab", " "]).mean_length_ratio == 1.25


def test_a_pair_of_five_thousand_words_takes_little_time_and_memory():
    """The table of rouge_chinese would have 25 million entries. Measured: 0.1 s, 5 MB."""
    code = (
        "import random, resource, time; from entrypoints.evaluation import metrics\n"
        "metrics.score_row('好', '好'); draw = random.Random(0)\n"
        "texts = [' '.join(f'w{draw.randint(0, 999)}' for _ in range(5000)) for _ in range(2)]\n"
        "used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before, start = used(), time.perf_counter(); row = metrics.score_row(*texts)\n"
        "print(time.perf_counter() - start, used() - before, row.rouge_l)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, megabytes, rouge_l = map(float, done.stdout.split())
    assert seconds < 10
    assert megabytes < 500
    assert 1 < rouge_l < 99


def test_jieba_neither_writes_nor_reads_its_cache_and_prints_nothing(tmp_path):
    """The cache in /tmp can belong to another user, or /tmp be read-only; a folder of its name acts like both."""
    (tmp_path / "jieba.cache").mkdir()
    code = (
        "import logging; logging.basicConfig(level=10); from entrypoints.evaluation.metrics import score_row; "
        "print(score_row('\\u597d', '\\u597d'))"
    )
    env = {
        "PATH": os.environ["PATH"],
        "TMPDIR": str(tmp_path),
        "HOME": "/nonexistent",
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
    }
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "rouge_1=100.0" in done.stdout
    assert [path.name for path in tmp_path.rglob("*")] == ["jieba.cache"]


def test_nltk_and_jieba_are_imported_only_when_a_row_is_scored():
    libraries = {"nltk", "jieba", "rouge_chinese", "numpy"}
    code = f"import sys, entrypoints.evaluation.metrics; print(sorted({libraries} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
