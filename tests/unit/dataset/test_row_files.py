"""Where rows are: compressed files, tables, folders and globs; spreadsheets and archives are refused with a command."""

import bz2
import datetime
import gzip
import io
import json
import lzma
import os
import shlex
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pyarrow
import pyarrow.parquet
import pytest

from entrypoints.dataset import json_stream, row_files
from entrypoints.dataset.reader import read_rows
from entrypoints.dataset.split import SplitOptions, split, write_split
from entrypoints.errors import UserError

ROWS = [{"content": f"类型#裙*第{number}条", "summary": "好看。" * number} for number in range(1, 8)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
}


def fields_of(path, encoding="utf-8"):
    return [row.fields for row in read_rows(path, encoding)]


def error_of(path):
    with pytest.raises(UserError) as caught:
        read_rows(path)
    return caught.value


def written(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("chunk", [3, 1 << 20])
@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows"])
def test_compressed_files_are_read_whatever_their_name(name, suffix, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", chunk)
    compressed = COMPRESS[suffix](LINES)
    assert fields_of(written(tmp_path / f"{name}{suffix}", compressed)) == ROWS
    assert fields_of(written(tmp_path / name, compressed)) == ROWS


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_truncated_compressed_file_is_an_error_that_names_it(suffix, tmp_path):
    data = COMPRESS[suffix](LINES * 50)
    error = error_of(written(tmp_path / f"rows.jsonl{suffix}", data[: len(data) // 2]))
    assert f"rows.jsonl{suffix}" in error.problem


def csv_text(delimiter=","):
    quoted = [
        delimiter.join(f'"{cell}"' for cell in (row["content"], row["summary"].replace("。", f'"",{delimiter}\n', 1)))
        for row in ROWS
    ]
    return delimiter.join(ROWS[0]) + "\r\n" + "\r\n".join(quoted) + "\r\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16"])
@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".csv", ";"), (".csv", "\t"), (".tsv", "\t")])
def test_csv_is_read_with_quotes_line_breaks_and_the_delimiter_of_its_first_line(
    suffix, delimiter, encoding, tmp_path, monkeypatch
):
    """Excel writes a byte order mark, and semicolons where the comma is the decimal sign."""
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", 5)
    path = written(tmp_path / f"rows{suffix}", csv_text(delimiter).encode(encoding))
    rows = read_rows(path, encoding.removesuffix("-sig"))
    expected = [{**row, "summary": row["summary"].replace("。", f'",{delimiter}\n', 1)} for row in ROWS]
    assert [row.fields for row in rows] == expected
    assert [row.line for row in rows] == [2 + 2 * number for number in range(len(ROWS))]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a,b\n1,2\n1,2,3\n", "rows.csv:3: 3 fields, the first line names 2 columns"),
        ("a,b\n1\n", "rows.csv:2: 1 fields"),
        ('a,b\n1,"2\n3,4\n', "rows.csv:2: not CSV: unexpected end of data"),
        ("a,a\n1,2\n", "rows.csv:1: the column 'a' is there twice"),
        ("a,,,b\n1,2,3,4\n", "rows.csv:1: the column '' is there twice"),
        ("a,b\n", "rows.csv contains no rows"),
        ("", "rows.csv is empty"),
    ],
)
def test_a_malformed_csv_file_is_an_error_with_its_line(text, problem, tmp_path):
    assert problem in error_of(written(tmp_path / "rows.csv", text.encode())).problem


@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_csv_whose_lines_end_with_a_carriage_return_alone_is_read(encoding, chunk, tmp_path, monkeypatch):
    """Excel for Mac saves it; a line break inside a cell is a line feed there."""
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", chunk)
    text = 'content,summary\r裙,"好,\n看"\r\r裤,"又\r好"\r'
    rows = read_rows(written(tmp_path / "rows.csv", text.encode(encoding)), encoding)
    assert [row.fields for row in rows] == [
        {"content": "裙", "summary": "好,\n看"}, {"content": "裤", "summary": "又\n好"}
    ]  # fmt: skip
    assert [row.line for row in rows] == [2, 4]


