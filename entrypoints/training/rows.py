"""The encoded rows of a run: made once, before its processes wait for each other, and kept by their content.

They lie in the output folder. Whoever comes first, of processes and of machines that share it, encodes; the others
wait for a file lock and read. No collective call waits, so no NCCL timeout ends a run with many rows.
"""

import hashlib
import itertools
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import datasets

from entrypoints.checkpoint.files import locked
from entrypoints.checkpoint.tokenizer import TOKENIZER_FILE
from entrypoints.dataset.reading import Example, Skipped, require_columns, stream_examples, stream_rows
from entrypoints.errors import UserError
from entrypoints.training.arguments import TrainArguments
from entrypoints.training.batches import RowEncoder, encode_rows

logger = logging.getLogger(__name__)
FOLDER = ".rows"
ROWS_FILE = "rows.arrow"
TOLD = 10  # skipped rows of a file that are named
ENCODING_VERSION = 3  # to be raised when the same row would give other ids


@dataclass
class Tally:
    """What became of the rows: how many of each file are used, and how many are not and why."""

    used: Counter = field(default_factory=Counter)
    skipped: Counter = field(default_factory=Counter)
    reasons: Counter = field(default_factory=Counter)

    def skip(self, row: Skipped) -> None:
        """Count a row that cannot be used; the first of each file are named."""
        self.skipped[row.file] += 1
        self.reasons[row.reason] += 1
        if self.skipped[row.file] <= TOLD:
            logger.warning("skipped %s:%d: %s", row.file.name, row.line, row.reason)

    def skip_read(self, row: Skipped) -> None:
        """The same for a row that was taken for a usable one when it was read."""
        self.used[row.file] -= 1
        self.skip(row)

    def judge(self, allowed: int | None) -> None:
        """Log the counts of each file; raise UserError for more skipped rows than allowed, or no usable one."""
        for file in dict.fromkeys((*self.used, *self.skipped)):
            logger.info("%s: %d rows used, %d skipped", file, self.used[file], self.skipped[file])
        unusable, counts = self.reasons.total(), ", ".join(f"{n} {why}" for why, n in self.reasons.most_common())
        if allowed is not None and unusable > allowed:
            raise UserError(f"{unusable} rows cannot be used ({counts})", f"mend them, or allow more than {allowed}")
        if not self.used.total():
            raise UserError(f"no usable row: {counts}", "mend the rows, or raise the limit that they do not fit")


def encoded(
    files: Sequence[Path], arguments: TrainArguments, encoder: RowEncoder, most: int | None = None
) -> datasets.Dataset:
    """The rows of the files, encoded now or by an earlier process of any run into the same folder.

    most: read no further than so many readable rows. Raises UserError for files and columns that do not work, limits
    that hold no frame, and more skipped rows than `max_skipped`.
    """
    folder = arguments.output_dir / FOLDER / _key(files, arguments, encoder, most)
    with locked(folder.parent / "lock"):
        if not folder.is_dir():
            tally = Tally()
            rows = itertools.islice(_read(files, arguments, tally), most)
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            encode_rows(rows, encoder, partial / ROWS_FILE, tally.skip_read, arguments.preprocessing_num_workers)
            tally.judge(arguments.max_skipped)
            partial.rename(folder)
        else:
            logger.info("%s: rows encoded before", ", ".join(map(str, files)))
    return datasets.Dataset.from_file(str(folder / ROWS_FILE))


def _read(files: Sequence[Path], arguments: TrainArguments, tally: Tally) -> Iterator[Example]:
    for file in files:
        require_columns(file, arguments.encoding, arguments.columns)
        for row in stream_examples(stream_rows(file, arguments.encoding), arguments.columns):
            if isinstance(row, Example):
                tally.used[file] += 1
                yield row
            else:
                tally.skip(row)


def _key(files: Sequence[Path], arguments: TrainArguments, encoder: RowEncoder, most: int | None) -> str:
    """Hash of all that decides the ids: the files' bytes, the vocabulary, the format and the limits."""
    told = {
        "version": ENCODING_VERSION,
        "encoding": arguments.encoding,
        "columns": asdict(arguments.columns),
        "format": asdict(encoder.prompt_format),
        "limits": [encoder.max_source_length, encoder.max_target_length, most],
        "max_skipped": arguments.max_skipped,
    }
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for file in (*files, arguments.model_name_or_path / TOKENIZER_FILE):
        if not file.is_file():  # said here as the reader says it
            raise UserError(f"there is no file {file}", "check the path")
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:32]
