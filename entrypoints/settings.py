"""Every environment variable this product reads: a flag beats a variable, a variable beats a default."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from entrypoints.errors import UserError

LOG_FORMATS = ("text", "json")
LOG_LEVELS = ("debug", "info", "warning", "error")
DEVICES = ("auto", "cuda", "mps", "cpu")


@dataclass(frozen=True)
class Secret:
    """A value that never shows in a repr, an f-string or a log line; `.value` where the value itself is needed."""

    value: str = field(default="", repr=False)

    def __bool__(self) -> bool:
        return bool(self.value)


@dataclass(frozen=True)
class Settings:
    """Resolved environment of a process; each field is read from the variable of the same name in capitals."""

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
        """Read the variables; an empty one counts as unset.

        Raises UserError naming every variable whose value is none of the allowed ones.
        """
        given = {f.name: f.type(env[f.name.upper()]) for f in fields(cls) if env.get(f.name.upper())}
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
