"""Runs one attempt on many inputs by chance, with a bound on time and memory; each input can be made again."""

import contextlib
import os
import random
import re
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from entrypoints.errors import UserError

SEED = 20240607
OUTCOMES = ("accepted", "rejected")
MAX_SECONDS = 10.0  # of CPU time for one input
MAX_GROWTH_MB = 400  # of the process with one input
MAX_MESSAGE_CHARACTERS = 20_000
NOT_PRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class FuzzSettings:
    """From the environment, as `make fuzz` sets it: SEED, SECONDS for each target (else a fixed number), one CASE."""

    def __init__(self) -> None:
        self.seed = int(os.environ.get("FUZZ_SEED") or SEED)
        self.seconds = float(os.environ.get("FUZZ_SECONDS") or 0)
        self.case = os.environ.get("FUZZ_CASE") or None

    def cases(self, count: int) -> Iterator[int]:
        """Numbers of the inputs: `count` of them, as many as fit the seconds, or the one that was asked for."""
        if self.case:
            yield int(self.case)
            return
        end, number = time.monotonic() + self.seconds, 0
        while number < count or time.monotonic() < end:
            yield number
            number += 1


def fuzz(
    name: str, attempt: Callable[[random.Random], object], count: int, outcomes: Sequence[str] = OUTCOMES
) -> Counter[str]:
    """Call `attempt` with a generator for each input; a UserError of one line or a result is right, all else is not.

    Each of the outcomes must occur. Returns how often they did.
    """
    settings = FuzzSettings()
    seen: Counter[str] = Counter()
    slowest = 0.0
    for number in settings.cases(count):
        started, memory = time.process_time(), _peak_megabytes()
        with case_of(name, settings.seed, number):
            seen[_outcome(attempt, random.Random(f"{name} {settings.seed} {number}"))] += 1
            seconds = time.process_time() - started
            assert seconds < MAX_SECONDS, f"took {seconds:.1f} s"
            assert _peak_megabytes() - memory < MAX_GROWTH_MB, f"took {_peak_megabytes() - memory} MB"
        slowest = max(slowest, seconds)
    if not settings.case:
        assert sorted(seen) == sorted(outcomes), f"{name}: {dict(seen)}, expected some of {' and '.join(outcomes)}"
    print(f"fuzz {name}: seed {settings.seed}, {seen.total()} inputs, {dict(seen)}, slowest {slowest:.2f} s")
    return seen


def _outcome(attempt: Callable[[random.Random], object], chance: random.Random) -> str:
    try:
        attempt(chance)
    except UserError as error:
        _check_message(error)
        return "rejected"
    return "accepted"


def _check_message(error: UserError) -> None:
    text = str(error)
    assert all((error.problem, error.remedy))
    assert not NOT_PRINTABLE.search(text), f"not one printable line: {text[:500]!r}"
    assert len(text) < MAX_MESSAGE_CHARACTERS, f"a message of {len(text)} characters"


@contextlib.contextmanager
def case_of(name: str, seed: int, number: int) -> Iterator[None]:
    """Add the command that makes this input again to whatever is raised in the block."""
    command = f'make fuzz SEED={seed} CASE={number} ARGS="-k {name}"'
    try:
        yield
    except BaseException as error:  # also a panic of a Rust library, not an Exception
        error.add_note(f"input {number} of {name}; again with: {command}")
        raise


def _peak_megabytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
