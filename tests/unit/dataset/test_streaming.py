"""Files that are read piece by piece: the same rows and the same mistakes as of a file in one piece."""

import json

import pytest

from entrypoints.dataset import reading, scanning
from entrypoints.dataset.columns import Columns
from entrypoints.dataset.reading import Example, examples, read_rows, require_columns, stream_examples, stream_rows
from entrypoints.errors import UserError

ROWS = [{"content": f"类型#裙*第{number}条👋", "summary": "好看。" * number, "n": -1.5e3} for number in range(1, 30)]
LAYOUTS = {
    "lines": "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
    "escaped": "\r\n\r\n".join(json.dumps(row) for row in ROWS) + "\n",
    "array": json.dumps(ROWS, ensure_ascii=False),
    "pretty array": json.dumps(ROWS, ensure_ascii=False, indent=2),
    "pretty objects": "\n".join(json.dumps(row, ensure_ascii=False, indent=4) for row in ROWS),
    "byte order mark": "\ufeff" + json.dumps(ROWS[:1]),
}


@pytest.fixture(params=[1, 7, 64])
def small_pieces(request, monkeypatch):
    """Bytes a piece: cuts through characters, numbers, escapes and rows."""
    monkeypatch.setattr(scanning, "PIECE", request.param)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("encoding", ["utf-8", "gb18030"])
def test_every_layout_gives_the_rows_of_the_whole_file(layout, encoding, small_pieces, tmp_path):
    file = tmp_path / "rows.json"
    file.write_bytes(LAYOUTS[layout].encode(encoding))
    assert list(stream_rows(file, encoding)) == read_rows(file, encoding)


@pytest.mark.parametrize(
    "text",
    [
        b'{"content": "a"}\n\n{"content": }\n',
        b'[{"content": "a"},\n {"content": "b"} {"content": "c"}]',
        b'[{"content": "a"}',
        b'{"content": "a"}\n{"content": "b',
        b'{"content": "a"}\n[1]',
        b'{"content": "a"} "text"',
        b'{"content": "a\nb"}',
        '{"content": "好"}\n{"content": "坏'.encode() + b'\xff"}',
        b"",
        b" \n ",
    ],
)
def test_a_mistake_is_told_as_that_of_the_whole_file(text, small_pieces, tmp_path):
    """F1, F3: with line and column."""
    file = tmp_path / "rows.json"
    file.write_bytes(text)
    with pytest.raises(UserError) as whole:
        read_rows(file)
    with pytest.raises(UserError) as streamed:
        list(stream_rows(file))
    assert str(streamed.value) == str(whole.value)


def test_an_encoding_nobody_knows_is_told(tmp_path):
    (tmp_path / "rows.json").write_text("{}")
    with pytest.raises(UserError, match="--encoding latin-99 is no known encoding"):
        list(stream_rows(tmp_path / "rows.json", "latin-99"))


def test_rows_one_by_one_are_used_and_skipped_as_in_a_list(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"content": "a", "summary": ""}, {"content": None, "summary": "b"}, {"content": "c", "summary": "d"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    used, skipped = examples(read_rows(file), Columns())
    found = list(stream_examples(stream_rows(file), Columns()))
    assert [row for row in found if isinstance(row, Example)] == used
    assert [row for row in found if not isinstance(row, Example)] == skipped
    assert len(found) == 3


def test_a_column_that_no_row_has_is_told_by_the_first_rows(tmp_path, monkeypatch):
    """F4: what a huge file holds behind them is not read; a history may come late."""
    monkeypatch.setattr(reading, "EARLY", 5)
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS[:6])) + "\nnot JSON")
    with pytest.raises(UserError, match=r"no column 'ask' in rows\.jsonl; columns: content, summary, n"):
        require_columns(file, "utf-8", Columns(prompt="ask"))
    require_columns(file, "utf-8", Columns(history="before"))
    file.write_text("\n".join(map(json.dumps, ROWS)))
    with pytest.raises(UserError, match="no column 'before'"):
        list(stream_examples(stream_rows(file), Columns(history="before")))


def test_a_file_of_unusable_rows_is_a_mistake(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"content": "a", "summary": ""}')
    with pytest.raises(UserError, match=r"no usable row in rows\.jsonl: 1 empty response"):
        list(stream_examples(stream_rows(file), Columns()))