def test_columns_at_the_end_of_a_csv_file_without_name_and_value_are_ignored(tmp_path):
    """Excel saves columns of which only the format was set, and omits them in some rows."""
    text = "content,summary,,\n裙,好看,, \n裤,又好,\n衣,很好\n"
    assert fields_of(written(tmp_path / "rows.csv", text.encode())) == [
        {"content": "裙", "summary": "好看"}, {"content": "裤", "summary": "又好"}, {"content": "衣", "summary": "很好"}
    ]  # fmt: skip
    error = error_of(written(tmp_path / "rows.csv", (text + "鞋,好看,又便宜,\n").encode()))
    assert error.problem.endswith("rows.csv:5: a value in column 3, which has no name in the first line")
    assert error.remedy == "name the column, or put text that contains ',' in double quotes"
    for line, count in (("鞋", 1), ("鞋,1,,,", 5)):
        error = error_of(written(tmp_path / "rows.csv", f"{text}{line}\n".encode()))
        assert error.problem.endswith(f"rows.csv:5: {count} fields, the first line names 4 columns")


def test_json_in_a_file_named_csv_is_json_and_csv_under_another_name_is_named_as_such(tmp_path):
    assert fields_of(written(tmp_path / "rows.csv", LINES)) == ROWS
    error = error_of(written(tmp_path / "rows.json", b"content,summary\na,b\n"))
    assert "not JSON" in error.problem
    assert "name CSV files .csv or .tsv" in error.remedy


def tables(folder):
    """The rows as Parquet, as an Arrow file and as the stream that Hugging Face datasets writes."""
    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, folder / "rows.parquet", row_group_size=3)
    for name, opener in (("file", pyarrow.ipc.new_file), ("stream", pyarrow.ipc.new_stream)):
        with opener(str(folder / f"{name}.arrow"), table.schema) as writer:
            for batch in table.to_batches(max_chunksize=2):
                writer.write_batch(batch)
    return [folder / "rows.parquet", folder / "file.arrow", folder / "stream.arrow"]


def test_tables_are_read_row_by_row(tmp_path):
    for path in tables(tmp_path):
        rows = read_rows(path)
        assert [row.fields for row in rows] == ROWS
        assert [row.line for row in rows] == list(range(1, 8))
        renamed = path.rename(path.with_suffix(".data"))
        assert fields_of(renamed) == ROWS


def test_a_truncated_table_is_an_error_that_names_it(tmp_path):
    for path in tables(tmp_path):
        path.write_bytes(path.read_bytes()[:-150])
        assert error_of(path).problem.startswith(f"{path} is not a complete ")


def test_a_folder_and_a_glob_are_their_parts_in_natural_order(tmp_path):
    for number in (10, 2, 1):
        written(tmp_path / "data" / f"part-{number}.jsonl", json.dumps({"n": number}).encode())
    written(tmp_path / "data" / "part-11.jsonl.gz", gzip.compress(b'{"n": 11}'))
    written(tmp_path / "data" / "README.md", b"about the rows")
    written(tmp_path / "data" / ".hidden.jsonl", b"{")
    found = [{"n": number} for number in (1, 2, 10, 11)]
    assert fields_of(tmp_path / "data") == found
    assert fields_of(tmp_path / "data" / "part-*.jsonl*") == found
    assert fields_of(tmp_path / "data" / "part-1*.jsonl") == found[::2]
    assert [file.name for file in row_files.ignored_files(tmp_path / "data")] == ["README.md"]


