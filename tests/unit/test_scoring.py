"""Trap names (H1 to H6) are those of the list of reported pains."""

import math
import os
import random
import subprocess
import sys

import jieba
import pytest
from nltk.translate import bleu_score
from rouge_chinese import Rouge

from entrypoints import scoring
from entrypoints.errors import UserError
from entrypoints.scoring import RowScores, score, score_row, self_test

ZERO = RowScores(0.0, 0.0, 0.0, 0.0)


def test_a_known_row_has_the_scores_worked_out_by_hand():
    """5 of 6 characters: precision 5/5, 3/4, 2/3, 1/2, brevity exp(-.2). Words: 今天天气 / 好, 今天天气 / 很 / 好."""
    row = score_row("今天天气好", "今天天气很好")
    assert row.bleu_4 == pytest.approx(100 * math.exp(-0.2) * 0.25**0.25, abs=1e-4)
    assert row.rouge_1 == pytest.approx(100 * 2 * (1 * 2 / 3) / (1 + 2 / 3), abs=1e-4)
    assert row.rouge_2 == 0.0
    assert row.rouge_l == pytest.approx(80.0, abs=1e-4)


def test_blanks_part_words_of_other_scripts():
    """a b c d against a b d c e: 4 of 4 and 4 of 5 words; 1 of 3 and 1 of 4 pairs; a b c in order."""
    row = score_row("a b c d", "a b d c e")
    assert row.rouge_1 == pytest.approx(100 * 2 * 0.8 / 1.8, abs=1e-4)
    assert row.rouge_2 == pytest.approx(100 * 2 / 7, abs=1e-4)
    assert row.rouge_l == pytest.approx(200 / 3, abs=1e-4)


def test_an_exact_match_of_some_length_scores_a_hundred():
    assert score_row("今天天气很好", "今天天气很好") == RowScores(100.0, 100.0, 100.0, 100.0)


def random_text(random_of):
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
    return "".join(random_of.choice(words) for _ in range(random_of.randint(1, 40)))


def library_scores(prediction, reference):
    """The lines of the fine-tuning scripts: jieba words joined by blanks, then rouge_chinese and nltk as they come."""
    cut = [list(jieba.cut(text)) for text in (prediction, reference)]
    rouge = Rouge().get_scores(*(" ".join(words) for words in cut))[0]
    method3 = bleu_score.SmoothingFunction().method3
    bleu = bleu_score.sentence_bleu([list(reference)], list(prediction), smoothing_function=method3)
    words_bleu = bleu_score.sentence_bleu([cut[1]], cut[0], smoothing_function=method3)
    return [round(100 * value, 4) for value in (bleu, *(rouge[f"rouge-{n}"]["f"] for n in "12l"), words_bleu)]


def test_rows_equal_the_libraries_to_the_last_digit_on_random_texts(tmp_path):
    """Sentence marks and blank lines are in the texts: rouge_chinese splits there, and may make an empty word."""
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
        assert scoring._common_subsequence(a, b) == _len_lcs(a, b)


def test_an_empty_or_blank_side_scores_zero_and_is_counted():
    """H1: rouge raises `Hypothesis is empty.` after hours of generation."""
    full = score_row("好", "好")
    scores = score(["", "   ", "好"], ["好", "好", "好"])
    assert (scores.n, scores.n_empty_predictions, scores.n_empty_references) == (3, 2, 0)
    assert scores.rouge_1 == pytest.approx(full.rouge_1 / 3, abs=1e-4)
    assert scores.bleu_4 == pytest.approx(full.bleu_4 / 3, abs=1e-4)
    scores = score(["好", "好", "好"], ["", "\n\u3000", "好"])
    assert (scores.n, scores.n_empty_predictions, scores.n_empty_references) == (3, 0, 2)
    assert scores.rouge_1 == pytest.approx(full.rouge_1 / 3, abs=1e-4)


@pytest.mark.parametrize("text", ["", " ", "\n", "\u3000", "\x1c", "\t \r\n"])
@pytest.mark.parametrize("tokens", scoring.BLEU_TOKENS)
def test_no_blank_text_raises(text, tokens):
    assert score_row(text, "好", tokens) == score_row("好", text, tokens) == score_row(text, text, tokens) == ZERO


@pytest.mark.parametrize("text", ["\u200b", "\ufeff", "\x00", "。", "\ud83d", "．", "......", "\n。\n", "?”", "🏳️‍🌈"])
def test_no_odd_text_raises(text):
    score_row(text, "好。")
    score_row("好。", text)
    assert score_row(text, text).rouge_1 == 100.0


def test_no_rows_score_zero():
    scores = score([], [])
    assert (scores.n, scores.bleu_4, scores.mean_length_ratio, scores.repetition) == (0, 0.0, 0.0, 0.0)


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(UserError, match="2 predictions but 1 references"):
        score(["a", "b"], ["a"])


