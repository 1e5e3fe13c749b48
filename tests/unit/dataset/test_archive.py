"""Archives that claim or expand to more than a machine can hold."""

import bz2
import gzip
import io
import lzma
import resource
import tarfile

import pytest

from entrypoints.dataset import archive
from entrypoints.dataset.archive import is_archive, read_members
from entrypoints.errors import UserError

NAMES = ["train.json", "dev.json"]
EXPAND = {"tar": bytes, "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


def header(name, size, kind=tarfile.REGTYPE, pax=None):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    info.pax_headers = pax or {}
    return info.tobuf(tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT)


def rejected(path):
    """The problem of reading a file; fails if the largest resident size of the process grows by more than 300 MB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as caught:
        read_members(path, NAMES)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000
    return caught.value.problem


def test_a_sparse_member_that_claims_a_terabyte_is_rejected(tmp_path):
    sparse = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(10**12), "GNU.sparse.name": "train.json"}
    (tmp_path / "a.tar").write_bytes(header("x", 1, pax=sparse) + b"{".ljust(512, b"\0") + bytes(1024))
    assert "expands to more than 1024 MB" in rejected(tmp_path / "a.tar")


@pytest.mark.parametrize("name", ["train.json", "padding"])
@pytest.mark.parametrize("kind", EXPAND)
def test_an_archive_that_expands_beyond_the_limit_is_rejected(kind, name, tmp_path, monkeypatch):
    """The large member is one that is read, or one that is skipped."""
    monkeypatch.setattr(archive, "MAX_EXPANDED_BYTES", 8 << 20)
    size = 32 << 20
    content = header(name, size) + bytes(size) + header("dev.json", 0) + bytes(1024)
    (tmp_path / "a").write_bytes(EXPAND[kind](content))
    assert is_archive(tmp_path / "a")
    assert "a expands to more than 8 MB" in rejected(tmp_path / "a")


@pytest.mark.parametrize("type_", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
@pytest.mark.parametrize("kind", EXPAND)
def test_a_header_that_claims_gigabytes_is_rejected(kind, type_, tmp_path):
    content = header("x", 4 << 30, type_) + bytes(32 << 20)
    (tmp_path / "a").write_bytes(EXPAND[kind](content))
    assert "header claims 4294967296 bytes" in rejected(tmp_path / "a")


def test_an_archive_of_many_members_is_rejected(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"".join(header(f"{n}", 0) for n in range(archive.MAX_MEMBERS + 1)) + bytes(1024))
    assert "more than 10000 members" in rejected(tmp_path / "a.tar")


def test_a_small_sparse_member_is_read(tmp_path):
    sparse = {"GNU.sparse.map": "0,2,2048,0", "GNU.sparse.size": "2048", "GNU.sparse.name": "train.json"}
    content = header("x", 2, pax=sparse) + b"{}".ljust(512, b"\0") + header("dev.json", 0) + bytes(1024)
    (tmp_path / "a.tar").write_bytes(content)
    assert read_members(tmp_path / "a.tar", NAMES)[0][1] == b"{}".ljust(2048, b"\0")


@pytest.mark.parametrize("value", ["-x", "-5", "9" * 5000])
@pytest.mark.parametrize("damage", ["GNU.sparse.map", "GNU.sparse.size", "size", "mtime"])
def test_a_header_that_is_not_a_number_is_a_user_error(damage, value, tmp_path):
    numbers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": "9", "GNU.sparse.name": "train.json", damage: value}
    (tmp_path / "a.tar").write_bytes(header("x", 1, pax=numbers) + b"{".ljust(512, b"\0") + bytes(1024))
    assert "a.tar" in rejected(tmp_path / "a.tar")


def test_rows_are_not_an_archive(tmp_path):
    for content in (b"", b"{}", b"[]", b'{"a": 1}\n' * 500, io.BytesIO(b"\xff" * 600).read()):
        (tmp_path / "rows").write_bytes(content)
        assert not is_archive(tmp_path / "rows")
    assert not is_archive(tmp_path / "missing")
