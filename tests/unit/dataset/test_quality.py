"""The report of `glm data check`."""

import json
import tracemalloc
from pathlib import Path

import pytest

from entrypoints.dataset.columns import Columns
from entrypoints.dataset.json_stream import Row
from entrypoints.dataset.quality import check
from entrypoints.dataset.reader import parse_rows
from entrypoints.errors import UserError


def rows_of(*pairs, **more):
    fields = [{"content": prompt, "summary": response, **more} for prompt, response in pairs]
    return parse_rows("\n".join(json.dumps(row) for row in fields).encode(), Path("train.json"))


def report_of(*pairs, count_tokens=None, source=512, target=512):
    return check(rows_of(*pairs), Columns(), count_tokens, source, target)


def test_used_and_skipped_rows_add_up_and_every_reason_has_its_lines():
    """An empty, a null and a number cell: no row is dropped silently."""
    report = report_of(("a", ""), (None, "b"), ("c", "d"), (1, 2))
    assert (report.rows, report.used) == (4, 1)
    assert report.as_dict()["skipped"] == {
        "empty response": {"count": 1, "lines": [1]},
        "null prompt": {"count": 1, "lines": [2]},
        "column 'content' is a number, not a string": {"count": 1, "lines": [4]},
    }
    text = report.as_text()
    assert "train.json: 4 rows, 1 used, 3 skipped" in text
    assert "skipped, empty response: 1 (line 1)" in text


def test_only_the_first_ten_lines_of_a_finding_are_listed():
    report = report_of(("c", "d"), *[("a", "")] * 12)
    assert report.skipped["empty response"].count == 12
    assert report.skipped["empty response"].lines == list(range(2, 12))
    assert "12 (lines 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, …)" in report.as_text()


def test_columns_are_counted_over_all_rows():
    rows = parse_rows(
        b'{"content": "a", "summary": "b"}\n{"content": "a", "summary": "b", "id": 7}', Path("train.json")
    )
    assert check(rows, Columns(), None, 9, 9).columns == {"content": 2, "summary": 2, "id": 1}


def test_lengths_without_a_model_are_characters_and_the_report_states_it():
    report = report_of(*[("裙" * n, "美" * 2 * n) for n in range(1, 101)])
    assert report.unit == "characters"
    assert report.as_dict()["prompt_length"] == {"p50": 50, "p90": 90, "p99": 99, "max": 100, "mean": 50.5}
    assert report.as_dict()["response_length"] == {"p50": 100, "p90": 180, "p99": 198, "max": 200, "mean": 101.0}
    assert "lengths are in characters (pass --model to count tokens)" in report.as_text()


def test_lengths_with_a_token_counter_are_tokens():
    report = report_of(("a", "b"), count_tokens=lambda example: (7, 9))
    assert report.unit == "tokens"
    assert (report.prompt_length.max, report.response_length.max) == (7, 9)
    assert "lengths are in tokens\n" in report.as_text()


def test_history_is_part_of_the_prompt_length():
    rows = rows_of(("abc", "d"), history=[["ab", "c"], ["d", ""]])
    assert check(rows, Columns(history="history"), None, 9, 9).prompt_length.max == 7
    assert check(rows, Columns(), None, 9, 9).prompt_length.max == 7
    without = check(rows, Columns(prompt="content"), None, 9, 9)
    assert (without.prompt_length.max, without.unused) == (3, {"history": 1})
    assert "not used: history in 1 rows" in without.as_text()


def test_a_row_of_exactly_the_limit_is_not_truncated_and_a_longer_one_is():
    report = report_of(("a" * 4, "b" * 3), ("a" * 5, "b" * 3), ("a", "b" * 4), source=4, target=3)
    assert (report.cut_prompts.count, report.cut_prompts.lines) == (1, [2])
    assert (report.cut_responses.count, report.cut_responses.lines) == (1, [3])
    assert "prompts truncated at 4 characters: 1 (line 2)" in report.as_text()


