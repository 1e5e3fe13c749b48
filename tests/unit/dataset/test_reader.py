"""Rows from files in every layout and encoding, and the errors that name file, line and column."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from entrypoints.dataset.reader import parse_rows, read_rows
from entrypoints.errors import UserError

TWO = [{"content": "类型#裤", "summary": "好"}, {"content": "类型#裙", "summary": "美\n丽"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in TWO)
LAYOUTS = {
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


def error_of(path, encoding="utf-8"):
    with pytest.raises(UserError) as caught:
        read_rows(path, encoding)
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".txt", ""])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_content_determines_how_a_file_is_read_not_its_suffix(layout, suffix, tmp_path):
    text, lines = LAYOUTS[layout]
    rows = read_rows(written(tmp_path / f"train{suffix}", text))
    assert [row.fields for row in rows] == TWO
    assert [row.line for row in rows] == lines
    assert {row.file for row in rows} == {tmp_path / f"train{suffix}"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_byte_order_mark_is_not_part_of_the_first_row(layout, tmp_path):
    text, lines = LAYOUTS[layout]
    rows = read_rows(written(tmp_path / "train.json", text, "utf-8-sig"))
    assert [(row.fields, row.line) for row in rows] == list(zip(TWO, lines, strict=True))


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16", "big5"])
def test_another_encoding_can_be_selected(encoding, tmp_path):
    text = LINES if encoding != "big5" else LINES.replace("类", "類").replace("裤", "褲").replace("丽", "麗")
    rows = read_rows(written(tmp_path / "train.json", text, encoding), encoding)
    assert [row.line for row in rows] == [1, 2]
    assert rows[0].fields["summary"] == "好"


def test_invalid_bytes_are_reported_with_file_line_offset_and_remedy(tmp_path):
    path = tmp_path / "train.json"
    path.write_bytes(b'{"content": "a", "summary": "b"}\n' + LINES.encode("gb18030"))
    offset = 33 + len('{"content": "')  # the first line holds 33 bytes
    message = error_of(path)
    assert f"{path}:2: byte {offset} of the file is not utf-8" in message
    assert "--encoding gb18030" in message


def test_the_offset_of_invalid_bytes_counts_a_byte_order_mark(tmp_path):
    path = tmp_path / "train.json"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"content": "\xc0\xe0"}')
    assert "train.json:1: byte 16 " in error_of(path)


@pytest.mark.parametrize(
    ("data", "encoding", "hint"),
    [
        (LINES.encode("utf-16"), "utf-8", "--encoding utf-16"),
        (b"\x1f\x8b\x08\x00", "utf-8", "copy it again"),
        (b'{"content": "\xff"}', "gb18030", "omit --encoding"),
        (b"{}", "gb18O30", "use utf-8 or gb18030"),
        (b"{}", "hex", "use utf-8 or gb18030"),
    ],
)
def test_the_remedy_for_a_wrong_encoding_fits_the_bytes(data, encoding, hint, tmp_path):
    (tmp_path / "train.json").write_bytes(data)
    assert hint in error_of(tmp_path / "train.json", encoding)


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
def test_malformed_json_is_reported_with_file_line_and_column(text, place, tmp_path):
    path = written(tmp_path / "train.json", text)
    assert f"{path}{place}" in error_of(path)


def test_an_unclosed_row_is_reported_with_the_line_in_which_it_starts(tmp_path):
    text = '{"content": "a"}\n{"content": "b"\n{"content": "c"}'
    assert "(the row starts in line 2)" in error_of(written(tmp_path / "train.json", text))


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
def test_a_row_that_is_not_an_object_is_reported_with_file_and_line(text, place, tmp_path):
    path = written(tmp_path / "train.json", text)
    assert f"{path}{place}" in error_of(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "train.json is empty"),
        (b"\n \n", "train.json contains no rows"),
        (b"[]", "train.json contains no rows"),
        (b"\xef\xbb\xbf", "train.json contains no rows"),
    ],
)
def test_a_file_without_rows_is_rejected(data, message, tmp_path):
    (tmp_path / "train.json").write_bytes(data)
    assert message in error_of(tmp_path / "train.json")


def test_a_missing_file_and_a_directory_are_rejected(tmp_path):
    assert f"file not found: {tmp_path / 'train.json'}" in error_of(tmp_path / "train.json")
    assert f"{tmp_path} contains no file of rows" in error_of(tmp_path)
    written(tmp_path / "file", "{}")
    assert "cannot read" in error_of(tmp_path / "file" / "train.json")


def test_reading_does_not_depend_on_the_locale(tmp_path):
    """open() without an encoding decodes by locale; GBK and C locales then break UTF-8 files."""
    path = written(tmp_path / "train.json", LINES)
    code = (
        "import sys, locale, pathlib; from entrypoints.dataset.reader import read_rows; "
        "assert locale.getpreferredencoding(False) == 'ANSI_X3.4-1968', locale.getpreferredencoding(False); "
        "print(ascii([row.fields for row in read_rows(pathlib.Path(sys.argv[1]))]))"
    )
    env = {"PATH": os.environ["PATH"], "LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code, str(path)], env=env, capture_output=True, check=True)
    assert done.stdout.decode("ascii").strip() == ascii(TWO)


@pytest.mark.parametrize("layout", ["array", "pretty objects"])
def test_a_hundred_thousand_rows_take_seconds(layout):
    """0.5 s of CPU time on an idle machine; quadratic reading takes minutes."""
    row = {"content": "类型#裤*材质#牛仔布" * 4, "summary": "简约而不简单" * 15}
    text = json.dumps([row] * 100_000) if layout == "array" else "\n".join([json.dumps(row, indent=4)] * 100_000)
    start = time.process_time()
    read = parse_rows(text.encode(), Path("train.json"))
    assert time.process_time() - start < 10
    assert len(read) == 100_000
    assert read[-1].line == (1 if layout == "array" else 4 * 100_000 - 3)