def test_a_dataset_saved_by_hugging_face_datasets_is_read(tmp_path):
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved", num_shards=2)
    assert fields_of(tmp_path / "saved") == ROWS


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (("train.json", "dev.json"), "holds several splits: dev.json, train.json"),
        (("train-00.parquet", "test-00.parquet"), "holds several splits: test-00.parquet, train-00.parquet"),
        (("a.jsonl", "b.csv"), "holds several kinds of files: a.jsonl, b.csv"),
        (("README.md",), "contains no file of rows"),
    ],
)
def test_a_folder_of_which_only_some_files_are_meant_is_refused(names, problem, tmp_path):
    """Development rows must not become training rows, and rows in two forms not be read twice."""
    for name in names:
        written(tmp_path / "data" / name, LINES)
    assert problem in error_of(tmp_path / "data").problem


def test_a_glob_without_a_match_and_a_missing_file_are_reported(tmp_path):
    assert error_of(tmp_path / "part-*.jsonl").problem == f"no file matches {tmp_path / 'part-*.jsonl'}"
    assert error_of(tmp_path / "rows.jsonl").problem == f"file not found: {tmp_path / 'rows.jsonl'}"


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    "text",
    [
        '{"data": [ROWS]}',
        '{"version": "1.0 \\"beta\\"", "n": -1.5e3, "data": [ROWS], "license": {"name": "x"}, "more": [1]}',
        '\ufeff{\n  "data" : [\n ROWS\n ]\n}\n',
        '{"data": [ROW0]}\n{"data": [ROWS1]}',
    ],
)
def test_rows_in_an_object_under_data_are_the_rows(text, chunk, tmp_path, monkeypatch):
    """They are streamed like those of an array."""
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", chunk)
    rows = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    text = text.replace("ROWS1", ", ".join(rows[1:])).replace("ROW0", rows[0]).replace("ROWS", ",\n".join(rows))
    assert fields_of(written(tmp_path / "rows.json", text.encode())) == ROWS


def test_a_column_named_data_with_messages_is_not_a_wrapper(tmp_path):
    rows = [{"data": [{"role": "user", "content": "a"}]}, {"id": 1, "data": [{"from": "human", "value": "b"}]}]
    rows += [{"data": ["a", "b"]}, {"data": []}, {"data": None}]
    text = "\n".join(map(json.dumps, rows)).encode()
    assert fields_of(written(tmp_path / "rows.jsonl", text)) == rows


def test_an_incomplete_wrapper_is_an_error_with_its_place(tmp_path):
    path = written(tmp_path / "rows.json", b'{"data": [{"a": 1}]\n')
    assert error_of(path).problem == f"{path}:2:1: not JSON: expecting ',' or '}}' (the row starts in line 2)" or (
        f"{path}:2:1: not JSON" in error_of(path).problem
    )


