"""`glm data split`: sources, sizes, safety of archives and of existing files."""

import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from entrypoints.dataset.reader import read_rows
from entrypoints.dataset.split import SplitOptions, split, write_split
from entrypoints.errors import UserError

TRAIN = [{"content": f"类型#裙{n}", "summary": "好", "id": n, "tags": ["x", None, 1.5]} for n in range(5)]
DEV = [{"content": f"类型#裤{n}", "summary": "美"} for n in range(2)]


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@pytest.fixture
def folder(tmp_path):
    """An AdvertiseGen folder; like the public one, its JSON lines have the suffix .json."""
    source = tmp_path / "AdvertiseGen"
    source.mkdir()
    (source / "train.json").write_bytes(lines(TRAIN))
    (source / "dev.json").write_bytes(lines(DEV))
    return source


def archive_of(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def single(tmp_path, rows):
    path = tmp_path / "all.json"
    path.write_bytes(lines(rows))
    return path


def fields(rows):
    return [row.fields for row in rows]


def error_of(source, options=SplitOptions()):  # noqa: B008 a frozen dataclass
    with pytest.raises(UserError) as caught:
        split(source, "utf-8", options)
    return str(caught.value)


def test_a_folder_with_train_and_dev_is_kept_as_it_is(folder, tmp_path):
    paths = write_split(split(folder, "utf-8", SplitOptions()), tmp_path / "new" / "out", overwrite=False)
    assert [path.name for path in paths] == ["train.jsonl", "dev.jsonl"]
    assert paths[0].read_bytes() == lines(TRAIN)  # all fields, in order, without escapes
    assert paths[1].read_bytes() == lines(DEV)
    assert sorted(path.name for path in paths[0].parent.iterdir()) == ["dev.jsonl", "train.jsonl"]


@pytest.mark.parametrize(
    ("name", "mode"), [("a.tar", "w"), ("a.tar.gz", "w:gz"), ("a.tgz.download", "w:gz"), ("a", "w:xz")]
)
def test_an_archive_gives_the_same_rows_as_the_folder_whatever_its_name(name, mode, tmp_path):
    members = [
        ("AdvertiseGen/._train.json", b"\x00\x05\x16\x07"),  # added by macOS
        ("AdvertiseGen/train.json", lines(TRAIN)),
        ("AdvertiseGen/dev.json", lines(DEV)),
    ]
    done = split(archive_of(tmp_path / name, members, mode), "utf-8", SplitOptions())
    assert fields(done.train) == TRAIN
    assert fields(done.dev) == DEV
    assert done.train[3].file == tmp_path / name / "AdvertiseGen" / "train.json"


def test_nothing_in_an_archive_is_extracted(tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    members = [("../../evil.json", b"{}"), ("./train.json", lines(TRAIN)), ("a/dev.json", lines(DEV))]
    done = split(archive_of(tmp_path / "a.tar", members), "utf-8", SplitOptions())
    assert fields(done.train) == TRAIN
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar", "home"]


@pytest.mark.parametrize(
    "name", ["../train.json", "/train.json", "/../train.json", "a/../../train.json", "..\\/train.json"]
)
def test_a_member_whose_path_leaves_the_archive_is_rejected(name, tmp_path):
    members = [(name, lines(TRAIN)), ("dev.json", lines(DEV))]
    assert "a.tar names" in error_of(archive_of(tmp_path / "a.tar", members))


def test_a_link_in_an_archive_is_not_followed(tmp_path):
    secret = single(tmp_path, TRAIN)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("train.json", "dev.json"):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, str(secret)
            archive.addfile(link)
    assert "contains 0 files named train.json" in error_of(tmp_path / "a.tar")


def test_an_archive_with_two_train_files_is_rejected(tmp_path):
    members = [("a/train.json", lines(TRAIN)), ("b/train.json", lines(TRAIN)), ("dev.json", lines(DEV))]
    assert "contains 2 files named train.json" in error_of(archive_of(tmp_path / "a.tar", members))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.99])
def test_an_incomplete_download_is_reported_as_such(share, tmp_path):
    noise = os.urandom(40_000).hex()  # cannot be compressed
    members = [("train.json", lines([*TRAIN, {"noise": noise}])), ("dev.json", lines(DEV))]
    whole = archive_of(tmp_path / "a.tar.gz", members, "w:gz").read_bytes()
    (tmp_path / "a.tar.gz").write_bytes(whole[: max(4, int(share * len(whole)))])
    assert "a.tar.gz is not a complete tar archive" in error_of(tmp_path / "a.tar.gz")


def test_an_error_inside_an_archive_names_member_and_line(tmp_path):
    members = [("train.json", lines(TRAIN) + b"{"), ("dev.json", lines(DEV))]
    assert "a.tar/train.json:6:2: not JSON" in error_of(archive_of(tmp_path / "a.tar", members))


@pytest.mark.parametrize("options", [SplitOptions(rows=3), SplitOptions(share=0.3)])
def test_a_single_file_is_split_to_the_requested_size_and_no_row_is_lost(options, tmp_path):
    rows = [{"content": str(n), "summary": "x"} for n in range(10)]
    done = split(single(tmp_path, rows), "utf-8", options)
    assert len(done.dev) == 3
    assert sorted(fields(done.train) + fields(done.dev), key=lambda row: int(row["content"])) == rows
    assert [row.line for row in done.train] == sorted(row.line for row in done.train)


