"""The packages that each command needs, and the optional dependency groups that install them; imports none of them."""

import importlib.util

from entrypoints.errors import UserError

EXTRA_BY_PACKAGE = {
    "accelerate": "transformers",
    "bitsandbytes": "qlora",
    "datasets": "train",
    "gguf": "quantized",
    "jieba": "train",
    "nltk": "train",
    "numpy": "transformers",
    "rouge_chinese": "train",
    "safetensors": "transformers",
    "sentencepiece": "transformers",
    "torch": "transformers",
    "transformers": "transformers",
    "xllamacpp": "quantized",
}
CHECKPOINT_PACKAGES = ("torch", "numpy", "safetensors")  # read and write a checkpoint
CONVERSION_PACKAGES = (*CHECKPOINT_PACKAGES, "sentencepiece")
GGUF_PACKAGES = ("gguf", "xllamacpp")  # open and run a GGUF file
TRANSFORMERS_PACKAGES = (*CHECKPOINT_PACKAGES, "transformers", "accelerate")  # open and run a model folder
BITSANDBYTES_PACKAGES = (*TRANSFORMERS_PACKAGES, "bitsandbytes")  # quantized to 8 or 4 bits
QUANTIZATION_PACKAGES = (*CONVERSION_PACKAGES, "transformers", *GGUF_PACKAGES)  # write a GGUF file and validate it
SCORING_PACKAGES = ("jieba", "nltk", "rouge_chinese")
TRAINING_PACKAGES = (*CONVERSION_PACKAGES, "transformers", "accelerate", "datasets")


def require_packages(*packages: str) -> None:
    """Raise UserError with all packages that are not installed, and one command that installs them."""
    missing = [name for name in dict.fromkeys(packages) if importlib.util.find_spec(name) is None]
    if missing:
        kind = "package" if len(missing) == 1 else "packages"
        extras = ",".join(sorted({EXTRA_BY_PACKAGE[name] for name in missing}))
        raise UserError(f"this needs the {kind} {', '.join(missing)}", f"pip install 'glm-entrypoints[{extras}]'")
