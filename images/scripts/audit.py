"""Compares every lock file with published advisories in the OSV format: `make audit [ADVISORIES=FILE_OR_FOLDER]`.

ADVISORIES: the all.zip of osv.dev, which is downloaded if nothing is given, or a folder with advisories in YAML or
JSON, such as a clone of github.com/pypa/advisory-database. Exit code 0: a current database reports nothing, 1: findings
are listed, 2: no scan. pip-audit is not used: it asks servers about each package and reads no database from a file.
"""

import argparse
import datetime
import json
import re
import sys
import tempfile
import tomllib
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

LOCKS = Path(__file__).resolve().parents[1] / "requirements"
ACCEPTED = LOCKS / "accepted-advisories.toml"
URL = "https://osv-vulnerabilities.storage.googleapis.com/PyPI/all.zip"
TIMEOUT_SECONDS = 60
MAX_DOWNLOAD_BYTES = 1 << 30
MAX_AGE_DAYS = 14  # of the newest advisory; several appear every day
PACKAGE = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;\\]+)", re.MULTILINE)


class NoScanError(Exception):
    """There is no database, or no current one."""


@dataclass(frozen=True)
class Finding:
    """A locked version that an advisory names; `fixed`: versions that are not affected."""

    advisory: str
    package: str
    version: str
    locks: tuple[str, ...]
    fixed: tuple[str, ...]

    def __str__(self) -> str:
        remedy = f"fixed in {', '.join(self.fixed)}" if self.fixed else "no fixed version"
        return f"{self.package} {self.version}: {self.advisory}, {remedy} ({', '.join(self.locks)})"


