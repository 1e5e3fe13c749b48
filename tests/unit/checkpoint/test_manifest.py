import hashlib
import json

import pytest

from entrypoints.checkpoint.manifest import MANIFEST_FILE, check_manifest, read_manifest, sha256, write_manifest
from entrypoints.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """Two files, one in a folder of its own, and their manifest."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "sub" / "b.txt").write_text("def")
    write_manifest(tmp_path, {"made_by": "test"})
    return tmp_path


def test_a_hash_is_sha256_and_its_progress_adds_up_to_the_size(tmp_path):
    """3 MiB and a byte, so that more than one block is read."""
    content = b"x" * (3 * (1 << 20) + 1)
    (tmp_path / "x").write_bytes(content)
    read = []
    assert sha256(tmp_path / "x", read.append) == hashlib.sha256(content).hexdigest()
    assert (sum(read), len(read)) == (len(content), 4)


def test_the_manifest_lists_every_file_but_itself(folder):
    write_manifest(folder, {"made_by": "again"})
    manifest = read_manifest(folder)
    assert manifest["provenance"] == {"made_by": "again"}
    assert manifest["files"] == {
        "a.txt": {"size": 3, "sha256": hashlib.sha256(b"abc").hexdigest()},
        "sub/b.txt": {"size": 3, "sha256": hashlib.sha256(b"def").hexdigest()},
    }


def test_the_manifest_lists_only_the_named_files(folder):
    write_manifest(folder, {}, [folder / "a.txt"])
    assert list(read_manifest(folder)["files"]) == ["a.txt"]


@pytest.mark.parametrize("hashes", [False, True])
def test_an_untouched_folder_passes_and_the_files_are_counted(hashes, folder):
    (folder / "log.txt").write_text("a file that the manifest does not know is none of its business")
    assert check_manifest(folder, hashes) == 2


def test_a_changed_byte_is_found_by_its_hash_alone(folder):
    (folder / "sub" / "b.txt").write_text("deg")
    assert check_manifest(folder, hashes=False) == 2
    with pytest.raises(UserError, match=r"sub/b\.txt has other contents"):
        check_manifest(folder, hashes=True)


def test_every_missing_or_cut_file_is_named_at_once(folder):
    (folder / "a.txt").unlink()
    (folder / "sub" / "b.txt").write_text("de")
    with pytest.raises(UserError, match=r"a\.txt is missing; sub/b\.txt has 2 bytes, not 3"):
        check_manifest(folder, hashes=False)


def test_a_folder_without_a_manifest_is_told_how_to_get_one(tmp_path):
    with pytest.raises(UserError, match=r"holds no manifest\.json; .*glm convert"):
        check_manifest(tmp_path, hashes=False)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "null",
        '{"files": {}}',
        '{"provenance": {}}',
        '{"provenance": {}, "files": 1}',
        '{"provenance": {}, "files": {"a.txt": 1}}',
        '{"provenance": {}, "files": {"a.txt": {"size": 3}}}',
        "version https://git-lfs.github.com/spec/v1\n",
        "\ufeff{}",
    ],
)
def test_a_damaged_manifest_is_refused_by_name(content, folder):
    (folder / MANIFEST_FILE).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        check_manifest(folder, hashes=True)


def test_chinese_names_and_values_are_written_as_they_are(folder):
    write_manifest(folder, {"source": "模型"})
    assert json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["provenance"] == {"source": "模型"}
    assert "模型" in (folder / MANIFEST_FILE).read_text(encoding="utf-8")
