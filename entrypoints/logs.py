"""Logging, set up once by the command: to stderr, as text or JSON lines, with every secret replaced."""

import json
import logging
import sys
from collections.abc import Iterable

NOISY = ("httpx", "httpx2", "httpcore2", "urllib3", "filelock", "jieba", "datasets", "modelscope")


class _Redacting(logging.Formatter):
    """Formats a record, then blanks the known secrets in the finished line (message, arguments, traceback)."""

    def __init__(self, as_json: bool, secrets: Iterable[str]) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S")
        self.as_json = as_json
        self.secrets = tuple(secrets)

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        if self.as_json:
            fields = {
                "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
                "level": record.levelname.lower(),
                "logger": record.name,
                "message": record.getMessage(),
            }
            if record.exc_info:
                fields["exception"] = self.formatException(record.exc_info)
            line = json.dumps(fields, ensure_ascii=False)
        for secret in self.secrets:
            line = line.replace(secret, "***")
        return line


def set_up(log_format: str = "text", level: str = "info", secrets: Iterable[str] = ()) -> None:
    """Send all logging to stderr; replaces what an earlier call set up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Redacting(log_format == "json", secrets))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in NOISY:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))
