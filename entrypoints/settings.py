"""All environment variables of this product. Precedence: command line flag, environment variable, default."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TypeVar

from entrypoints.errors import UserError, read_remedy

LOG_FORMATS = ("text", "json")
LOG_LEVELS = ("debug", "info", "warning", "error")
DEVICES = ("auto", "cuda", "mps", "cpu")
CONVERSATION_PLACES = ("browser", "server", "off")
LOAD_IN_BITS = {"8bit": 8, "4bit": 4}  # bits of the layer matrices that bitsandbytes quantizes while loading

T = TypeVar("T")


@dataclass(frozen=True)
class Secret:
    """A value that is never part of a repr, an f-string or a log line; `.value` is the value itself."""

    value: str = field(default="", repr=False)

    def __bool__(self) -> bool:
        return bool(self.value)


NO_SECRET = Secret()


def _setting(default: T, description: str) -> T:
    return field(default=default, metadata={"description": description})


@dataclass(frozen=True)
class Settings:
    """Environment of a process; each field is read from the variable of the same name in capitals.

    A secret can be in a file instead, as container engines mount it: API_KEY_FILE for API_KEY.
    """

    model_path: str = _setting("", "Folder of a converted checkpoint, or a GGUF file; default of `--model`")
    adapter_path: str = _setting("", "Folder of a converted adapter; default of `--adapter`")
    device: str = _setting("auto", "Device of the transformers engine: auto, cuda, mps or cpu")
    hf_endpoint: str = _setting("https://huggingface.co", "Hugging Face hub or a mirror of it")
    hf_token: Secret = field(default=NO_SECRET, metadata={"description": "Token for gated or private repositories"})
    modelscope_endpoint: str = _setting("https://www.modelscope.cn", "ModelScope hub or a mirror of it")
    api_keys_file: str = _setting("", "Key file of `glm serve`, written by `glm key`")
    api_key: Secret = field(
        default=NO_SECRET,
        metadata={"description": "One more API key of `glm serve`, for a server with a single client"},
    )
    api_url: str = _setting("", "API server that the chat pages use; default of `--api`")
    page_password: Secret = field(
        default=NO_SECRET, metadata={"description": "Password that visitors of `glm web` enter"}
    )
    page_users_file: str = _setting("", "Users file of `glm web`, written by `glm user`; in place of a page password")
    conversations: str = _setting(
        "browser", "Where the chat pages keep conversations: browser, server or off; default of `--conversations`"
    )
    page_state_dir: str = _setting(
        "", "Folder of the conversations on the server, by default that of the users file; default of `--state-dir`"
    )
    feedback_dir: str = _setting(
        "", "Folder for ratings and corrections of visitors; default of `--feedback-dir` of `glm web`"
    )
    output_dir: str = _setting("", "Run that the training page shows; default of `--output-dir` of `glm web`")
    log_format: str = _setting("text", "Format of log lines: text or json")
    log_level: str = _setting("info", "Lowest level that is logged: debug, info, warning or error")

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> "Settings":
        """Read the variables; an empty variable, or an empty file of a secret, counts as unset.

        Raises UserError: names all variables with an invalid value, or the file that cannot be read.
        """
        values: dict[str, str | Secret] = {}
        for f in fields(cls):
            value = env.get(f.name.upper(), "")
            if f.type is Secret:
                values[f.name] = Secret(value or _read_secret_file(f"{f.name.upper()}_FILE", env))
            elif value:
                values[f.name] = value
        settings = cls(**values)  # type: ignore[arg-type]  # Secret and str go to fields of that type
        allowed = {
            "log_format": LOG_FORMATS, "log_level": LOG_LEVELS, "device": DEVICES, "conversations": CONVERSATION_PLACES
        }  # fmt: skip
        invalid = [
            f"{name.upper()}={getattr(settings, name)}"
            for name in allowed
            if getattr(settings, name) not in allowed[name]
        ]
        if invalid:
            choices = ", ".join(f"{name.upper()} {'|'.join(allowed[name])}" for name in allowed)
            raise UserError(f"invalid value: {', '.join(invalid)}", f"allowed are {choices}")
        return settings

    def changed(self) -> str:
        """The variables that are set, one after the other; of a secret only that it is set."""
        values = {f.name.upper(): getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        shown = (f"{name}={'(set)' if isinstance(value, Secret) else value}" for name, value in values.items())
        return ", ".join(shown) or "defaults"

    def secrets(self) -> list[str]:
        """Values that must not appear in a log."""
        values = (getattr(self, f.name) for f in fields(self))
        return [value.value for value in values if isinstance(value, Secret) and value]


def _read_secret_file(variable: str, env: Mapping[str, str]) -> str:
    """First line of the file that the variable names; empty if the variable is not set."""
    if not env.get(variable):
        return ""
    try:
        return Path(env[variable]).read_text(encoding="utf-8-sig").partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        remedy = read_remedy(error, env[variable], "name a readable text file")
        raise UserError(f"{variable}={env[variable]} cannot be read ({error})", remedy) from error