def test_the_seed_determines_the_selection(tmp_path):
    source = single(tmp_path, [{"content": str(n)} for n in range(100)])
    drawn = [fields(split(source, "utf-8", SplitOptions(rows=10, seed=seed)).dev) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def test_the_selection_of_a_seed_is_the_same_in_every_release(tmp_path):
    """Recorded from a run: random.Random(42).shuffle is stable across Python versions."""
    done = split(single(tmp_path, [{"content": n} for n in range(20)]), "utf-8", SplitOptions(rows=4))
    assert [row.fields["content"] for row in done.dev] == [4, 5, 14, 19]


@pytest.mark.parametrize("seed", range(20))
def test_equal_rows_are_never_in_both_sets(seed, tmp_path):
    rows = [{"content": str(n % 7), "summary": "x"} for n in range(30)]
    rows[9] = {"summary": "x", "content": "2"}  # equal to rows[2], fields in another order
    done = split(single(tmp_path, rows), "utf-8", SplitOptions(rows=9, seed=seed))
    assert not {row["content"] for row in fields(done.train)} & {row["content"] for row in fields(done.dev)}
    assert done.shared == 0
    assert 0 < len(done.dev) <= 9
    assert len(done.train) + len(done.dev) == 30


def test_rows_that_a_source_has_in_both_sets_are_counted(folder):
    (folder / "dev.json").write_bytes(lines([*DEV, TRAIN[0], TRAIN[0]]))
    assert split(folder, "utf-8", SplitOptions()).shared == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (SplitOptions(), "pass --dev-rows or --dev-share"),
        (SplitOptions(rows=1, share=0.5), "pass --dev-rows or --dev-share, one of them"),
        (SplitOptions(rows=0), "0 out of 5 rows"),
        (SplitOptions(rows=5), "5 out of 5 rows"),
        (SplitOptions(share=0.0), "--dev-share 0.0 is out of range"),
        (SplitOptions(share=1.0), "--dev-share 1.0 is out of range"),
        (SplitOptions(share=float("nan")), "--dev-share nan is out of range"),
        (SplitOptions(share=0.95), "5 out of 5 rows"),
    ],
)
def test_a_size_that_does_not_fit_is_rejected(options, message, tmp_path):
    assert message in error_of(single(tmp_path, TRAIN), options)


def test_a_tiny_share_still_gives_one_row(tmp_path):
    assert len(split(single(tmp_path, TRAIN), "utf-8", SplitOptions(share=0.001)).dev) == 1


def test_a_file_of_equal_rows_cannot_be_split(tmp_path):
    assert "every group of equal rows" in error_of(single(tmp_path, [TRAIN[0]] * 4), SplitOptions(rows=2))


def test_a_source_with_its_own_development_set_rejects_a_size(folder):
    assert "has its own dev.json" in error_of(folder, SplitOptions(rows=1))


def test_a_folder_without_dev_json_and_a_missing_source_are_rejected(folder, tmp_path):
    (folder / "dev.json").unlink()
    assert f"file not found: {folder / 'dev.json'}" in error_of(folder)
    assert "file not found" in error_of(tmp_path / "nowhere")


@pytest.mark.parametrize("there", ["train.jsonl", "dev.jsonl"])
def test_files_are_replaced_only_on_request(there, folder, tmp_path):
    done, out = split(folder, "utf-8", SplitOptions()), tmp_path / "out"
    out.mkdir()
    (out / there).write_text("mine")
    with pytest.raises(UserError, match=f"{there} exists; choose another folder or pass --overwrite"):
        write_split(done, out, overwrite=False)
    assert [path.read_text() for path in out.iterdir()] == ["mine"]
    write_split(done, out, overwrite=True)
    assert (out / "train.jsonl").read_bytes() == lines(TRAIN)


def test_a_source_is_never_overwritten_by_its_own_split(tmp_path):
    source = tmp_path / "train.jsonl"
    source.write_bytes(lines(TRAIN))
    done = split(source, "utf-8", SplitOptions(rows=2))
    with pytest.raises(UserError, match="is the source of these rows"):
        write_split(done, tmp_path, overwrite=True)
    assert source.read_bytes() == lines(TRAIN)


def test_a_path_that_cannot_be_written_is_rejected(folder):
    with pytest.raises(UserError, match="cannot write to"):
        write_split(split(folder, "utf-8", SplitOptions()), folder / "train.json", overwrite=False)


def test_a_failed_write_leaves_no_files(folder, tmp_path, monkeypatch):
    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_split(split(folder, "utf-8", SplitOptions()), tmp_path / "out", overwrite=False)
    assert list((tmp_path / "out").iterdir()) == []


def test_gb18030_is_read_and_utf_8_is_written(folder, tmp_path):
    for name in ("train.json", "dev.json"):
        (folder / name).write_bytes((folder / name).read_bytes().decode().encode("gb18030"))
    train, _ = write_split(split(folder, "gb18030", SplitOptions()), tmp_path / "out", overwrite=False)
    assert train.read_bytes() == lines(TRAIN)


def test_a_lone_surrogate_is_preserved_as_an_escape(tmp_path):
    path = tmp_path / "all.json"
    path.write_text('{"content": "\\ud83d"}\n{"content": "b"}', encoding="ascii")
    paths = write_split(split(path, "utf-8", SplitOptions(rows=1)), tmp_path / "out", overwrite=False)
    assert sorted(row.fields["content"] for each in paths for row in read_rows(each)) == ["b", "\ud83d"]
