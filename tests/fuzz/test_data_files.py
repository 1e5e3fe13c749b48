"""Files of training rows and archives of them, damaged by chance."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
from pathlib import Path

import pytest
from fuzzing import fuzz
from mutations import HOSTILE_TEXTS, damage_bytes, damage_json, damage_json_text, hostile_value

from entrypoints.dataset.archive import is_archive, read_members
from entrypoints.dataset.columns import Columns
from entrypoints.dataset.quality import check
from entrypoints.dataset.reader import examples, read_rows, require_columns, stream_rows
from entrypoints.dataset.split import SplitOptions, split, write_split
from entrypoints.errors import UserError

pytestmark = pytest.mark.fuzz
NAMES = ["train.json", "dev.json"]
COLUMNS = (Columns(), Columns(history="history"), Columns(conversations="conversations"))
ENCODINGS = ("utf-8", "gb18030", "utf-16", "ascii", "utf-8-sig")
PACK = (bytes, gzip.compress, bz2.compress, lzma.compress)
TURNS = [
    {"role": "user", "content": "北京天气"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]},
    {"role": "tool", "content": "晴"},
    {"role": "assistant", "content": "晴天"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
ROW = {"content": "类型#裙", "summary": "好看", "history": [["你好", "你好！"]], "conversations": TURNS, "tools": TOOLS}


def file_text(chance):
    """Rows in one of the forms of a file, or something else."""
    rows = [damage_json(ROW, chance) if chance.random() < 0.4 else ROW for _ in range(chance.randrange(1, 5))]
    lines = [json.dumps(row, ensure_ascii=chance.random() < 0.5, indent=chance.choice((None, 2))) for row in rows]
    comma_separated = "content,summary\r\n" + "\r\n".join(f'"{chance.choice(HOSTILE_TEXTS)}",b' for _ in rows)
    forms = (
        "\n".join(lines),
        "".join(lines),
        f"[{','.join(lines)}]",
        comma_separated,
        f"{lines[0]}\n{hostile_value(chance)}",
    )
    data = chance.choice(forms).encode(
        chance.choice(ENCODINGS[:3]), "surrogatepass" if chance.random() < 0 else "replace"
    )
    if chance.random() < 0.4:
        data = damage_bytes(data, chance)
    return chance.choice(PACK)(data) if chance.random() < 0.05 else data


def read(reader, *arguments):
    try:
        return list(reader(*arguments))
    except UserError as error:
        return error


def test_files_of_rows(tmp_path):
    """Both readers agree; every row is used or counted with a reason."""
    file = tmp_path / "rows.jsonl"

    def attempt(chance):
        file.write_bytes(file_text(chance))
        encoding = chance.choice(ENCODINGS)
        whole, streamed = read(read_rows, file, encoding), read(stream_rows, file, encoding)
        assert isinstance(whole, UserError) == isinstance(streamed, UserError), (whole, streamed)
        if isinstance(whole, UserError):
            raise whole
        assert repr(whole) == repr(streamed)  # NaN is not equal to itself
        columns = chance.choice(COLUMNS)
        require_columns(file, encoding, columns)
        used, skipped = examples(whole, columns)
        assert len(used) + len(skipped) == len(whole)
        assert all(example.messages()[-1].content.strip() for example in used)
        report = check(iter(whole), columns, None, 64, 64)
        assert report.used + sum(rows.count for rows in report.skipped.values()) == len(whole)
        json.dumps(report.as_dict(), allow_nan=False)
        report.as_text().encode("utf-8", "backslashreplace")

    fuzz("files_of_rows", attempt, 400)


def archive_bytes(chance):
    stream = io.BytesIO()
    with tarfile.open(
        fileobj=stream, mode="w", format=chance.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    ) as archive:
        for name in chance.choice((NAMES, [*NAMES, "x/train.json"], [f"a/{name}" for name in NAMES])):
            data = json.dumps(ROW).encode() if chance.random() < 0.8 else damage_json_text(ROW, chance)
            info = tarfile.TarInfo(name if chance.random() < 0.9 else f"{chance.choice(HOSTILE_TEXTS)[:300]}/{name}")
            info.size = len(data)
            if chance.random() < 0.1:
                info.type, info.linkname = chance.choice((tarfile.SYMTYPE, tarfile.LNKTYPE)), "/etc/passwd"
            try:
                archive.addfile(info, io.BytesIO(data))
            except (ValueError, UnicodeError):  # a name that tarfile does not write
                continue
    return stream.getvalue()


@pytest.mark.slow
def test_archives_of_rows(tmp_path):
    file = tmp_path / "rows.tar"

    def attempt(chance):
        content = archive_bytes(chance)
        if chance.random() < 0.6:
            content = damage_bytes(content, chance)
        content = chance.choice(PACK)(content)
        if chance.random() < 0.3:
            content = damage_bytes(content, chance)
        file.write_bytes(content)
        assert isinstance(is_archive(file), bool)
        if is_archive(file):
            for path, _ in read_members(file, NAMES):
                assert file in path.parents
        parts = split(file, "utf-8", SplitOptions())
        assert all(target.is_file() for target in write_split(parts, tmp_path / "out", overwrite=True))
        assert {path.name for path in Path(tmp_path).iterdir()} <= {"rows.tar", "out"}

    fuzz("archives_of_rows", attempt, 300)


@pytest.mark.parametrize("rows", [1, 3])
def test_splits_of_files(rows, tmp_path):
    """What is written can be read again and holds the same rows."""
    file = tmp_path / "rows.jsonl"

    def attempt(chance):
        file.write_bytes(b"\n".join(damage_json_text(ROW, chance) for _ in range(6)))
        parts = split(file, "utf-8", SplitOptions(rows=rows))
        written = [read_rows(target) for target in write_split(parts, tmp_path / "out", overwrite=True)]
        kept = sorted(repr(row.fields) for part in written for row in part)
        assert kept == sorted(repr(row.fields) for row in (*parts.train, *parts.dev))

    fuzz(f"splits_of_files[{rows}]", attempt, 100)