def main(argv: list[str] | None = None, today: datetime.date | None = None) -> int:
    """Print the findings; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("advisories", nargs="?", type=Path, help=f"file or folder; default: {URL}")
    parser.add_argument("--locks", type=Path, default=LOCKS, help="folder with *.lock and accepted-advisories.toml")
    args = parser.parse_args(argv)
    today = today or datetime.datetime.now(datetime.UTC).date()
    try:
        advisories = list(read_advisories(args.advisories))
        newest = newest_date(advisories)
        findings = find(advisories, read_locks(args.locks))
        open_, problems = split_accepted(findings, args.locks / ACCEPTED.name, today)
        for line in (*open_, *problems):
            print(line)
        print(
            f"{len(advisories)} advisories up to {newest}: {len(open_)} findings, {len(findings) - len(open_)} accepted"
        )
        if (today - newest).days > MAX_AGE_DAYS:
            raise NoScanError(f"the newest advisory is of {newest}; pass a database of the last {MAX_AGE_DAYS} days")
    except NoScanError as error:
        print(f"no scan: {error}", file=sys.stderr)
        return 2
    return 1 if open_ or problems else 0


def read_advisories(source: Path | None) -> Iterator[dict[str, Any]]:
    """All advisories that were not withdrawn. Raises NoScanError: they cannot be read, or there are none."""
    count = 0
    try:
        for text in _texts(source):
            advisory = yaml.load(text, yaml.CSafeLoader) if not text.lstrip().startswith("{") else json.loads(text)
            if isinstance(advisory, dict) and "affected" in advisory and "withdrawn" not in advisory:
                count += 1
                yield advisory
    except (OSError, ValueError, yaml.YAMLError, zipfile.BadZipFile) as error:
        raise NoScanError(f"{source or URL} cannot be read ({error}); pass ADVISORIES=FILE_OR_FOLDER") from error
    if not count:
        raise NoScanError(f"{source or URL} contains no advisories")


def _texts(source: Path | None) -> Iterator[str]:
    if source is None:
        with tempfile.NamedTemporaryFile(suffix=".zip") as file:
            with urllib.request.urlopen(URL, timeout=TIMEOUT_SECONDS) as response:
                while (block := response.read(1 << 20)) and file.tell() < MAX_DOWNLOAD_BYTES:
                    file.write(block)
            file.flush()
            yield from _texts(Path(file.name))
    elif source.is_dir():
        for path in sorted(path for path in source.rglob("*") if path.suffix in (".yaml", ".json")):
            yield path.read_text(encoding="utf-8")
    else:
        with zipfile.ZipFile(source) as archive:
            for name in archive.namelist():
                yield archive.read(name).decode("utf-8")


def newest_date(advisories: list[dict[str, Any]]) -> datetime.date:
    """When the newest advisory was published or modified."""
    return max(datetime.date.fromisoformat(f"{one.get('modified', '1970-01-01')}"[:10]) for one in advisories)


def read_locks(folder: Path) -> dict[tuple[str, str], set[str]]:
    """Names of the lock files by package and version. Raises NoScanError: a lock file has no package."""
    found: dict[tuple[str, str], set[str]] = {}
    for lock in sorted(folder.glob("*.lock")):
        packages = PACKAGE.findall(lock.read_text(encoding="utf-8"))
        if not packages:
            raise NoScanError(f"{lock} contains no package")
        for name, version in packages:
            found.setdefault((canonicalize_name(name), version), set()).add(lock.name)
    if not found:
        raise NoScanError(f"{folder} contains no lock file")
    return found


def find(advisories: list[dict[str, Any]], locked: dict[tuple[str, str], set[str]]) -> list[Finding]:
    """All findings, by package."""
    versions: dict[str, list[str]] = {}
    for name, version in locked:
        versions.setdefault(name, []).append(version)
    found = {
        Finding(advisory["id"], name, version, tuple(sorted(locked[name, version])), _fixed(affected))
        for advisory in advisories
        for affected in advisory["affected"]
        if affected.get("package", {}).get("ecosystem") == "PyPI"
        for name in [canonicalize_name(affected["package"]["name"])]
        for version in versions.get(name, [])
        if is_affected(version, affected)
    }
    return sorted(found, key=lambda finding: (finding.package, finding.version, finding.advisory))


def is_affected(version: str, affected: dict[str, Any]) -> bool:
    """Is the version listed or within a range? A range that cannot be compared counts as affected."""
    try:
        ours = Version(Version(version).public)  # torch 2.13.0+cpu is 2.13.0
        if any(Version(f"{one}") == ours for one in affected.get("versions", []) if _is_version(f"{one}")):
            return True
        return any(_in_range(ours, one["events"]) for one in affected.get("ranges", []) if one["type"] != "GIT")
    except InvalidVersion:
        return True


def _is_version(text: str) -> bool:
    try:
        Version(text)
    except InvalidVersion:  # some very old releases have such versions, none of them can be locked
        return False
    return True


def _in_range(ours: Version, events: list[dict[str, Any]]) -> bool:
    inside = False
    for kind, text in sorted(
        ((kind, f"{text}") for event in events for kind, text in event.items() if kind != "limit"),
        key=lambda event: (Version(event[1]), event[0] != "introduced"),
    ):
        limit = Version(text)
        if kind == "introduced" and ours >= limit:
            inside = True
        elif (kind == "fixed" and ours >= limit) or (kind == "last_affected" and ours > limit):
            inside = False
    return inside


def _fixed(affected: dict[str, Any]) -> tuple[str, ...]:
    ranges = [one["events"] for one in affected.get("ranges", []) if one["type"] != "GIT"]
    return tuple(f"{event['fixed']}" for events in ranges for event in events if "fixed" in event)


def split_accepted(findings: list[Finding], file: Path, today: datetime.date) -> tuple[list[Finding], list[str]]:
    """The findings that are not accepted, and what is wrong with entries of the file."""
    entries = tomllib.loads(file.read_text(encoding="utf-8")).get("accepted", []) if file.is_file() else []
    accepted, problems = set(), []
    for entry in entries:
        if set(entry) != {"id", "package", "reason", "until"} or not isinstance(entry["until"], datetime.date):
            problems.append(f"{file.name}: {entry} needs id, package, reason, and until = YYYY-MM-DD")
        elif not f"{entry['reason']}".strip():
            problems.append(f"{file.name}: {entry['id']} has no reason")
        elif entry["until"] < today:
            problems.append(
                f"{file.name}: {entry['id']} of {entry['package']} expired on {entry['until']}; decide again"
            )
        else:
            accepted.add((entry["id"], canonicalize_name(entry["package"])))
    found = {(finding.advisory, finding.package) for finding in findings}
    problems += [
        f"{file.name}: {id_} of {package} is no longer found; remove it" for id_, package in sorted(accepted - found)
    ]
    return [finding for finding in findings if (finding.advisory, finding.package) not in accepted], problems


if __name__ == "__main__":
    sys.exit(main())
