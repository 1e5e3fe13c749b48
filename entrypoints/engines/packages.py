"""Which extra of this product brings which package, told in one line where one is missing; imports none of them."""

import importlib.util

from entrypoints.errors import UserError

EXTRAS = {
    "accelerate": "transformers",
    "bitsandbytes": "qlora",
    "datasets": "train",
    "gguf": "quantized",
    "numpy": "transformers",
    "safetensors": "transformers",
    "sentencepiece": "transformers",
    "torch": "transformers",
    "transformers": "transformers",
    "xllamacpp": "quantized",
}
WEIGHTS = ("torch", "numpy", "safetensors")  # to read and write a checkpoint
CONVERTING = (*WEIGHTS, "sentencepiece")
FILES = ("gguf", "xllamacpp")  # to open and run a GGUF file
FOLDERS = (*WEIGHTS, "transformers", "accelerate")  # to open and run a folder
SMALL_FOLDERS = (*FOLDERS, "bitsandbytes")  # one in 8 or 4 bits
QUANTISING = (*CONVERTING, "transformers", *FILES)  # a GGUF file and its check
TRAINING = (*CONVERTING, "transformers", "accelerate", "datasets")


def require_packages(*packages: str) -> None:
    """Raise UserError with every package that is not installed, and one command that installs them all."""
    missing = [name for name in dict.fromkeys(packages) if importlib.util.find_spec(name) is None]
    if missing:
        kind = "package" if len(missing) == 1 else "packages"
        extras = ",".join(sorted({EXTRAS[name] for name in missing}))
        raise UserError(f"this needs the {kind} {', '.join(missing)}", f"pip install 'glm-entrypoints[{extras}]'")
