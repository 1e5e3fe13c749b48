"""manifest.json: what it lists, and which differences are found."""

import hashlib
import json

import pytest

from entrypoints.checkpoint.manifest import MANIFEST_FILE, check_manifest, read_manifest, sha256, write_manifest
from entrypoints.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """Two files, one in a subfolder, and their manifest."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "sub" / "b.txt").write_text("def")
    write_manifest(tmp_path, {"made_by": "test"})
    return tmp_path


def test_a_hash_is_sha256_and_its_progress_adds_up_to_the_size(tmp_path):
    """3 MiB and one byte, so that several blocks are read."""
    content = b"x" * (3 * (1 << 20) + 1)
    (tmp_path / "x").write_bytes(content)
    read = []
    assert sha256(tmp_path / "x", read.append) == hashlib.sha256(content).hexdigest()
    assert (sum(read), len(read)) == (len(content), 4)


def test_the_manifest_lists_every_file_except_itself(folder):
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
def test_an_unchanged_folder_passes_and_its_files_are_counted(hashes, folder):
    (folder / "log.txt").write_text("not listed in the manifest, so not checked")
    assert check_manifest(folder, hashes) == 2


def test_a_changed_byte_is_found_only_by_its_hash(folder):
    (folder / "sub" / "b.txt").write_text("deg")
    assert check_manifest(folder, hashes=False) == 2
    with pytest.raises(UserError, match=r"sub/b\.txt does not match its SHA-256"):
        check_manifest(folder, hashes=True)


def test_every_missing_or_truncated_file_is_named_in_one_message(folder):
    (folder / "a.txt").unlink()
    (folder / "sub" / "b.txt").write_text("de")
    with pytest.raises(UserError, match=r"a\.txt is missing; sub/b\.txt has 2 bytes, not 3"):
        check_manifest(folder, hashes=False)


def test_a_folder_without_a_manifest_is_rejected_with_the_command_that_writes_one(tmp_path):
    with pytest.raises(UserError, match=r"contains no manifest\.json; .*glm convert"):
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
def test_a_damaged_manifest_is_rejected_by_name(content, folder):
    (folder / MANIFEST_FILE).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"manifest\.json is (damaged|not valid JSON)"):
        check_manifest(folder, hashes=True)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "link", "sub/../../secret"])
def test_a_manifest_that_names_a_file_outside_its_folder_is_rejected(name, folder):
    """`glm prepare` copies what the manifest lists."""
    (folder / "link").symlink_to("/etc/passwd")
    entry = {"size": 3, "sha256": "0" * 64}
    (folder / MANIFEST_FILE).write_text(json.dumps({"provenance": {}, "files": {name: entry}}))
    with pytest.raises(UserError, match=rf"manifest\.json names .*{name}"):
        read_manifest(folder)


def test_chinese_values_are_written_unescaped(folder):
    write_manifest(folder, {"source": "模型"})
    assert json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["provenance"] == {"source": "模型"}
    assert "模型" in (folder / MANIFEST_FILE).read_text(encoding="utf-8")
