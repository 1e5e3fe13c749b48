"""Paths and JSON texts that come from outside."""

import pytest

from entrypoints.errors import UserError
from entrypoints.untrusted import confined_path, parse_json, read_json_file


@pytest.mark.parametrize("name", ["a", "a/b.json", "./a", "a..b", "..a", "模型.safetensors", "n" * 255])
def test_a_path_inside_the_folder_is_accepted(name, tmp_path):
    assert confined_path(tmp_path, name, "index") == tmp_path / name


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "/etc/passwd", "//x", "..", "../x", "a/../../x", "a/..", "..\\x", "C:\\x", "a\0b", "\ud800"),
        *("n" * 256, "a/" * 600, None, 5, True, ["a"], {}),
    ],
    ids=ascii,
)
def test_a_path_that_could_leave_the_folder_is_rejected_with_its_source(name, tmp_path):
    with pytest.raises(UserError, match=r"index names .* not a relative path inside its folder"):
        confined_path(tmp_path, name, "index")


def test_a_link_is_accepted_only_inside_the_folder(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").touch()
    (folder / "inside").symlink_to("file")
    (folder / "outside").symlink_to(tmp_path / "secret")
    (folder / "parent").symlink_to(tmp_path)
    (folder / "loop").symlink_to("loop")
    (tmp_path / "alias").symlink_to(folder)
    assert confined_path(folder, "inside", "index").name == "inside"
    assert confined_path(tmp_path / "alias", "inside", "index").exists()  # the folder itself may be a link
    assert confined_path(folder, "loop", "index").is_symlink()
    for name in ("outside", "parent/secret", "parent"):
        with pytest.raises(UserError, match="which is a link to"):
            confined_path(folder, name, "index")


def test_a_snapshot_of_the_hub_cache_may_link_to_its_own_blobs_only(tmp_path):
    snapshot = tmp_path / "models--org--name" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (snapshot / "own").symlink_to("../../blobs/abc")
    (snapshot / "other").symlink_to("../../../models--org--other/blobs/abc")
    assert confined_path(snapshot, "own", "index") == snapshot / "own"
    with pytest.raises(UserError, match="which is a link to"):
        confined_path(snapshot, "other", "index")


def test_only_weights_may_be_links_to_weights_elsewhere_and_only_to_be_read(tmp_path):
    folder, blobs = tmp_path / "folder", tmp_path / "models--org--name" / "blobs"
    folder.mkdir()
    for name, target in {
        "a.safetensors": tmp_path / "nas" / "x.safetensors", "b.bin": tmp_path / "x.bin", "c.bin": blobs / "abc",
        "d.safetensors": tmp_path / "x.bin", "e.safetensors": "/etc/passwd", "f.json": tmp_path / "x.json",
        "g.json": blobs / "abc", "h.bin": tmp_path / "blobs" / "abc", "i": tmp_path / "x.bin",
    }.items():  # fmt: skip
        (folder / name).symlink_to(target)
    names = sorted(link.name for link in folder.iterdir())
    assert len(names) == 9
    for name in names:
        if name[0] in "abc":
            assert confined_path(folder, name, "index", linked_weights=True) == folder / name
        else:
            with pytest.raises(UserError, match="which is a link to"):
                confined_path(folder, name, "index", linked_weights=True)
        with pytest.raises(UserError, match="which is a link to"):
            confined_path(folder, name, "index")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"\xff", "is not valid JSON"),
        (b"1" * 5000, "is not valid JSON"),
        (b"[" * 200_000, "is nested too deeply"),
        (b'{"a":' * 200_000, "is nested too deeply"),
    ],
    ids=["malformed", "bytes", "digits", "arrays", "objects"],
)
def test_a_text_that_is_not_usable_json_is_a_user_error(text, message, tmp_path):
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(UserError, match=rf"x\.json {message}.*; fix it"):
        read_json_file(tmp_path / "x.json", "fix it")


def test_a_text_beyond_the_limit_is_not_parsed(monkeypatch):
    monkeypatch.setattr("entrypoints.untrusted.MAX_JSON_BYTES", 1 << 20)
    with pytest.raises(UserError, match="x has more than 1 MB of JSON"):
        parse_json(b" " * ((1 << 20) + 1), "x")