def test_an_unknown_unit_of_bleu_is_refused():
    with pytest.raises(UserError, match="choose one of characters, words"):
        score(["a"], ["a"], "bytes")


def test_bleu_is_in_percent_on_characters_or_words_and_the_result_says_which():
    """H3: one script counts characters in percent, the other words as a share. The prediction has 9 or 4 of them."""
    characters = score(["我来到北京清华大学"], ["我来到北京大学"])
    words = score(["我来到北京清华大学"], ["我来到北京大学"], "words")
    assert characters.bleu_4 == pytest.approx(100 * (5 / 72) ** 0.25, abs=1e-4)
    assert words.bleu_4 == pytest.approx(
        100 * (2 / 4 * 1 / 3 * 1 / 4 * 1 / 4) ** 0.25, abs=1e-4
    )  # method 3: 1/2 of 2, 1/4 of 1
    assert characters.rouge_l == words.rouge_l
    assert "percent" in characters.as_dict()["definition"]
    assert "BLEU on characters" in characters.as_dict()["definition"]
    assert "BLEU on jieba words" in words.as_dict()["definition"]
    assert words.as_dict()["bleu_tokens"] == "words"


def test_means_are_over_rounded_rows():
    pairs = [("今天天气好", "今天天气很好"), ("好", "好"), ("", "好")]
    rows = [score_row(*pair).bleu_4 for pair in pairs]
    assert score(*zip(*pairs, strict=True)).bleu_4 == round(sum(rows) / 3, 4)


def test_rouge_does_not_punish_repetition_but_the_repetition_share_shows_it():
    """H6: ROUGE-N compares sets."""
    scores = score(["好看 " * 50], ["好看"])
    assert scores.rouge_1 == 100.0
    assert scores.mean_length_ratio == 75.0
    assert scores.repetition == round(1 - 3 / 147, 4)  # 150 characters, 147 groups of four, 3 of them different
    assert score(["简约而不简单的牛仔外套"], ["好"]).repetition == 0.0


def test_rouge_2_of_a_one_word_match_is_zero():
    """H6."""
    assert score_row("好看", "好看").rouge_2 == 0.0


def test_length_ratio_leaves_rows_without_a_reference_out():
    assert score(["ab", "abcd", "x"], ["abcd", "ab", " "]).mean_length_ratio == 1.25


def test_a_pair_of_five_thousand_words_takes_little_time_and_memory():
    """H4: the table of rouge_chinese has 25 million entries here. Measured: 0.1 s, 5 MB."""
    code = (
        "import random, resource, time; from entrypoints import scoring; scoring.self_test(); draw = random.Random(0)\n"
        "texts = [' '.join(f'w{draw.randint(0, 999)}' for _ in range(5000)) for _ in range(2)]\n"
        "used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before, start = used(), time.perf_counter(); row = scoring.score_row(*texts)\n"
        "print(time.perf_counter() - start, used() - before, row.rouge_l)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, megabytes, rouge_l = map(float, done.stdout.split())
    assert seconds < 10
    assert megabytes < 500
    assert 1 < rouge_l < 99


def test_jieba_neither_writes_nor_trusts_a_cache_and_keeps_stderr_clean(tmp_path):
    """H5: the cache in /tmp may be another user's, or /tmp read-only; both are a folder named jieba.cache to jieba."""
    (tmp_path / "jieba.cache").mkdir()
    code = (
        "import logging; logging.basicConfig(level=10); from entrypoints.scoring import score_row; "
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
    code = (
        "import sys, entrypoints.scoring; print(sorted({'nltk', 'jieba', 'rouge_chinese', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_self_test_passes_with_the_locked_versions():
    self_test()


def test_the_self_test_names_a_broken_nltk(monkeypatch):
    """H2: nltk 3.8.1 on Python 3.12."""

    def broken(*args, **kwargs):
        raise TypeError("Fraction.__new__() got an unexpected keyword argument '_normalize'")

    monkeypatch.setattr(bleu_score, "sentence_bleu", broken)
    with pytest.raises(UserError, match=r"the scorer is broken: TypeError: Fraction.*nltk 3\.9 or later"):
        self_test()


def test_the_self_test_names_a_score_that_is_off(monkeypatch):
    monkeypatch.setattr(bleu_score, "sentence_bleu", lambda *args, **kwargs: 0.5)
    with pytest.raises(UserError, match=r"bleu_4 of a known pair is 50.0, not 51.334"):
        self_test()


def test_the_self_test_notices_another_smoothing(monkeypatch):
    monkeypatch.setattr(bleu_score.SmoothingFunction, "method3", bleu_score.SmoothingFunction.method1)
    with pytest.raises(UserError, match="smoothed bleu_4 of a known pair"):
        self_test()
