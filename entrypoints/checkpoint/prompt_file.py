"""prompt.json: the prompt format and the model family of a converted checkpoint or adapter."""

from pathlib import Path

from entrypoints.chat_format.prompt import PromptFormat
from entrypoints.checkpoint.atomic_files import check_not_lfs_pointer
from entrypoints.errors import UserError
from entrypoints.untrusted import read_json_file

PROMPT_FILE = "prompt.json"


def read_prompt_format(folder: Path) -> PromptFormat:
    """The stored prompt format; that of ChatGLM3 if the folder has none. Raises UserError: it is not valid."""
    file = folder / PROMPT_FILE
    if not file.is_file():
        return PromptFormat()
    try:
        check_not_lfs_pointer(file)
        return PromptFormat(**read_json_file(file))
    except TypeError as error:
        raise UserError(
            f"{file} is not valid ({error})", "its fields are `template`, `source_prefix` and `family`"
        ) from error
