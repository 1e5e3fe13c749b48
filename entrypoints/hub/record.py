"""download.json: the origin of a downloaded folder, and every file of it with size and SHA-256."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path

from entrypoints.errors import UserError
from entrypoints.file_writing import indented_json, replace_text
from entrypoints.untrusted import read_json_file

RECORD_FILE = "download.json"
REMOVE_RECORD = "remove it: complete files are kept"
MIN_COMMIT_DIGITS = 7  # of an abbreviated commit
MAX_FILE_BYTES = 1 << 40
_COMMIT = re.compile(rf"[0-9a-fA-F]{{{MIN_COMMIT_DIGITS},64}}")
_DIGEST = re.compile(r"([0-9a-f]{40}|[0-9a-f]{64})?")


@dataclass
class HubFile:
    """One file of a repository."""

    path: str
    size: int  # bytes
    commit: str  # that it is downloaded from
    digest: str  # published by the hub: SHA-256 (64 digits), git's blob SHA-1 (40), or empty
    sha256: str = ""  # of the file in the folder; empty until it is downloaded and verified

    def __post_init__(self) -> None:
        """Raises ValueError or TypeError: a field that no hub gives."""
        if not isinstance(self.path, str):
            raise TypeError("path is not a string")
        if not isinstance(self.size, int) or isinstance(self.size, bool) or not 0 <= self.size <= MAX_FILE_BYTES:
            raise ValueError(f"size {self.size!r:.60} of {self.path!r:.100}")
        if not _COMMIT.fullmatch(self.commit):
            raise ValueError(f"commit {self.commit!r:.60} of {self.path!r:.100}")
        for digest in (self.digest, self.sha256):
            if not _DIGEST.fullmatch(digest):
                raise ValueError(f"digest {digest!r:.80} of {self.path!r:.100}")


@dataclass(frozen=True)
class DownloadRecord:
    """A repository at one commit, and which of its files are complete."""

    model: str
    source: str
    repo: str
    revision: str  # as requested
    commit: str
    files: list[HubFile]

    def __post_init__(self) -> None:
        """Raises ValueError or TypeError: a field that no hub gives."""
        if not all(isinstance(text, str) for text in (self.model, self.source, self.repo, self.revision)):
            raise TypeError("model, source, repo and revision are not strings")
        if not _COMMIT.fullmatch(self.commit):
            raise ValueError(f"commit {self.commit!r:.60}")

    def missing(self) -> list[HubFile]:
        """Files that are not complete yet."""
        return [file for file in self.files if not file.sha256]

    def write(self, folder: Path) -> None:
        """Replace the record atomically: an interrupt leaves the previous one."""
        replace_text(folder / RECORD_FILE, indented_json({"version": 1, **asdict(self)}) + "\n")

    def check_request(self, folder: Path, model: str, source: str, revision: str | None) -> None:
        """Raises UserError unless the folder belongs to this request; source "auto" and no revision always match."""
        is_commit = revision is not None and len(revision) >= MIN_COMMIT_DIGITS and self.commit.startswith(revision)
        requested = [
            (f"model {model}", model == self.model),
            (f"source {source}", source in ("auto", self.source)),
            (f"revision {revision}", revision in (None, self.revision) or is_commit),
        ]
        wrong = [field for field, matches in requested if not matches]
        if wrong:
            actual = f"{self.repo} of {self.source} at revision {self.revision}, commit {self.commit}"
            raise UserError(f"{folder} contains {actual}, not {', '.join(wrong)}", "choose another --output-dir")


def is_commit(value: object) -> bool:
    """Is it the id of a commit, possibly abbreviated?"""
    return isinstance(value, str) and _COMMIT.fullmatch(value) is not None


def is_whole_commit(revision: str) -> bool:
    """Is the revision a commit with all digits, so that it always names the same files?"""
    return len(revision) == 40 and _COMMIT.fullmatch(revision) is not None


def read_download_record(folder: Path) -> DownloadRecord | None:
    """The record of an earlier run, None if there is none. Raises UserError: it is damaged."""
    file = folder / RECORD_FILE
    try:
        fields = read_json_file(file, REMOVE_RECORD)
        fields.pop("version")
        return DownloadRecord(**{**fields, "files": [HubFile(**entry) for entry in fields["files"]]})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({type(error).__name__})", REMOVE_RECORD) from error
