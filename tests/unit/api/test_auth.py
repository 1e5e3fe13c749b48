import hmac
import os
import stat

import pytest

from entrypoints.__main__ import main
from entrypoints.api import auth
from entrypoints.api.auth import ANONYMOUS, KeyRing, digest, new_key, read_keys
from entrypoints.errors import UserError
from entrypoints.settings import Settings

HASH = "0" * 64


def write(path, text):
    """Write a key file with a new modification time, independent of the resolution of the clock."""
    write.time += 1
    path.write_text(text, encoding="utf-8")
    os.utime(path, ns=(write.time, write.time))
    return path


write.time = 1_700_000_000_000_000_000


def line(name, key, *limits):
    return " ".join([name, digest(key), *map(str, limits)]) + "\n"


def bearer(key):
    return f"Bearer {key}"


def test_a_key_of_the_file_has_its_name_and_limits(tmp_path):
    ring = KeyRing(write(tmp_path / "keys", "# who\n\n" + line("anna", "glm-a", 5, 2) + line("ben", "glm-b")))
    anna, ben = ring.find(bearer("glm-a")), ring.find("bearer  glm-b ")
    assert (anna.name, anna.requests_per_minute, anna.concurrent) == ("anna", 5, 2)
    assert (ben.name, ben.requests_per_minute, ben.concurrent) == (
        "ben",
        auth.DEFAULT_REQUESTS_PER_MINUTE,
        auth.DEFAULT_MAX_CONCURRENT,
    )


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic glm-a", "glm-a", "Bearer é"])
def test_only_a_known_key_is_accepted(header, tmp_path):
    assert KeyRing(write(tmp_path / "keys", line("anna", "glm-a"))).find(header) is None


def test_the_hash_of_the_empty_string_accepts_no_token(tmp_path):
    ring = KeyRing(write(tmp_path / "keys", line("oops", "")))
    assert ring.find("Bearer ") is None
    assert ring.find(None) is None


def test_without_keys_every_client_is_anonymous_and_unlimited():
    ring = KeyRing()
    assert not ring.required
    assert ring.find(None) is ANONYMOUS
    assert ANONYMOUS.requests_per_minute is ANONYMOUS.concurrent is None


def test_the_single_key_and_the_keys_of_the_file_are_both_accepted(tmp_path):
    ring = KeyRing(write(tmp_path / "keys", line("anna", "glm-a")), single="glm-one")
    assert ring.find(bearer("glm-one")).name == "default"
    assert ring.find(bearer("glm-a")).name == "anna"


def test_an_empty_key_file_accepts_no_client(tmp_path):
    ring = KeyRing(write(tmp_path / "keys", ""))
    assert ring.required
    assert ring.find(None) is None