def test_a_literal_unk_in_a_response_is_counted():
    """The model would learn to generate it; in the prompt it does no harm."""
    report = report_of(("类型#裙", "<UNK>的设计"), ("<UNK>", "好"), ("a", "<unk>"))
    assert (report.unk_responses.count, report.unk_responses.lines) == (1, [1])
    assert "responses with a literal <UNK>: 1 (line 1)" in report.as_text()


def test_duplicates_and_conflicting_answers_are_distinguished():
    report = report_of(("a", "b"), ("c", "d"), ("a", "b"), ("c", "e"), ("f", "g"), ("a", "b"))
    assert report.as_dict()["duplicates"] == {"groups": 1, "rows": 3, "lines": [[1, 3, 6]]}
    assert report.as_dict()["conflicts"] == {"groups": 1, "rows": 2, "lines": [[2, 4]]}
    assert "exact duplicates: 3 rows in 1 groups (lines 1, 3, 6)" in report.as_text()
    assert "same prompt, different responses: 2 rows in 1 groups (lines 2, 4)" in report.as_text()


def test_the_same_prompt_after_a_different_history_is_a_different_question():
    rows = parse_rows(
        b'[{"content": "a", "summary": "b", "h": [["q", "r"]]}, {"content": "a", "summary": "c", "h": []}]',
        Path("t.json"),
    )
    assert check(rows, Columns(history="h"), None, 9, 9).conflicts.groups == 0
    assert check(rows, Columns(), None, 9, 9).conflicts.groups == 1


def test_long_lists_of_duplicates_are_limited_to_ten_by_ten():
    pairs = [(str(n), "x") for n in range(12) for _ in range(11)]
    duplicates = report_of(*pairs).duplicates
    assert (duplicates.groups, duplicates.rows) == (12, 132)
    assert [len(lines) for lines in duplicates.lines] == [10] * 10


def test_the_report_can_be_serialized_as_json():
    report = report_of(("裙", "美"), ("裙", ""))
    assert json.loads(json.dumps(report.as_dict())) == report.as_dict()


def test_rows_are_checked_one_by_one_and_their_texts_are_not_kept():
    """32 MB of rows, of which only a few are in memory at a time."""
    rows = (Row(Path("t.json"), n, {"content": f"{n}" + "x" * 500_000, "summary": "y" * 500_000}) for n in range(32))
    tracemalloc.start()
    report = check(rows, Columns(), None, 9, 9)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (report.rows, report.cut_prompts.count) == (32, 32)
    assert peak < 16 << 20


def test_a_row_that_the_token_counter_rejects_is_skipped_with_its_reason():
    def count_tokens(example):
        if example.prompt == "long":
            raise UserError("does not fit", "raise the limit")
        return 1, 1

    report = report_of(("a", "b"), ("long", "b"), ("c", "d"), count_tokens=count_tokens)
    assert (report.used, report.as_dict()["skipped"]) == (2, {"does not fit": {"count": 1, "lines": [2]}})
    with pytest.raises(UserError, match=r"no usable row in train\.json: 1 does not fit"):
        report_of(("long", "b"), count_tokens=count_tokens)


def test_a_file_without_usable_rows_is_rejected():
    with pytest.raises(UserError, match="no usable row"):
        report_of(("a", ""))


def test_lines_of_several_files_are_named_with_their_file():
    parts = [parse_rows(b'{"content": "a", "summary": "b"}\n{"content": "c", "summary": ""}', Path(n)) for n in "xy"]
    report = check([*parts[0], *parts[1]], Columns(), None, 9, 9)
    assert report.skipped["empty response"].lines == ["x:2", "y:2"]
    assert report.duplicates.lines == [["x:1", "y:1"]]
    assert "exact duplicates: 2 rows in 1 groups (lines x:1, y:1)" in report.as_text()
