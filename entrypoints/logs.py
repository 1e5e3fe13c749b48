"""Logging, set up once by the command: to stderr, as text or JSON lines, with every secret replaced."""

import json
import logging
import sys
from collections.abc import Iterable

LIBRARIES = (
    "ContinuousBatchingLogger", "accelerate", "datasets", "filelock", "gguf", "httpcore2", "httpx", "httpx2",
    "huggingface_hub", "jieba", "modelscope", "modelscope_hub", "peft", "transformers", "urllib3", "vllm",
)  # fmt: skip
# PEFT imports it, and it warns of a kernel that 4-bit weights on a processor lack: we use them on CUDA alone.
UNUSED = "bitsandbytes.backends.cpu"


class _Redacting(logging.Formatter):
    """Formats a record and blanks the known secrets in all of it: message, arguments, traceback."""

    def __init__(self, as_json: bool, secrets: Iterable[str]) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S")
        self.as_json = as_json
        self.secrets = tuple(secrets)

    def format(self, record: logging.LogRecord) -> str:
        """One line of text, or one JSON object."""
        if not self.as_json:
            return self._redacted(super().format(record))
        fields = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps({name: self._redacted(text) for name, text in fields.items()}, ensure_ascii=False)

    def _redacted(self, text: str) -> str:
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text


class _Library(logging.Logger):
    """A library's logger that keeps no handler: what it adds to itself at import would print unredacted, as text."""

    propagate = property(lambda self: True, lambda self, value: None)

    def addHandler(self, handler: logging.Handler) -> None:
        """Leave it out; the root's handler prints the record."""


def set_up(log_format: str = "text", level: str = "info", secrets: Iterable[str] = ()) -> None:
    """Send all logging to stderr; replaces what an earlier call set up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Redacting(log_format == "json", secrets))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in LIBRARIES:
        library = logging.getLogger(name)
        library.handlers.clear()
        library.__class__ = _Library
        library.setLevel(max(logging.WARNING, logging.getLogger().level))
    logging.getLogger(UNUSED).setLevel(logging.ERROR)
