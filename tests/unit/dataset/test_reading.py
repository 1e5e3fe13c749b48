"""Trap names (F1 to F5) are those of the list of reported pains."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from entrypoints.dataset.reading import Columns, Example, Skipped, examples, parse_rows, read_rows
from entrypoints.errors import UserError

TWO = [{"content": "类型#裤", "summary": "好"}, {"content": "类型#裙", "summary": "美\n丽"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in TWO)
SHAPES = {
    "lines": (LINES, [1, 2]),
    "lines without a last line break": (LINES.rstrip("\n"), [1, 2]),
    "lines with blank lines": ("\n  \n" + LINES.replace("\n", "\n\n\t\n"), [3, 6]),
    "lines of a Windows editor": (LINES.replace("\n", "\r\n"), [1, 2]),
    "lines of an old Mac": (LINES.replace("\n", "\r"), [1, 1]),
    "one array": (json.dumps(TWO), [1, 1]),
    "a pretty array": (json.dumps(TWO, ensure_ascii=False, indent=4), [2, 6]),
    "pretty objects one after another": (
        "\n".join(json.dumps(row, ensure_ascii=False, indent=4) for row in TWO),
        [1, 5],
    ),
    "objects on one line": ("".join(json.dumps(row) for row in TWO), [1, 1]),
    "an array for each row": ("\n".join(json.dumps([row]) for row in TWO), [1, 2]),
}


def written(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def rows_of(tmp_path, *fields, name="train.json"):
    return read_rows(written(tmp_path / name, "\n".join(json.dumps(row) for row in fields)))


def refusal(path, encoding="utf-8"):
    with pytest.raises(UserError) as caught:
        read_rows(path, encoding)
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".txt", ""])
@pytest.mark.parametrize("shape", SHAPES)
def test_content_decides_how_a_file_is_read_and_the_suffix_does_not(shape, suffix, tmp_path):
    text, lines = SHAPES[shape]
    rows = read_rows(written(tmp_path / f"train{suffix}", text))
    assert [row.fields for row in rows] == TWO
    assert [row.line for row in rows] == lines
    assert {row.file for row in rows} == {tmp_path / f"train{suffix}"}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_byte_order_mark_is_not_part_of_the_first_row(shape, tmp_path):
    text, lines = SHAPES[shape]
    rows = read_rows(written(tmp_path / "train.json", text, "utf-8-sig"))
    assert [(row.fields, row.line) for row in rows] == list(zip(TWO, lines, strict=True))


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16", "big5"])
def test_another_encoding_can_be_named(encoding, tmp_path):
    text = LINES if encoding != "big5" else LINES.replace("类", "類").replace("裤", "褲").replace("丽", "麗")
    rows = read_rows(written(tmp_path / "train.json", text, encoding), encoding)
    assert [row.line for row in rows] == [1, 2]
    assert rows[0].fields["summary"] == "好"


def test_undecodable_bytes_are_named_by_file_line_and_offset_with_the_remedy(tmp_path):
    path = tmp_path / "train.json"
    path.write_bytes(b'{"content": "a", "summary": "b"}\n' + LINES.encode("gb18030"))
    offset = 33 + len('{"content": "')  # the first line holds 33 bytes
    message = refusal(path)
    assert f"{path}:2: byte {offset} of the file is not utf-8" in message
    assert "--encoding gb18030" in message


def test_the_offset_of_undecodable_bytes_counts_a_byte_order_mark(tmp_path):
    path = tmp_path / "train.json"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"content": "\xc0\xe0"}')
    assert "train.json:1: byte 16 " in refusal(path)


@pytest.mark.parametrize(
    ("data", "encoding", "hint"),
    [
        (LINES.encode("utf-16"), "utf-8", "--encoding utf-16"),
        (b"\x1f\x8b\x08\x00", "utf-8", "it is gzip"),
        (b'{"content": "\xff"}', "gb18030", "leave --encoding out"),
        (b"{}", "gb18O30", "use utf-8 or gb18030"),
        (b"{}", "hex", "use utf-8 or gb18030"),
    ],
)
def test_the_remedy_for_an_encoding_fits_the_bytes(data, encoding, hint, tmp_path):
    (tmp_path / "train.json").write_bytes(data)
    assert hint in refusal(tmp_path / "train.json", encoding)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"content": "a"}\n\n{"content": }\n', ":3:13: not JSON: Expecting value"),
        ('{"content": "a"}\n{"content": "b"\n{"content": "c"}', ":3:1: not JSON: Expecting ',' delimiter"),
        ('[{"content": "a"},\n {"content": "b"}', ":2:18: not JSON: expecting ',' or ']'"),
        ('[{"content": "a"}\n {"content": "b"}]', ":2:2: not JSON: expecting ',' or ']'"),
        ('[{"content": "a"},\n]', ":2:1: not JSON: Expecting value"),
        ("content,summary\na,b\n", ":1:1: not JSON: Expecting value"),
        ('{"content": "a"}\n{"content": "类\n型"}', ":2:15: not JSON: Invalid control character"),
        ('{"a": ' * 200_000, ":1:1: not JSON: maximum recursion depth"),
        ('{"a": ' + "1" * 5000 + "}", ":1:1: not JSON: Exceeds the limit"),
    ],
)
def test_malformed_json_is_named_by_file_line_and_column(text, place, tmp_path):
    path = written(tmp_path / "train.json", text)
    assert f"{path}{place}" in refusal(path)


def test_a_row_that_never_closes_is_named_by_the_line_it_starts_in(tmp_path):
    text = '{"content": "a"}\n{"content": "b"\n{"content": "c"}'
    assert "(the row starts in line 2)" in refusal(written(tmp_path / "train.json", text))


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{}\n"b"', ":2: this row is a string, not an object"),
        ('{}\n[["q", "a"]]', ":2: this row is an array, not an object"),
        ("[{},\n null]", ":2: this row is null, not an object"),
        ("[{},\n\n 1.5]", ":3: this row is a number, not an object"),
        ("true", ":1: this row is a boolean, not an object"),
    ],
)
def test_a_row_that_is_no_object_is_named_by_file_and_line(text, place, tmp_path):
    path = written(tmp_path / "train.json", text)
    assert f"{path}{place}" in refusal(path)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "train.json is empty"),
        (b"\n \n", "train.json holds no rows"),
        (b"[]", "train.json holds no rows"),
        (b"\xef\xbb\xbf", "train.json holds no rows"),
    ],
)
def test_a_file_without_rows_is_refused(data, words, tmp_path):
    (tmp_path / "train.json").write_bytes(data)
    assert words in refusal(tmp_path / "train.json")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert f"there is no file {tmp_path / 'train.json'}" in refusal(tmp_path / "train.json")
    assert f"{tmp_path} is a folder" in refusal(tmp_path)
    written(tmp_path / "file", "{}")
    assert "cannot read" in refusal(tmp_path / "file" / "train.json")


def test_reading_does_not_depend_on_the_locale(tmp_path):
    """F3: open() without an encoding decodes by locale; GBK and C locales then break UTF-8 files."""
    path = written(tmp_path / "train.json", LINES)
    code = (
        "import sys, locale, pathlib; from entrypoints.dataset.reading import read_rows; "
        "assert locale.getpreferredencoding(False) == 'ANSI_X3.4-1968', locale.getpreferredencoding(False); "
        "print(ascii([row.fields for row in read_rows(pathlib.Path(sys.argv[1]))]))"
    )
    env = {"PATH": os.environ["PATH"], "LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code, str(path)], env=env, capture_output=True, check=True)
    assert done.stdout.decode("ascii").strip() == ascii(TWO)


@pytest.mark.parametrize("shape", ["lines", "array", "pretty"])
def test_a_hundred_thousand_rows_take_seconds(shape):
    """0.5 s on the machine this was written on; 10 s leaves room for a busy one, quadratic reading takes minutes."""
    row = {"content": "类型#裤*材质#牛仔布" * 4, "summary": "简约而不简单" * 15}
    lines = "\n".join([json.dumps(row, indent=4 if shape == "pretty" else None)] * 100_000)
    text = json.dumps([row] * 100_000) if shape == "array" else lines
    start = time.perf_counter()
    read = parse_rows(text.encode(), Path("train.json"))
    assert time.perf_counter() - start < 10
    assert len(read) == 100_000
    assert read[-1].line == {"lines": 100_000, "array": 1, "pretty": 4 * 100_000 - 3}[shape]


def test_a_column_that_no_row_has_is_refused_with_the_columns_there_are(tmp_path):
    with pytest.raises(UserError) as caught:
        examples(rows_of(tmp_path, *TWO), Columns(response="response"))
    assert caught.value.problem == "no column 'response' in train.json; columns: content, summary"
    assert caught.value.remedy == "name the right one with --response-column"


def test_all_missing_columns_are_named_at_once(tmp_path):
    with pytest.raises(UserError) as caught:
        examples(rows_of(tmp_path, *TWO), Columns("prompt", "response", "history"))
    assert caught.value.problem == (
        "no column 'prompt' and no column 'response' and no column 'history' in train.json; columns: content, summary"
    )
    assert all(flag in caught.value.remedy for flag in ("--prompt-column", "--response-column", "--history-column"))


def test_unusable_cells_are_skipped_with_a_reason_and_the_rest_keeps_its_index(tmp_path):
    """F5: the reference drops such rows silently, and predictions no longer line up with the file."""
    rows = rows_of(
        tmp_path,
        {"content": "a", "summary": ""},
        {"content": None, "summary": "b"},
        {"content": "c", "summary": "d"},
        {"content": 1, "summary": 2},
    )
    used, skipped = examples(rows, Columns())
    path = tmp_path / "train.json"
    assert used == [Example(path, 3, 2, "c", "d", [])]
    reasons = [(1, "empty response"), (2, "null prompt"), (4, "prompt is not a string")]
    assert skipped == [Skipped(path, line, reason) for line, reason in reasons]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"summary": "b"}, "no column 'content'"),
        ({"content": "a"}, "no column 'summary'"),
        ({"content": "", "summary": "b"}, "empty prompt"),
        ({"content": " \n\u3000", "summary": "b"}, "empty prompt"),
        ({"content": "a", "summary": None}, "null response"),
        ({"content": "a", "summary": ["b"]}, "response is not a string"),
        ({"content": True, "summary": "b"}, "prompt is not a string"),
        ({"content": "a\ud83d", "summary": "b"}, "prompt holds half a character (a lone surrogate)"),
    ],
)
def test_every_unusable_row_has_its_reason(fields, reason, tmp_path):
    used, skipped = examples(rows_of(tmp_path, {"content": "x", "summary": "y"}, fields), Columns())
    assert [example.index for example in used] == [0]
    assert [(row.line, row.reason) for row in skipped] == [(2, reason)]


@pytest.mark.parametrize("history", ["q", {}, 0, False, ["q", "a"], [["q"]], [["q", None]], [["q", "a", "b"]]])
def test_history_that_is_not_pairs_of_texts_skips_the_row(history, tmp_path):
    good = {"content": "x", "summary": "y", "history": []}
    _, skipped = examples(rows_of(tmp_path, good, {**good, "history": history}), Columns(history="history"))
    assert [(row.line, row.reason) for row in skipped] == [(2, "history is not a list of [question, answer] pairs")]


def test_half_a_character_in_the_history_skips_the_row(tmp_path):
    good = {"content": "x", "summary": "y", "history": []}
    _, skipped = examples(rows_of(tmp_path, good, {**good, "history": [["\ude00", ""]]}), Columns(history="history"))
    assert [row.reason for row in skipped] == ["history holds half a character (a lone surrogate)"]


def test_a_whole_emoji_written_as_two_escapes_is_a_character(tmp_path):
    path = written(tmp_path / "train.json", r'{"content": "\ud83d\ude00", "summary": "b"}')
    assert examples(read_rows(path), Columns())[0][0].prompt == "😀"


def test_history_is_pairs_and_empty_null_or_absent_history_is_none(tmp_path):
    rows = rows_of(
        tmp_path,
        {"content": "a", "summary": "b", "history": [["q", "r"], ["s", ""]]},
        {"content": "a", "summary": "b", "history": []},
        {"content": "a", "summary": "b", "history": None},
        {"content": "a", "summary": "b"},
    )
    used, skipped = examples(rows, Columns(history="history"))
    assert [example.history for example in used] == [[("q", "r"), ("s", "")], [], [], []]
    assert skipped == []


def test_a_history_column_that_is_not_asked_for_is_ignored(tmp_path):
    used, _ = examples(rows_of(tmp_path, {"content": "a", "summary": "b", "history": 7}), Columns())
    assert used[0].history == []


def test_a_file_without_a_usable_row_is_refused_with_the_counts(tmp_path):
    rows = rows_of(
        tmp_path, {"content": "a", "summary": ""}, {"content": "b", "summary": ""}, {"content": None, "summary": "c"}
    )
    with pytest.raises(
        UserError, match=r"no usable row in train.json: 2 empty response, 1 null prompt \(first in line 1\)"
    ):
        examples(rows, Columns())


def test_strict_reading_refuses_a_single_skipped_row(tmp_path):
    rows = rows_of(tmp_path, *TWO, {"content": "b", "summary": ""})
    with pytest.raises(UserError, match=r"1 of 3 rows in train.json: 1 empty response \(first in line 3\)"):
        examples(rows, Columns(), strict=True)


def test_rows_of_two_files_keep_the_index_in_their_own_file(tmp_path):
    used, _ = examples(rows_of(tmp_path, *TWO, name="a.json") + rows_of(tmp_path, *TWO, name="b.json"), Columns())
    assert " ".join(f"{example.file.name}:{example.index}" for example in used) == "a.json:0 a.json:1 b.json:0 b.json:1"


def test_no_rows_at_all_are_refused():
    with pytest.raises(UserError, match="there are no rows"):
        examples([], Columns())


CALL = {"function": {"name": "f", "arguments": "{}"}}
QUESTION = {"role": "user", "content": "u"}


@pytest.mark.parametrize(
    ("more", "answer", "reason"),
    [
        ({"tools": '[{"name": "f"}]'}, {"content": "a"}, "'tools' is not a list of tools"),
        ({"tools": [{"function": {}}]}, {"content": "a"}, "tools.0 has no name"),
        (
            {"tools": [{"name": "\ud83d"}]},
            {"content": "a"},
            "the conversation holds half a character (a lone surrogate)",
        ),
        ({}, {"content": "a", "tool_calls": [CALL]}, "the last answer is more than one turn: one text or one call"),
        (
            {},
            {"content": None, "tool_calls": [CALL, CALL]},
            "the last answer is more than one turn: one text or one call",
        ),
        ({}, {"content": None, "tool_calls": [{}]}, "messages.1.tool_calls.0 is no call of a function"),
    ],
)
def test_a_conversation_with_malformed_tools_is_skipped_with_its_reason(more, answer, reason, tmp_path):
    """F7."""
    good = {"talk": [QUESTION, {"role": "assistant", "content": "a"}], "tools": None}
    bad = {"talk": [QUESTION, {"role": "assistant", **answer}], **more}
    used, skipped = examples(rows_of(tmp_path, good, bad), Columns(conversations="talk"))
    assert (len(used), [row.reason for row in skipped]) == (1, [reason])
