import hmac
import os
import stat

import pytest

from entrypoints.__main__ import main
from entrypoints.api import auth
from entrypoints.api.auth import ANONYMOUS, KeyRing, digest, new_key, read_keys
from entrypoints.errors import UserError

HASH = "0" * 64


def written(path, text):
    """Write a key file and give it a time of its own, whatever the clock's grain."""
    written.time += 1
    path.write_text(text, encoding="utf-8")
    os.utime(path, ns=(written.time, written.time))
    return path


written.time = 1_700_000_000_000_000_000


def line(name, key, *limits):
    return " ".join([name, digest(key), *map(str, limits)]) + "\n"


def bearer(key):
    return f"Bearer {key}"


def test_a_key_of_the_file_lets_in_under_its_name_and_with_its_limits(tmp_path):
    ring = KeyRing(written(tmp_path / "keys", "# who\n\n" + line("anna", "glm-a", 5, 2) + line("ben", "glm-b")))
    anna, ben = ring.find(bearer("glm-a")), ring.find("bearer  glm-b ")
    assert (anna.name, anna.requests_per_minute, anna.concurrent) == ("anna", 5, 2)
    assert (ben.name, ben.requests_per_minute, ben.concurrent) == ("ben", auth.REQUESTS_PER_MINUTE, auth.CONCURRENT)


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic glm-a", "glm-a", "Bearer é"])
def test_nothing_but_a_known_key_lets_in(header, tmp_path):
    assert KeyRing(written(tmp_path / "keys", line("anna", "glm-a"))).find(header) is None


def test_the_hash_of_nothing_lets_nobody_in(tmp_path):
    ring = KeyRing(written(tmp_path / "keys", line("oops", "")))
    assert ring.find("Bearer ") is None
    assert ring.find(None) is None


def test_without_keys_everyone_is_anonymous_and_unlimited():
    ring = KeyRing()
    assert not ring.required
    assert ring.find(None) is ANONYMOUS
    assert ANONYMOUS.requests_per_minute is ANONYMOUS.concurrent is None


def test_the_single_key_stands_beside_those_of_the_file(tmp_path):
    ring = KeyRing(written(tmp_path / "keys", line("anna", "glm-a")), single="glm-one")
    assert ring.find(bearer("glm-one")).name == "default"
    assert ring.find(bearer("glm-a")).name == "anna"


def test_an_empty_file_lets_nobody_in(tmp_path):
    ring = KeyRing(written(tmp_path / "keys", ""))
    assert ring.required
    assert ring.find(None) is None


def test_every_key_is_compared_whichever_is_right(tmp_path, monkeypatch):
    """The time a refusal takes must not tell which key was nearly right."""
    ring = KeyRing(written(tmp_path / "keys", "".join(line(f"k{n}", f"glm-{n}") for n in range(5))))
    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(auth.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    for key in ("glm-0", "glm-4", "wrong"):
        compared.clear()
        ring.find(bearer(key))
        assert len(compared) == 5
        assert all(len(given) == 64 for _, given in compared), "hashes are compared, which all have one length"


def test_a_changed_file_counts_without_a_restart(tmp_path):
    file = written(tmp_path / "keys", line("anna", "glm-a"))
    ring = KeyRing(file)
    written(file, line("ben", "glm-b"))
    ring.refresh()
    assert ring.find(bearer("glm-a")) is None
    assert ring.find(bearer("glm-b")).name == "ben"


def test_a_file_replaced_by_another_of_the_same_size_and_time_counts_too(tmp_path):
    file = written(tmp_path / "keys", line("anna", "glm-a"))
    ring, times = KeyRing(file), file.stat().st_mtime_ns
    (tmp_path / "next").write_text(line("anna", "glm-b"))
    os.utime(tmp_path / "next", ns=(times, times))
    (tmp_path / "next").replace(file)
    ring.refresh()
    assert ring.find(bearer("glm-a")) is None


def test_a_spoilt_change_is_told_once_and_the_keys_stay(tmp_path):
    file = written(tmp_path / "keys", line("anna", "glm-a"))
    ring = KeyRing(file)
    written(file, line("anna", "glm-a") + "half a li")
    with pytest.raises(UserError, match="keys:2 is no key"):
        ring.refresh()
    ring.refresh()
    assert ring.find(bearer("glm-a")).name == "anna"
    file.unlink()
    with pytest.raises(UserError, match="cannot read the key file"):
        ring.refresh()
    ring.refresh()
    written(file, line("ben", "glm-b"))
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
        f"anna {HASH} 5 5 5",
        f"anna {HASH} 99999999999999999999",
        f"anna lee {HASH}",
    ],
)
def test_a_malformed_line_is_named(text, tmp_path):
    file = written(tmp_path / "keys", f"# keys\nben {HASH}\n{text}\n")
    with pytest.raises(UserError, match=r"keys:3 is no key; a line is NAME SHA256"):
        read_keys(file)


@pytest.mark.parametrize(
    "text", [f"\ufeffanna {HASH}\n", f"anna {HASH}\r\n", f"  anna\t{HASH.upper()}  # desk 4", f"anna {HASH}"]
)
def test_what_editors_do_to_a_line_does_no_harm(text, tmp_path):
    (key,) = read_keys(written(tmp_path / "keys", text))
    assert (key.name, key.digest) == ("anna", HASH)


def test_a_file_that_cannot_be_read_is_a_users_mistake(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match="cannot read the key file"):
            KeyRing(path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot read the key file"):
        KeyRing(tmp_path / "binary")


def test_keys_are_long_random_and_never_the_same():
    assert len({new_key() for _ in range(100)}) == 100
    assert min(len(new_key()) for _ in range(100)) >= 40


def test_glm_key_prints_the_key_once_and_stores_its_hash_for_the_owner_alone(tmp_path, capsys):
    file = tmp_path / "keys"
    assert main(["key", str(file), "anna", "--requests-per-minute", "7", "--concurrent", "3"]) == 0
    captured = capsys.readouterr()
    key = captured.out.strip()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert key not in file.read_text() + captured.err
    found = KeyRing(file).find(bearer(key))
    assert (found.name, found.requests_per_minute, found.concurrent) == ("anna", 7, 3)


def test_glm_key_starts_a_line_of_its_own(tmp_path, capsys):
    file = written(tmp_path / "keys", f"ben {HASH}")
    assert main(["key", str(file), "anna"]) == 0
    assert [key.name for key in read_keys(file)] == ["ben", "anna"]


@pytest.mark.parametrize("name", ["", " ", "an na", "#anna", "an#na", "anna\n", "an\tna", "a\u2028b"])
def test_glm_key_refuses_a_name_that_would_spoil_the_file(name, tmp_path, capsys):
    assert main(["key", str(tmp_path / "keys"), name]) == 1
    assert not (tmp_path / "keys").exists()


def test_glm_key_refuses_a_taken_name_a_low_limit_and_a_place_it_cannot_write(tmp_path, capsys):
    file = tmp_path / "keys"
    assert main(["key", str(file), "anna"]) == 0
    assert main(["key", str(file), "anna"]) == 1
    assert main(["key", str(file), "ben", "--concurrent", "0"]) == 1
    assert main(["key", str(tmp_path / "none" / "keys"), "ben"]) == 1
    assert len(read_keys(file)) == 1
    errors = [text for text in capsys.readouterr().err.splitlines() if text.startswith("glm: ")]
    assert len(errors) == 3
