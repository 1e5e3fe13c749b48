"""download.json: where a downloaded folder came from, and every file of it with size and SHA-256."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from entrypoints.errors import UserError

RECORD_FILE = "download.json"


@dataclass
class HubFile:
    """One file of a repository."""

    path: str
    size: int  # bytes
    commit: str  # the one it is fetched at
    digest: str  # what the hub promises: SHA-256 (64 digits), git's blob SHA-1 (40), or nothing
    sha256: str = ""  # what lies in the folder; empty until it was checked


@dataclass(frozen=True)
class Record:
    """A repository at one commit, and how much of it is here."""

    model: str
    source: str
    repo: str
    revision: str  # as asked for
    commit: str
    files: list[HubFile]

    def missing(self) -> list[HubFile]:
        """Files that are still to be fetched."""
        return [file for file in self.files if not file.sha256]

    def write(self, folder: Path) -> None:
        """Replace the record in one step, so that an interrupt leaves the older one."""
        partial = folder / f"{RECORD_FILE}.part"
        partial.write_text(
            json.dumps({"version": 1, **asdict(self)}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        partial.replace(folder / RECORD_FILE)

    def require_same(self, folder: Path, model: str, source: str, revision: str | None) -> None:
        """Raise UserError unless the folder holds what is asked for; source "auto" and no revision fit always."""
        commit = revision and len(revision) >= 7 and self.commit.startswith(revision)
        asked = [
            (f"model {model}", model == self.model),
            (f"source {source}", source in ("auto", self.source)),
            (f"revision {revision}", revision in (None, self.revision) or commit),
        ]
        wrong = [what for what, fits in asked if not fits]
        if wrong:
            holds = f"{self.repo} of {self.source} at revision {self.revision}, commit {self.commit}"
            raise UserError(f"{folder} holds {holds}, not {', '.join(wrong)}", "choose another --output-dir")


def read_record(folder: Path) -> Record | None:
    """The record of an earlier run; raises UserError when it is damaged."""
    file = folder / RECORD_FILE
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        fields.pop("version")
        return Record(**{**fields, "files": [HubFile(**entry) for entry in fields["files"]]})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{file} is damaged ({type(error).__name__})", "remove it: files that are complete are kept"
        ) from error
