"""`make audit`: findings, their acceptance, and that a missing or old database is never a pass."""

import datetime
import importlib.util
import json
import sys
import zipfile

import pytest
from containers import REPOSITORY

SCRIPT = REPOSITORY / "images" / "scripts" / "audit.py"
TODAY = datetime.date(2026, 6, 30)
LOCK = """jinja2==3.1.0 \\
    --hash=sha256:0
Torch==2.13.0+cpu ; python_version >= "3.11" \\
    --hash=sha256:0
"""


def range_of(*events, kind="ECOSYSTEM"):
    return [{"type": kind, "events": [dict([event]) for event in events]}]


def advisory(name, modified="2026-06-29T00:00:00Z", **affected):
    package = {"name": name, "ecosystem": affected.pop("ecosystem", "PyPI")}
    return {"id": f"PYSEC-{name}", "modified": modified, "affected": [{"package": package, **affected}]}


@pytest.fixture(scope="module")
def audit():
    spec = importlib.util.spec_from_file_location("audit", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["audit"] = module  # dataclasses look the module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def scan(audit, tmp_path, capsys):
    """Exit code, stdout and stderr for these advisories and accepted findings."""
    locks = tmp_path / "locks"
    locks.mkdir()
    (locks / "dev.lock").write_text(LOCK)

    def run(*advisories, accepted="", zipped=False):
        (locks / "accepted-advisories.toml").write_text(accepted)
        source = tmp_path / "database"
        if zipped:
            with zipfile.ZipFile(source, "w") as archive:
                for one in advisories:
                    archive.writestr(f"{one['id']}.json", json.dumps(one))
        else:
            source.mkdir(exist_ok=True)
            for one in advisories:
                (source / f"{one['id']}.yaml").write_text(json.dumps(one, indent=1))
        code = audit.main([str(source), "--locks", str(locks)], TODAY)
        return code, *capsys.readouterr()

    return run


OTHER = advisory("another", versions=["1.0"])


@pytest.mark.parametrize("zipped", [True, False])
def test_a_locked_version_within_a_range_is_a_finding_with_its_fixed_version(zipped, scan):
    found = advisory("Jinja2", ranges=range_of(("introduced", "0"), ("fixed", "3.1.4")))
    code, out, _ = scan(found, OTHER, zipped=zipped)
    assert code == 1
    assert "jinja2 3.1.0: PYSEC-Jinja2, fixed in 3.1.4 (dev.lock)\n" in out
    assert "2 advisories up to 2026-06-29: 1 findings, 0 accepted" in out


@pytest.mark.parametrize(
    ("name", "affected", "expected"),
    [
        ("jinja2", {"versions": ["3.1"]}, 1),
        ("jinja2", {"versions": ["3.1.1", "not a version"]}, 0),
        ("torch", {"versions": ["2.13.0"]}, 1),
        ("torch", {"ranges": range_of(("introduced", "2.13"), ("last_affected", "2.13.0"))}, 1),
        ("torch", {"ranges": range_of(("introduced", "0"), ("fixed", "2.13.0"))}, 0),
        ("torch", {"ranges": range_of(("introduced", "0"), ("fixed", "1"), ("introduced", "2"), ("fixed", "3"))}, 1),
        ("torch", {"ranges": range_of(("introduced", "0"), ("fixed", "1"), ("introduced", "3"))}, 0),
        ("torch", {"ranges": range_of(("introduced", "2.14"))}, 0),
        ("torch", {"ranges": range_of(("introduced", "0"), ("fixed", "unknown"))}, 1),
        ("torch", {"ranges": range_of(("introduced", "0"), ("fixed", "abc123"), kind="GIT")}, 0),
        ("torch", {"versions": ["2.13.0"], "ecosystem": "npm"}, 0),
        ("torchvision", {"versions": ["2.13.0"]}, 0),
    ],
)
def test_affected_versions_follow_the_osv_format(name, affected, expected, scan):
    assert scan(advisory(name, **affected), OTHER)[0] == expected


def test_a_withdrawn_advisory_is_not_a_finding(scan):
    assert scan({**advisory("jinja2", versions=["3.1.0"]), "withdrawn": "2026-01-01T00:00:00Z"}, OTHER)[0] == 0


ENTRY = '[[accepted]]\nid = "PYSEC-jinja2"\npackage = "Jinja2"\nreason = "templates are not from outside"\nuntil = {}\n'
FOUND = advisory("jinja2", versions=["3.1.0"])


def test_an_accepted_finding_passes_until_its_date(scan):
    code, out, _ = scan(FOUND, accepted=ENTRY.format("2026-06-30"))
    assert (code, "0 findings, 1 accepted" in out) == (0, True)
    code, out, _ = scan(FOUND, accepted=ENTRY.format("2026-06-29"))
    assert code == 1
    assert "PYSEC-jinja2 of Jinja2 expired on 2026-06-29" in out
    assert "jinja2 3.1.0: PYSEC-jinja2, no fixed version" in out


@pytest.mark.parametrize(
    ("accepted", "problem"),
    [
        (ENTRY.format("2026-12-31"), "PYSEC-jinja2 of jinja2 is no longer found; remove it"),
        (ENTRY.format('"soon"'), "needs id, package, reason, and until = YYYY-MM-DD"),
        ('[[accepted]]\nid = "PYSEC-jinja2"\n', "needs id, package, reason, and until = YYYY-MM-DD"),
        (ENTRY.format("2026-12-31").replace("templates are not from outside", " "), "PYSEC-jinja2 has no reason"),
    ],
)
def test_an_accepted_finding_has_a_reason_a_date_and_still_exists(accepted, problem, scan):
    code, out, _ = scan(OTHER, accepted=accepted)
    assert (code, problem in out) == (1, True), out


@pytest.mark.parametrize("content", [[], [advisory("another", "2026-06-15T00:00:00Z")]], ids=["empty", "old"])
def test_an_empty_or_old_database_is_no_scan(content, scan):
    code, _, err = scan(*content)
    assert code == 2
    assert err.startswith("no scan: ")


def test_an_old_database_still_shows_its_findings(scan):
    code, out, err = scan(advisory("jinja2", "2024-10-10T00:00:00Z", versions=["3.1.0"]))
    assert code == 2
    assert "jinja2 3.1.0: PYSEC-jinja2" in out
    assert err == "no scan: the newest advisory is of 2024-10-10; pass a database of the last 14 days\n"


def test_a_database_that_cannot_be_read_or_downloaded_is_no_scan(audit, tmp_path, capsys, monkeypatch):
    (tmp_path / "database").write_text("<html>")
    monkeypatch.setattr(audit, "URL", "http://127.0.0.1:9/all.zip")
    for arguments in ([str(tmp_path / "missing")], [str(tmp_path / "database")], []):
        assert audit.main(arguments, TODAY) == 2
        assert "cannot be read" in capsys.readouterr().err


def test_a_lock_file_without_packages_is_no_scan(scan, tmp_path):
    (tmp_path / "locks" / "new.lock").write_text("# nothing\n")
    code, _, err = scan(OTHER)
    assert (code, "new.lock contains no package" in err) == (2, True)


def test_every_package_of_every_lock_file_is_compared(audit):
    found = audit.read_locks(audit.LOCKS)
    locks = sorted(audit.LOCKS.glob("*.lock"))
    assert len(locks) >= 12
    for lock in locks:
        listed = [key for key, names in found.items() if lock.name in names]
        pinned = [line for line in lock.read_text().splitlines() if "==" in line and not line.startswith((" ", "#"))]
        assert len(listed) == len(pinned) >= 1, lock.name


def test_the_accepted_findings_of_the_repository_are_well_formed_and_current(audit):
    today = datetime.datetime.now(datetime.UTC).date()
    problems = audit.split_accepted([], audit.ACCEPTED, today)[1]
    assert [problem for problem in problems if "is no longer found" not in problem] == []
