"""run_status.json: the state of a run, rewritten every few seconds by the process that owns the output folder.

A reader tells a run that was killed by its last heartbeat. Imports nothing heavy, because the training page reads it.
"""

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from entrypoints.errors import UserError
from entrypoints.file_writing import replace_text
from entrypoints.training.output_files import RUN_STATUS_FILE

STATES = ("running", "stopped", "failed", "finished")
PHASES = ("preparing", "training", "checking")  # before the first step, the steps, after the last step
HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0  # a run without a heartbeat for so long is not running any more
MAX_MESSAGE = 2000  # characters


@dataclass
class RunStatus:
    """A run; `started` and `heartbeat` in unix seconds, steps in optimizer steps.

    first_step: the steps of the checkpoint that the run continues.
    """

    first_step: int
    total_steps: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    state: str = "running"
    phase: str = PHASES[0]
    message: str = ""
    started: float = field(default_factory=time.time)
    heartbeat: float = 0.0


class StatusFile:
    """Keeps run_status.json of an output folder up to date from a thread of its own."""

    def __init__(self, folder: Path, status: RunStatus, interval: float = HEARTBEAT_SECONDS) -> None:
        self._file = folder / RUN_STATUS_FILE
        self._status = status
        self._interval = interval
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def enter_phase(self, phase: str) -> None:
        """Record the next one of PHASES."""
        self._status.phase = phase
        self._write()

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Write the file inside the block, and how the block ended; exceptions are raised again."""
        self._write()
        thread = threading.Thread(target=self._beat, name="run status", daemon=True)
        thread.start()
        state, message = "failed", ""
        try:
            yield
            state = "finished"
        except UserError as error:
            message = f"{error.problem}; {error.remedy}"
            raise
        except (KeyboardInterrupt, SystemExit) as error:
            state, message = "stopped", "SIGINT" if isinstance(error, KeyboardInterrupt) else "SIGTERM"
            raise
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            raise
        finally:
            self._ended.set()
            thread.join()
            self._status.state, self._status.message = state, message[:MAX_MESSAGE]
            self._write()

    def _beat(self) -> None:
        while not self._ended.wait(self._interval):
            self._write()

    def _write(self) -> None:
        """A full disk must not end the run: the next heartbeat tries again."""
        with self._lock, contextlib.suppress(OSError):
            self._status.heartbeat = time.time()
            replace_text(self._file, json.dumps(asdict(self._status), default=str, indent=1) + "\n")
