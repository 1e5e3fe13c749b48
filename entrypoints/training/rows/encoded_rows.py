"""The encoded rows of a run: a cache in the output folder, keyed by content, built before the processes start.

The first process that needs the rows encodes them, of all processes and nodes that share the folder; the others wait
for a file lock and read. No process waits in a collective call, so a long encoding cannot cause an NCCL timeout.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import math
import shutil
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import datasets
import torch

from entrypoints.checkpoint.atomic_files import exclusive_lock
from entrypoints.checkpoint.tokenizer import TOKENIZER_FILE
from entrypoints.dataset.reader import Example, SkippedRow, stream_examples, stream_rows
from entrypoints.dataset.row_files import part_files
from entrypoints.dataset.skipped_rows import SkippedRows
from entrypoints.errors import UserError
from entrypoints.training.arguments import TrainArguments
from entrypoints.training.rows.collation import RowEncoder, encode_rows

logger = logging.getLogger(__name__)
FOLDER = ".rows"
ROWS_FILE = "rows.arrow"
MAX_LOGGED_FILES = 10  # of many parts of a folder
MAX_LOGGED_SKIPS = 10  # skipped rows of a file that are logged with their line
ENCODING_VERSION = 5  # increase when the same row would be encoded differently


@dataclass
class RowCounts:
    """Used and skipped rows of each file, and the reasons for skipping in all of them."""

    used: Counter[Path] = field(default_factory=Counter)
    skipped: Counter[Path] = field(default_factory=Counter)
    all_skipped: SkippedRows = field(default_factory=SkippedRows)

    def add_skipped(self, row: SkippedRow) -> None:
        """Count a row that cannot be used; the first ones of each file are logged."""
        self.skipped[row.file] += 1
        self.all_skipped.add(row)
        if self.skipped[row.file] <= MAX_LOGGED_SKIPS:
            logger.warning("skipped %s:%d: %s", row.file.name, row.line, row.reason)

    def move_to_skipped(self, row: SkippedRow) -> None:
        """Count a row as skipped that was counted as used when it was read."""
        self.used[row.file] -= 1
        self.add_skipped(row)

    def check(self, max_skipped: int | None) -> None:
        """Log the counts of each file; raise UserError for too many skipped rows or no usable row."""
        files = list(dict.fromkeys((*self.used, *self.skipped)))
        for file in files[:MAX_LOGGED_FILES]:
            logger.info("%s: %d rows used, %d skipped", file, self.used[file], self.skipped[file])
        if len(files) > MAX_LOGGED_FILES:
            logger.info("%d files: %d rows used, %d skipped", len(files), self.used.total(), self.skipped.total())
        if not self.used.total():
            raise UserError(f"no usable row: {self.all_skipped.counts()}", self.all_skipped.fix())
        self.all_skipped.check(max_skipped)


def load_encoded_rows(
    files: Sequence[Path], arguments: TrainArguments, encoder: RowEncoder, max_rows: int | None = None
) -> datasets.Dataset:
    """The encoded rows of the files, from the cache of the output folder if an earlier process encoded them.

    They have the columns of `encoder.schema`. max_rows: stop reading after so many usable rows. Raises UserError for
    columns that no row has, limits that are too small for the special tokens, more skipped rows than `max_skipped`.
    """
    folder = arguments.output_dir / FOLDER / _cache_key(files, arguments, encoder, max_rows)
    with exclusive_lock(folder.parent / "lock"):
        if not folder.is_dir():
            counts = RowCounts()
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            file, workers = partial / ROWS_FILE, arguments.preprocessing_num_workers
            with contextlib.closing(_read(files, arguments, counts)) as rows:
                encode_rows(itertools.islice(rows, max_rows), encoder, file, counts.move_to_skipped, workers)
            counts.check(arguments.max_skipped)
            partial.rename(folder)
        else:
            logger.info("%s: using the cached encoded rows", ", ".join(map(str, files)))
    return datasets.Dataset.from_file(str(folder / ROWS_FILE))


def mix_rows(rows: datasets.Dataset, arguments: TrainArguments, encoder: RowEncoder) -> datasets.Dataset:
    """The rows and a random choice of those of --mix, which are `mix_share` of the result; the seed determines it.

    Raises UserError: the file of --mix has too few rows.
    """
    if arguments.mix_file is None:
        return rows
    general = load_encoded_rows([arguments.mix_file], arguments, encoder)
    count = max(1, round(len(rows) * arguments.mix_share / (1 - arguments.mix_share)))
    if count > len(general):
        largest = math.floor(1000 * len(general) / (len(rows) + len(general))) / 1000
        raise UserError(
            f"--mix {arguments.mix} needs {count} rows, the file has {len(general)}",
            f"use --mix {arguments.mix_file}:{largest:g}, or a file with more rows",
        )
    chosen = torch.randperm(len(general), generator=torch.Generator().manual_seed(arguments.seed))[:count]
    indices = sorted(chosen.tolist())
    mixed = general.select(indices, keep_in_memory=True).flatten_indices(keep_in_memory=True)  # no other rows in it
    logger.info("mixed %d rows of %s with %d rows of the task", count, arguments.mix_file, len(rows))
    return datasets.concatenate_datasets([rows, mixed])


def _read(files: Sequence[Path], arguments: TrainArguments, counts: RowCounts) -> Generator[Example, None, None]:
    for file in files:
        reader = stream_examples(stream_rows(file, arguments.encoding), arguments.columns_of(file), file)
        try:
            for row in reader:
                if isinstance(row, Example):
                    counts.used[row.file] += 1
                    yield row
                else:
                    counts.add_skipped(row)
        finally:  # also after --max-train-samples rows
            reader.log()


def _cache_key(files: Sequence[Path], arguments: TrainArguments, encoder: RowEncoder, max_rows: int | None) -> str:
    """Hash of all that determines the token ids: bytes of the files, tokenizer, prompt format and limits."""
    settings = {
        "version": ENCODING_VERSION,
        "encoding": arguments.encoding,
        "columns": [asdict(arguments.columns_of(file)) for file in files],
        "format": asdict(encoder.prompt_format),
        "limits": [encoder.max_source_length, encoder.max_target_length, max_rows],
        "max_skipped": arguments.max_skipped,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    parts = [part for file in files for part in part_files(file)]
    for file in (*parts, arguments.model_name_or_path / TOKENIZER_FILE):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:32]