def zip_of(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return buffer.getvalue()


def tar_of(members, mode):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def command_of(error):
    """The command in a remedy, run by the Python of this test where it says `python`."""
    command = error.remedy.partition(": ")[2]
    return command.replace("python ", f"{shlex.quote(sys.executable)} ", 1)


ARCHIVES = {
    "my rows.zip": (zip_of({"part-1.jsonl": LINES}), "is a zip archive"),
    "it's.tar": (tar_of({"part-1.jsonl": LINES}, "w"), "is a tar archive"),
    "rows.tar.gz": (tar_of({"part-1.jsonl": LINES}, "w:gz"), "is a tar archive"),
    "rows.tgz": (tar_of({"part-1.jsonl": LINES}, "w:xz"), "is a tar archive"),
    "rows.jsonl": (tar_of({"part-1.jsonl": LINES}, "w:bz2"), "is a tar archive"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_is_refused_by_name_and_the_command_of_the_message_unpacks_it(name, tmp_path):
    data, problem = ARCHIVES[name]
    path = written(tmp_path / "my data" / name, data)
    error = error_of(path)
    assert error.problem == f"{path} {problem}"
    before = set(path.parent.iterdir())
    subprocess.run(command_of(error), shell=True, check=True, capture_output=True)
    (folder,) = set(path.parent.iterdir()) - before or {path.with_name("rows")}
    assert fields_of(folder) == ROWS


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("rows.xlsx", zip_of({"xl/workbook.xml": "<workbook/>"}), "is an Excel workbook"),
        ("rows.ods", zip_of({"content.xml": "<office/>"}), "is an OpenDocument file"),
        ("rows.xls", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "is an Excel workbook"),
        ("rows.json", zip_of({"xl/workbook.xml": "<workbook/>"}), "is an Excel workbook"),
    ],
)
def test_a_spreadsheet_is_refused_by_name_with_the_command_that_writes_csv(name, data, problem, tmp_path):
    path = written(tmp_path / name, data)
    error = error_of(path)
    assert error.problem == f"{path} {problem}"
    assert error.remedy.startswith("save it as CSV in UTF-8, or run (with pandas and openpyxl): python -c ")


def test_the_command_for_a_workbook_writes_a_csv_file_that_is_read(tmp_path):
    pandas, _ = pytest.importorskip("pandas"), pytest.importorskip("openpyxl", reason="openpyxl is not installed")
    path = tmp_path / "it's.xlsx"
    pandas.DataFrame(ROWS).to_excel(path, index=False)
    subprocess.run(command_of(error_of(path)), shell=True, check=True)
    assert fields_of(path.with_suffix(".csv")) == ROWS


@pytest.mark.parametrize(
    ("data", "kind"), [(b"7z\xbc\xaf\x27\x1c\0\4", "a 7z archive"), (b"Rar!\x1a\7\1", "a RAR archive")]
)
def test_other_archives_are_refused_by_name(data, kind, tmp_path):
    path = written(tmp_path / "rows.jsonl", data)
    assert error_of(path).problem == f"{path} is {kind}"


def test_rows_come_through_a_pipe(tmp_path):
    """`glm evaluate --test-file <(command)`: the bytes can be read once."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(pipe.write_bytes, LINES)
        assert fields_of(pipe) == ROWS
        writing.result(timeout=60)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_compressed_rows_under_a_name_that_says_nothing_can_be_split(encoding, tmp_path):
    path = written(tmp_path / "rows.gz", gzip.compress(LINES.decode().encode(encoding)))
    assert len(split(path, encoding.removesuffix("-sig"), SplitOptions(rows=2)).train) == 5


def test_a_compressed_file_and_a_table_with_dates_can_be_split(tmp_path):
    days = [{**row, "day": datetime.date(2024, 1, number)} for number, row in enumerate(ROWS, start=1)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(days), tmp_path / "rows.parquet")
    written(tmp_path / "rows.jsonl.gz", gzip.compress(LINES))
    for name in ("rows.parquet", "rows.jsonl.gz"):
        train, dev = write_split(split(tmp_path / name, "utf-8", SplitOptions(rows=2)), tmp_path / name[5:], False)
        assert len(fields_of(train)) == len(ROWS) - 2
        assert {row["content"] for row in fields_of(train) + fields_of(dev)} == {row["content"] for row in ROWS}
    assert fields_of(tmp_path / "parquet" / "dev.jsonl")[0]["day"].startswith("2024-01-0")


def test_without_pyarrow_text_is_read_and_a_table_names_the_package(tmp_path, monkeypatch):
    """The image for quantized models has none."""
    paths = tables(tmp_path)
    compressed = written(tmp_path / "rows.zst", COMPRESS[".zst"](LINES))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert fields_of(written(tmp_path / "rows.gz", gzip.compress(LINES))) == ROWS
    for path in (*paths, compressed):
        assert error_of(path).problem == f"reading {path} needs the package pyarrow"


@pytest.mark.parametrize("text", ["a,b\n" + "x" * 5000, 'a,b\n1,"' + "y\n" * 3000])
def test_a_csv_row_without_an_end_is_not_read_into_memory(text, tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", 100)
    monkeypatch.setattr(json_stream, "MAX_ROW_CHARS", 1000)
    problem = error_of(written(tmp_path / "rows.csv", text.encode())).problem
    assert "a line of more than" in problem or "field larger than field limit (1000)" in problem
