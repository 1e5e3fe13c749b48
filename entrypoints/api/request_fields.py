"""What every request body has in common: strict types, and one rule for fields that this server does not know.

The rule: a field that would change the answer and cannot be done is refused by name; one that changes nothing passes.
Nothing changes: a field without a value, a switch that is off, a value that is the default, and a label.
"""

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Strict, model_validator
from pydantic_core import PydanticCustomError

from entrypoints.chat_format.openai_messages import is_empty

MAX_FIELDS = 64  # of one object, because each unknown field would become an error; also of prompts
# Values with which other servers' parameters have no effect. Every server has more of them than this one.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "dry_multiplier": (0,),
    "function_call": ("none", "auto"),
    "length_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "mirostat": (0,),
    "modalities": (["text"],),
    "num_beams": (1,),
    "reasoning_effort": ("none",),
    "tfs_z": (1,),
    "thinking": ({"type": "disabled"},),
    "typical_p": (1,),
    "verbosity": ("medium",),
    "xtc_probability": (0,),
}
# Switches that are on here: true has no effect, false would have one. Any other switch is off.
SWITCHES_ON = frozenset(
    {"add_generation_prompt", "do_sample", "skip_special_tokens", "spaces_between_special_tokens"}
)  # fmt: skip
LABELS = frozenset(
    {"cache_prompt", "cache_salt", "drop_params", "priority", "prompt_cache_retention", "request_id"}
)  # fmt: skip


def _not_a_guess(value: object) -> object:
    if isinstance(value, bool | str):
        raise PydanticCustomError("number_type", "must be a number, not a string or a boolean")
    return value


Integer = Annotated[int, BeforeValidator(_not_a_guess)]
Number = Annotated[float, BeforeValidator(_not_a_guess)]
Switch = Annotated[bool, Strict()]


class RequestModel(BaseModel):
    """An object of a request: null is absent, unknown fields that change nothing are dropped, others are errors."""

    model_config = ConfigDict(extra="forbid")
    labels: ClassVar[frozenset[str]] = LABELS

    @model_validator(mode="before")
    @classmethod
    def _drop_fields_without_effect(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        if len(value) > MAX_FIELDS:
            raise ValueError(f"more than {MAX_FIELDS} fields")
        known = {field.alias or name for name, field in cls.model_fields.items()}
        return {
            name: one
            for name, one in value.items()
            if one is not None and (name in known or not cls.has_no_effect(name, one, value))
        }

    @classmethod
    def has_no_effect(cls, name: str, value: object, fields: dict[str, Any]) -> bool:
        """Does this unknown field of an object with these fields change nothing?"""
        if is_empty(value) or name in cls.labels:
            return True
        if isinstance(value, bool):
            return value is (name in SWITCHES_ON)
        if name == "chat_template_kwargs" and isinstance(value, dict):
            return all(cls.has_no_effect(key, one, value) for key, one in value.items())
        return value in NEUTRAL_VALUES.get(name, ())
