"""Files read in chunks: the same rows and the same errors as for a file read at once."""

import json
import tracemalloc

import pytest

from entrypoints.dataset import json_stream, reader
from entrypoints.dataset.columns import Columns
from entrypoints.dataset.reader import (
    Example,
    examples,
    parse_rows,
    read_rows,
    require_columns,
    stream_examples,
    stream_rows,
)
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
def small_chunks(request, monkeypatch):
    """Chunk sizes in bytes that divide characters, numbers, escapes and rows."""
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", request.param)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("encoding", ["utf-8", "gb18030"])
def test_every_layout_gives_the_rows_of_the_whole_file(layout, encoding, small_chunks, tmp_path):
    file = tmp_path / "rows.json"
    file.write_bytes(LAYOUTS[layout].encode(encoding))
    expected = parse_rows(file.read_bytes(), file, encoding)
    assert len(expected) == (1 if layout == "byte order mark" else 29)
    assert list(stream_rows(file, encoding)) == expected
    assert read_rows(file, encoding) == expected


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
def test_an_error_is_reported_as_for_the_whole_file(text, small_chunks, tmp_path):
    """With the same line and column, although only a part of the file is in memory."""
    file = tmp_path / "rows.json"
    file.write_bytes(text)
    with pytest.raises(UserError) as whole:
        parse_rows(text, file)
    with pytest.raises(UserError) as streamed:
        list(stream_rows(file))
    assert str(streamed.value) == str(whole.value)


@pytest.mark.parametrize("start", [b"", b'{"content": "', b'{"content": "a"}\n', b"["])
def test_a_sparse_file_of_a_terabyte_is_rejected_without_reading_it(start, tmp_path):
    file = tmp_path / "rows.json"
    with file.open("wb") as stream:
        stream.write(start)
        stream.truncate(10**12)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"rows\.json:\d:\d+: not JSON"):
        read_rows(file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50 << 20


@pytest.mark.parametrize(
    "text", ['{"content": "' + "a" * 5000, '{"n": ' + "[" * 900 + "1, " * 2000, '{"n": ' + " " * 5000]
)
def test_a_row_that_does_not_end_is_rejected_at_its_limit(text, small_chunks, monkeypatch, tmp_path):
    monkeypatch.setattr(json_stream, "MAX_ROW_CHARS", 1000)
    file = tmp_path / "rows.json"
    file.write_text('{"content": "first"}\n' + text)
    with pytest.raises(UserError, match=r"rows\.json:2: this row has more than"):
        read_rows(file)


def test_an_unknown_encoding_is_reported(tmp_path):
    (tmp_path / "rows.json").write_text("{}")
    with pytest.raises(UserError, match="--encoding latin-99 is not a known encoding"):
        list(stream_rows(tmp_path / "rows.json", "latin-99"))


def test_streamed_rows_are_used_and_skipped_as_in_a_list(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"content": "a", "summary": ""}, {"content": None, "summary": "b"}, {"content": "c", "summary": "d"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    used, skipped = examples(read_rows(file), Columns())
    found = list(stream_examples(stream_rows(file), Columns()))
    assert [row for row in found if isinstance(row, Example)] == used
    assert [row for row in found if not isinstance(row, Example)] == skipped
    assert len(found) == 3


def test_a_missing_column_is_reported_from_the_first_rows(tmp_path, monkeypatch):
    """The rest of a huge file is not read; a history column may first appear later."""
    monkeypatch.setattr(reader, "HEAD_ROWS", 5)
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS[:6])) + "\nnot JSON")
    with pytest.raises(UserError, match=r"no column 'ask' in rows\.jsonl; columns: content, summary, n"):
        require_columns(file, "utf-8", Columns(prompt="ask"))
    require_columns(file, "utf-8", Columns(history="before"))
    file.write_text("\n".join(map(json.dumps, ROWS)))
    with pytest.raises(UserError, match="no column 'before'"):
        list(stream_examples(stream_rows(file), Columns(history="before")))


def test_a_file_with_only_unusable_rows_is_an_error(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"content": "a", "summary": ""}')
    with pytest.raises(UserError, match=r"no usable row in rows\.jsonl: 1 empty response"):
        list(stream_examples(stream_rows(file), Columns()))


@pytest.mark.parametrize(
    ("data", "encoding"),
    [('{"a": 1}'.encode("utf-16-le"), "utf-16"), (b"\x00\x00\x00\x00", "utf-32"), (b"\xff\xfe\x00", "utf-16")],
)
def test_text_without_its_byte_order_mark_or_end_is_reported_by_both_readers(data, encoding, tmp_path):
    file = tmp_path / "rows.json"
    file.write_bytes(data)
    for read in (read_rows, lambda *arguments: list(stream_rows(*arguments))):
        with pytest.raises(UserError, match=rf"rows\.json:1: byte \d of the file is not {encoding}"):
            read(file, encoding)


@pytest.mark.parametrize("encoding", ["hex", "zlib", "rot13", "a\0b"])
def test_an_encoding_of_something_other_than_text_is_reported_by_both_readers(encoding, tmp_path):
    file = tmp_path / "rows.json"
    file.write_text("{}")
    for read in (read_rows, lambda *arguments: list(stream_rows(*arguments))):
        with pytest.raises(UserError, match="is not a known encoding"):
            read(file, encoding)
