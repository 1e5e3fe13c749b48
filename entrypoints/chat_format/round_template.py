"""The prompt template `round` of ChatGLM2, one text. Source: `build_prompt` of its tokenization_chatglm.py."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from entrypoints.errors import UserError

if TYPE_CHECKING:
    from entrypoints.chat_format.prompt import Message


def round_text(turns: Sequence["Message"], source_prefix: str) -> str:
    """The prompt; raises UserError: a turn that the template has no place for."""
    text, number = source_prefix, 0
    for turn in turns:
        if turn.role == "user":
            number += 1
            text += f"[Round {number}]\n\n问：{turn.content}\n\n答："
        elif turn.role == "assistant" and number and not turn.metadata:
            text += f"{turn.content}\n\n"
        else:
            kind = "tool call" if turn.metadata else f"{turn.role} turn"
            raise UserError(f"the template `round` has no {kind}", "use only user and assistant turns")
    return text
