"""Every environment variable this product reads: a flag beats a variable, a variable beats a default."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from entrypoints.errors import UserError

LOG_FORMATS = ("text", "json")
LOG_LEVELS = ("debug", "info", "warning", "error")
DEVICES = ("auto", "cuda", "mps", "cpu")
LOADS = {"8bit": 8, "4bit": 4}  # what bitsandbytes makes of the matrices inside the layers, while they load


@dataclass(frozen=True)
class Secret:
    """A value that never shows in a repr, an f-string or a log line; `.value` where the value itself is needed."""

    value: str = field(default="", repr=False)

    def __bool__(self) -> bool:
        return bool(self.value)


@dataclass(frozen=True)
class Settings:
    """Resolved environment of a process; each field is read from the variable of the same name in capitals.

    A secret may lie in a file instead, as container engines hand them out: API_KEY_FILE for API_KEY.
    """

    model_path: str = ""  # folder of a converted checkpoint, the default of --model
    adapter_path: str = ""  # folder of a converted adapter, the default of --adapter
    device: str = "auto"  # auto | cuda | mps | cpu
    hf_endpoint: str = "https://huggingface.co"  # a mirror of the hub is named here
    hf_token: Secret = Secret()  # only for gated or private repositories
    modelscope_endpoint: str = "https://www.modelscope.cn"
    api_keys_file: str = ""  # keys of glm serve, made by glm key
    api_key: Secret = Secret()  # one more key, for a server with a single caller
    api_url: str = ""  # server that the chat pages talk to, the default of --api
    page_password: Secret = Secret()  # what visitors of glm web must know
    output_dir: str = ""  # run that the training page shows
    log_format: str = "text"  # text | json
    log_level: str = "info"  # debug | info | warning | error

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> "Settings":
        """Read the variables; an empty one, or an empty file of a secret, counts as unset.

        Raises UserError naming every variable whose value is none of the allowed ones, or the file that is not there.
        """
        given = {f.name: f.type(env[f.name.upper()]) for f in fields(cls) if env.get(f.name.upper())}
        for f in fields(cls):
            if f.type is Secret and f.name not in given:
                given[f.name] = Secret(_from_file(f"{f.name.upper()}_FILE", env))
        settings = cls(**given)
        allowed = {"log_format": LOG_FORMATS, "log_level": LOG_LEVELS, "device": DEVICES}
        wrong = [
            f"{name.upper()}={getattr(settings, name)}"
            for name in allowed
            if getattr(settings, name) not in allowed[name]
        ]
        if wrong:
            choices = ", ".join(f"{name.upper()} {'|'.join(values)}" for name, values in allowed.items())
            raise UserError(f"not understood: {', '.join(wrong)}", f"allowed are {choices}")
        return settings

    def secrets(self) -> list[str]:
        """Values that must never reach a log."""
        values = (getattr(self, f.name) for f in fields(self))
        return [value.value for value in values if isinstance(value, Secret) and value]


def _from_file(variable: str, env: Mapping[str, str]) -> str:
    """First line of the file that the variable names; empty where it names none."""
    if not env.get(variable):
        return ""
    try:
        return Path(env[variable]).read_text(encoding="utf-8").partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        problem = f"{variable}={env[variable]} cannot be read ({error})"
        raise UserError(problem, "name a text file that this user may read") from error
