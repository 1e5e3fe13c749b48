import json
import tracemalloc
from pathlib import Path

import pytest

from entrypoints.dataset.checking import check
from entrypoints.dataset.reading import Columns, Row, parse_rows
from entrypoints.errors import UserError


def rows_of(*pairs, **more):
    fields = [{"content": prompt, "summary": response, **more} for prompt, response in pairs]
    return parse_rows("\n".join(json.dumps(row) for row in fields).encode(), Path("train.json"))


def report_of(*pairs, encode=None, source=512, target=512):
    return check(rows_of(*pairs), Columns(), encode, source, target)


def test_used_and_skipped_rows_add_up_and_every_reason_has_its_lines():
    """F5, the rows of the trap."""
    report = report_of(("a", ""), (None, "b"), ("c", "d"), (1, 2))
    assert (report.rows, report.used) == (4, 1)
    assert report.as_dict()["skipped"] == {
        "empty response": {"count": 1, "lines": [1]},
        "null prompt": {"count": 1, "lines": [2]},
        "prompt is not a string": {"count": 1, "lines": [4]},
    }
    text = report.as_text()
    assert "train.json: 4 rows, 1 used, 3 skipped" in text
    assert "skipped, empty response: 1 (line 1)" in text


def test_only_the_first_ten_lines_of_a_finding_are_named():
    report = report_of(("c", "d"), *[("a", "")] * 12)
    assert report.skipped["empty response"].count == 12
    assert report.skipped["empty response"].lines == list(range(2, 12))
    assert "12 (lines 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, …)" in report.as_text()


def test_columns_are_counted_over_all_rows():
    rows = parse_rows(
        b'{"content": "a", "summary": "b"}\n{"content": "a", "summary": "b", "id": 7}', Path("train.json")
    )
    assert check(rows, Columns(), None, 9, 9).columns == {"content": 2, "summary": 2, "id": 1}


def test_lengths_without_a_model_are_characters_and_the_report_says_so():
    report = report_of(*[("裙" * n, "美" * 2 * n) for n in range(1, 101)])
    assert report.unit == "characters"
    assert report.as_dict()["prompt_length"] == {"p50": 50, "p90": 90, "p99": 99, "max": 100, "mean": 50.5}
    assert report.as_dict()["response_length"] == {"p50": 100, "p90": 180, "p99": 198, "max": 200, "mean": 101.0}
    assert "lengths are in characters (name a model to count its tokens)" in report.as_text()


def test_lengths_with_an_encoder_are_tokens():
    report = report_of(("a", "b"), encode=lambda example: (7, 9))
    assert report.unit == "tokens"
    assert (report.prompt_length.max, report.response_length.max) == (7, 9)
    assert "lengths are in tokens\n" in report.as_text()


def test_history_counts_as_prompt():
    rows = rows_of(("abc", "d"), history=[["ab", "c"], ["d", ""]])
    assert check(rows, Columns(history="history"), None, 9, 9).prompt_length.max == 7
    assert check(rows, Columns(), None, 9, 9).prompt_length.max == 3


def test_a_row_of_exactly_the_limit_is_not_cut_and_one_longer_is():
    report = report_of(("a" * 4, "b" * 3), ("a" * 5, "b" * 3), ("a", "b" * 4), source=4, target=3)
    assert (report.cut_prompts.count, report.cut_prompts.lines) == (1, [2])
    assert (report.cut_responses.count, report.cut_responses.lines) == (1, [3])
    assert "prompts cut at 4 characters: 1 (line 2)" in report.as_text()


def test_a_literal_unk_in_a_response_is_counted():
    """F9, zai-org/ChatGLM3#564; in the prompt it does no harm."""
    report = report_of(("类型#裙", "<UNK>的设计"), ("<UNK>", "好"), ("a", "<unk>"))
    assert (report.unk_responses.count, report.unk_responses.lines) == (1, [1])
    assert "responses with a literal <UNK>: 1 (line 1)" in report.as_text()


def test_duplicates_and_conflicting_answers_are_told_apart():
    report = report_of(("a", "b"), ("c", "d"), ("a", "b"), ("c", "e"), ("f", "g"), ("a", "b"))
    assert report.as_dict()["duplicates"] == {"groups": 1, "rows": 3, "lines": [[1, 3, 6]]}
    assert report.as_dict()["conflicts"] == {"groups": 1, "rows": 2, "lines": [[2, 4]]}
    assert "exact duplicates: 3 rows in 1 groups (lines 1, 3, 6)" in report.as_text()
    assert "one prompt, different responses: 2 rows in 1 groups (lines 2, 4)" in report.as_text()


def test_the_same_prompt_after_another_history_is_another_question():
    rows = parse_rows(
        b'[{"content": "a", "summary": "b", "h": [["q", "r"]]}, {"content": "a", "summary": "c", "h": []}]',
        Path("t.json"),
    )
    assert check(rows, Columns(history="h"), None, 9, 9).conflicts.groups == 0
    assert check(rows, Columns(), None, 9, 9).conflicts.groups == 1


def test_long_lists_of_duplicates_are_cut_to_ten_by_ten():
    pairs = [(str(n), "x") for n in range(12) for _ in range(11)]
    duplicates = report_of(*pairs).duplicates
    assert (duplicates.groups, duplicates.rows) == (12, 132)
    assert [len(lines) for lines in duplicates.lines] == [10] * 10


def test_the_report_survives_json():
    report = report_of(("裙", "美"), ("裙", ""))
    assert json.loads(json.dumps(report.as_dict())) == report.as_dict()


def test_rows_are_looked_at_one_by_one_and_their_texts_are_not_kept():
    """64 MB of rows, of which a few are in memory at a time."""
    rows = (Row(Path("t.json"), n, {"content": f"{n}" + "x" * 500_000, "summary": "y" * 500_000}) for n in range(64))
    tracemalloc.start()
    report = check(rows, Columns(), None, 9, 9)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (report.rows, report.cut_prompts.count) == (64, 64)
    assert most < 16 << 20


def test_a_row_that_the_encoder_refuses_is_skipped_with_its_reason():
    def encode(example):
        if example.prompt == "long":
            raise UserError("does not fit", "raise the limit")
        return 1, 1

    report = report_of(("a", "b"), ("long", "b"), ("c", "d"), encode=encode)
    assert (report.used, report.as_dict()["skipped"]) == (2, {"does not fit": {"count": 1, "lines": [2]}})
    with pytest.raises(UserError, match=r"no usable row in train\.json: 1 does not fit"):
        report_of(("long", "b"), encode=encode)


def test_a_file_without_usable_rows_is_refused():
    with pytest.raises(UserError, match="no usable row"):
        report_of(("a", ""))
