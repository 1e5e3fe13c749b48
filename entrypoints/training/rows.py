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
from dataclasses import asdict
from pathlib import Path

import datasets

from entrypoints.checkpoint.files import locked
from entrypoints.checkpoint.tokenizer import TOKENIZER_FILE
from entrypoints.dataset.reading import Example, require_columns, stream_examples, stream_rows
from entrypoints.errors import UserError
from entrypoints.training.arguments import TrainArguments
from entrypoints.training.batches import RowEncoder, encode_rows

logger = logging.getLogger(__name__)
FOLDER = ".rows"
ROWS_FILE = "rows.arrow"
TOLD = 10  # skipped rows of a file that are named
ENCODING_VERSION = 2  # to be raised when the same row would give other ids


def encoded(files: Sequence[Path], arguments: TrainArguments, encoder: RowEncoder) -> datasets.Dataset:
    """The rows of the files, encoded now or by an earlier process of any run into the same folder.

    Raises UserError for files and columns that do not work and limits that hold no frame.
    """
    folder = arguments.output_dir / FOLDER / _key(files, arguments, encoder)
    with locked(folder.parent / "lock"):
        if not folder.is_dir():
            rows = itertools.islice(_read(files, arguments), arguments.max_train_samples)
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            encode_rows(rows, encoder, partial / ROWS_FILE, arguments.preprocessing_num_workers)
            partial.rename(folder)
        else:
            logger.info("%s: rows encoded before", ", ".join(map(str, files)))
    return datasets.Dataset.from_file(str(folder / ROWS_FILE))


def _read(files: Sequence[Path], arguments: TrainArguments) -> Iterator[Example]:
    reasons = Counter()
    for file in files:
        require_columns(file, arguments.encoding, arguments.columns)
        used = skipped = 0
        for row in stream_examples(stream_rows(file, arguments.encoding), arguments.columns):
            if isinstance(row, Example):
                used += 1
                yield row
                continue
            skipped += 1
            reasons[row.reason] += 1
            if skipped <= TOLD:
                logger.warning("skipped %s:%d: %s", row.file.name, row.line, row.reason)
        logger.info("%s: %d rows used, %d skipped", file, used, skipped)
    if arguments.max_skipped is not None and reasons.total() > arguments.max_skipped:
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        raise UserError(
            f"{reasons.total()} rows cannot be used ({counts})",
            f"mend them, or allow more than {arguments.max_skipped}",
        )


def _key(files: Sequence[Path], arguments: TrainArguments, encoder: RowEncoder) -> str:
    """Hash of all that decides the ids: the files' bytes, the vocabulary, the format and the limits."""
    told = {
        "version": ENCODING_VERSION,
        "encoding": arguments.encoding,
        "columns": asdict(arguments.columns),
        "format": asdict(encoder.prompt_format),
        "limits": [encoder.max_source_length, encoder.max_target_length, arguments.max_train_samples],
        "max_skipped": arguments.max_skipped,
    }
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for file in (*files, arguments.model_name_or_path / TOKENIZER_FILE):
        if not file.is_file():  # said here as the reader says it
            raise UserError(f"there is no file {file}", "check the path")
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:32]
