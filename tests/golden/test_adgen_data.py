"""The public ADGEN development set: reading, checking, splitting and scoring."""

import jieba
import pytest
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_chinese import Rouge

from entrypoints.dataset.columns import Columns
from entrypoints.dataset.quality import check
from entrypoints.dataset.reader import examples, read_rows
from entrypoints.dataset.split import SplitOptions, split
from entrypoints.evaluation.metrics import score


@pytest.fixture
def adgen(golden):
    return golden / "adgen_dev.json"


def test_every_row_is_usable_and_300_answers_contain_a_literal_unk(adgen):
    """1,070 rows and 300 answers: README.md of the golden folder."""
    report = check(read_rows(adgen), Columns(), None, 512, 512)
    assert (report.rows, report.used, report.skipped) == (1070, 1070, {})
    assert report.columns == {"content": 1070, "summary": 1070}
    assert report.unk_responses.count == 300


def test_a_split_loses_no_row(adgen):
    done = split(adgen, "utf-8", SplitOptions(rows=70))
    assert (len(done.train), len(done.dev), done.shared) == (1000, 70, 0)
    assert sorted(row.line for row in done.train + done.dev) == list(range(1, 1071))


def test_scores_of_real_texts_equal_those_of_the_fine_tuning_script(adgen, tmp_path):
    """60 answers, each scored as the prediction for the next row, with the libraries called as the script does."""
    jieba.setLogLevel(60)
    jieba.dt.tmp_dir = str(tmp_path)
    used, _ = examples(read_rows(adgen)[:61], Columns())
    predictions, references = [row.response for row in used[:-1]], [row.response for row in used[1:]]
    rows = []
    for prediction, reference in zip(predictions, references, strict=True):
        cut = Rouge().get_scores(" ".join(jieba.cut(prediction)), " ".join(jieba.cut(reference)))[0]
        bleu = sentence_bleu([list(reference)], list(prediction), smoothing_function=SmoothingFunction().method3)
        rows.append([round(100 * value, 4) for value in (bleu, *(cut[f"rouge-{n}"]["f"] for n in "12l"))])
    means = [round(sum(column) / len(rows), 4) for column in zip(*rows, strict=True)]
    ours = score(predictions, references)
    assert [ours.bleu_4, ours.rouge_1, ours.rouge_2, ours.rouge_l] == means
