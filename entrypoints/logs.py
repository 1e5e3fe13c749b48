"""Logging to stderr as text or JSON lines, with all secrets replaced; configured once by the command line."""

import contextlib
import json
import logging
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

LIBRARIES = (
    "ContinuousBatchingLogger", "accelerate", "datasets", "filelock", "gguf", "httpcore2", "httpx", "httpx2",
    "huggingface_hub", "jieba", "modelscope", "modelscope_hub", "peft", "transformers", "urllib3", "vllm",
)  # fmt: skip
# Imported by PEFT; warns about a CPU kernel for 4-bit weights that is missing and not used here.
SILENCED_LOGGER = "bitsandbytes.backends.cpu"


class _RedactingFormatter(logging.Formatter):
    """Formats a record and replaces known secrets everywhere: message, arguments, traceback."""

    def __init__(self, as_json: bool, secrets: Iterable[str], date_format: str = "%H:%M:%S") -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s", date_format)
        self.as_json = as_json
        self.secrets = tuple(secrets)

    def format(self, record: logging.LogRecord) -> str:
        """One line of text, or one JSON object."""
        if not self.as_json:
            return self._redact(super().format(record))
        fields = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps({name: self._redact(text) for name, text in fields.items()}, ensure_ascii=False)

    def _redact(self, text: str) -> str:
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text


class _LibraryLogger(logging.Logger):
    """A library's logger without handlers: a handler added at import would print secrets, and text instead of JSON."""

    def addHandler(self, handler: logging.Handler) -> None:
        """Ignore the handler; the root handler prints the record."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Ignore `propagate = False`, which would hide the records from the root handler."""
        if name != "propagate":
            super().__setattr__(name, value)


def configure(log_format: str = "text", level: str = "info", secrets: Iterable[str] = ()) -> None:
    """Send all logging to stderr; replaces an earlier configuration."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_RedactingFormatter(log_format == "json", secrets))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in LIBRARIES:
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
        library.__class__ = _LibraryLogger
        library.setLevel(max(logging.WARNING, logging.getLogger().level))
    logging.getLogger(SILENCED_LOGGER).setLevel(logging.ERROR)


@contextlib.contextmanager
def copied_to(file: Path, append: bool) -> Iterator[None]:
    """Write what is logged inside the block to a file as well, as text with dates.

    append: after what the file has; else it is emptied first. A file that cannot be written is logged, and the block
    runs without it.
    """
    root = logging.getLogger()
    secrets = [secret for one in root.handlers for secret in getattr(one.formatter, "secrets", ())]
    try:
        handler = logging.FileHandler(file, "a" if append else "w", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        root.warning("cannot write %s (%s)", file, error.strerror)
        yield
        return
    handler.setFormatter(_RedactingFormatter(False, secrets, "%Y-%m-%d %H:%M:%S"))
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()
