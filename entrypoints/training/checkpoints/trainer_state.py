"""trainer_state.json of a checkpoint: the fields that the Trainer takes over when a run is resumed, checked before."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from entrypoints.errors import UserError
from entrypoints.training.output_files import REJECTED_REMEDY
from entrypoints.untrusted import read_json_file

MAX_STEPS = 10**9
MAX_NUMBER = 1e30  # of any other field: total_flos is the largest
COUNTERS = ("global_step", "max_steps")
TEXTS = ("best_model_checkpoint", "trial_name", "trial_params", "stateful_callbacks", "log_history")


def read_trainer_state(file: Path) -> dict[str, Any]:
    """The state of the Trainer. Raises UserError naming a field that the Trainer or the reports cannot use."""
    from transformers import TrainerState  # imported late: it takes seconds

    state = read_json_file(file, REJECTED_REMEDY)
    if not isinstance(state, dict):
        raise UserError(f"{file} is not a JSON object", REJECTED_REMEDY)
    unknown = sorted(set(state) - {field.name for field in fields(TrainerState)})
    wrong = [name for name in sorted({*COUNTERS, *state}.difference(unknown)) if not _is_valid(name, state.get(name))]
    if unknown or wrong:
        names = ", ".join((unknown + wrong)[:4])
        raise UserError(f"{file} has fields that the Trainer did not write: {names}", REJECTED_REMEDY)
    return state


def is_step(value: object) -> bool:
    """Is it a number of steps?"""
    return type(value) is int and 0 <= value <= MAX_STEPS


def _is_valid(name: str, value: Any) -> bool:
    if name in COUNTERS:
        return is_step(value)
    if name == "log_history":
        return isinstance(value, list) and all(map(_is_event, value))
    if name == "stateful_callbacks":
        return isinstance(value, dict)
    if name in TEXTS or value is None:
        return True
    return isinstance(value, bool | int | float) and -MAX_NUMBER <= value <= MAX_NUMBER


def _is_event(event: Any) -> bool:
    """A report prints its numbers. A loss may be infinite or not a number."""
    if not isinstance(event, dict) or not is_step(event.get("step")):
        return False
    return not any(isinstance(value, int) and abs(value) > MAX_NUMBER for value in event.values())