def test_every_key_is_compared_for_every_token(tmp_path, monkeypatch):
    """The response time must not reveal which key nearly matched."""
    ring = KeyRing(write(tmp_path / "keys", "".join(line(f"k{n}", f"glm-{n}") for n in range(5))))
    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(auth.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    for key in ("glm-0", "glm-4", "wrong"):
        compared.clear()
        ring.find(bearer(key))
        assert len(compared) == 5
        assert all(len(given) == 64 for _, given in compared), "hashes of equal length are compared"


def test_a_changed_key_file_is_reloaded(tmp_path):
    file = write(tmp_path / "keys", line("anna", "glm-a"))
    ring = KeyRing(file)
    write(file, line("ben", "glm-b"))
    ring.refresh()
    assert ring.find(bearer("glm-a")) is None
    assert ring.find(bearer("glm-b")).name == "ben"


def test_a_file_replaced_by_another_of_the_same_size_and_time_is_reloaded(tmp_path):
    file = write(tmp_path / "keys", line("anna", "glm-a"))
    ring, times = KeyRing(file), file.stat().st_mtime_ns
    (tmp_path / "next").write_text(line("anna", "glm-b"))
    os.utime(tmp_path / "next", ns=(times, times))
    (tmp_path / "next").replace(file)
    ring.refresh()
    assert ring.find(bearer("glm-a")) is None


def test_an_invalid_change_is_reported_once_and_the_old_keys_stay_valid(tmp_path):
    file = write(tmp_path / "keys", line("anna", "glm-a"))
    ring = KeyRing(file)
    write(file, line("anna", "glm-a") + "half a li")
    with pytest.raises(UserError, match="keys:2 is not a valid key entry"):
        ring.refresh()
    ring.refresh()
    assert ring.find(bearer("glm-a")).name == "anna"
    file.unlink()
    with pytest.raises(UserError, match="cannot read the key file"):
        ring.refresh()
    ring.refresh()
    write(file, line("ben", "glm-b"))
    ring.refresh()
    assert ring.find(bearer("glm-a")) is None


@pytest.mark.parametrize(
    "text",
    [
        "anna",
        f"{HASH}",
        f"anna {HASH[:-1]}",
        f"anna {HASH}0",
        f"anna {'g' * 64}",
        f"anna {'０' * 64}",
        f"anna {'1_' * 32}",
        f"anna -{'0' * 63}",
        f"anna {HASH} 0",
        f"anna {HASH} -5",
        f"anna {HASH} 5 many",
        f"anna {HASH} ５",
        f"anna {HASH} 5 5 0",
        f"anna {HASH} 5 5 5 5",
        f"anna {HASH} 99999999999999999999",
        f"anna lee {HASH}",
    ],
)
def test_a_malformed_line_is_reported_with_its_number(text, tmp_path):
    file = write(tmp_path / "keys", f"# keys\nben {HASH}\n{text}\n")
    with pytest.raises(UserError, match=r"keys:3 is not a valid key entry; use the format NAME SHA256"):
        read_keys(file)


@pytest.mark.parametrize(
    "text", [f"\ufeffanna {HASH}\n", f"anna {HASH}\r\n", f"  anna\t{HASH.upper()}  # desk 4", f"anna {HASH}"]
)
def test_byte_order_marks_line_endings_and_blanks_are_accepted(text, tmp_path):
    (key,) = read_keys(write(tmp_path / "keys", text))
    assert (key.name, key.digest) == ("anna", HASH)


def test_an_unreadable_key_file_is_a_user_error(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match="cannot read the key file"):
            KeyRing(path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot read the key file"):
        KeyRing(tmp_path / "binary")


def test_a_key_file_without_permission_names_the_group_and_mode_of_this_process(tmp_path, monkeypatch):
    """As `glm key` creates it on a host, a container cannot read it: its group is 0."""
    file = write(tmp_path / "keys", line("anna", "glm-a"))

    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.getuid", lambda: 10001)
    monkeypatch.setattr("os.getgid", lambda: 0)
    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    with pytest.raises(UserError) as caught:
        KeyRing(file)
    expected = f"make it readable for user 10001, group 0: chgrp 0 {file} && chmod 640 {file}"
    assert caught.value.remedy == expected
    with pytest.raises(UserError) as caught:
        Settings.from_env({"API_KEY_FILE": str(file)})
    assert caught.value.remedy == expected


def test_keys_are_long_and_unique():
    assert len({new_key() for _ in range(100)}) == 100
    assert min(len(new_key()) for _ in range(100)) >= 40


def test_glm_key_prints_the_key_and_stores_its_hash_in_a_private_file(tmp_path, capsys):
    file = tmp_path / "keys"
    assert main(["key", str(file), "anna", "--requests-per-minute", "7", "--concurrent", "3"]) == 0
    captured = capsys.readouterr()
    key = captured.out.strip()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert key not in file.read_text() + captured.err
    found = KeyRing(file).find(bearer(key))
    assert (found.name, found.requests_per_minute, found.concurrent) == ("anna", 7, 3)


def test_glm_key_adds_a_missing_newline_first(tmp_path, capsys):
    file = write(tmp_path / "keys", f"ben {HASH}")
    assert main(["key", str(file), "anna"]) == 0
    assert [key.name for key in read_keys(file)] == ["ben", "anna"]


@pytest.mark.parametrize("name", ["", " ", "an na", "#anna", "an#na", "anna\n", "an\tna", "a\u2028b"])
def test_glm_key_rejects_a_name_that_would_break_the_file(name, tmp_path, capsys):
    assert main(["key", str(tmp_path / "keys"), name]) == 1
    assert not (tmp_path / "keys").exists()


def test_glm_key_rejects_a_duplicate_name_a_low_limit_and_an_unwritable_path(tmp_path, capsys):
    file = tmp_path / "keys"
    assert main(["key", str(file), "anna"]) == 0
    assert main(["key", str(file), "anna"]) == 1
    assert main(["key", str(file), "ben", "--concurrent", "0"]) == 1
    assert main(["key", str(tmp_path / "none" / "keys"), "ben"]) == 1
    assert len(read_keys(file)) == 1
    errors = [text for text in capsys.readouterr().err.splitlines() if text.startswith("glm: ")]
    assert len(errors) == 3
