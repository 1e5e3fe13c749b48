"""The dimensions of a model without its weights: of a folder that has only config.json, or of a published model."""

from dataclasses import replace
from pathlib import Path

from entrypoints.checkpoint.layout import ModelConfig
from entrypoints.checkpoint.tensor_files import read_json
from entrypoints.errors import UserError
from entrypoints.hub.download import KNOWN_MODELS, ORGANIZATION_ALIASES

# The 6B models differ in context length and rotary base only. Sources: config.json of each repository, seen in copies:
# sophgo/LLM-TPU (chatglm3-6b, -32k, glm-4-9b-chat), chatJeffrey/GLM2-6B (chatglm2-6b), Lionelpang/codegeex2-6b, the
# GGUF metadata of ollama.com/EntropyYue/chatglm3 (-128k) and GLM-4's README (context length of the base model). The
# rotary base of chatglm2-6b-32k and of glm-4-9b was not found; it takes no memory.
_GLM4_9B = ModelConfig(40, 4096, 32, 2, 128, 13696, 151552, 131072, 1.5625e-07, 500)
_GLM4_9B_BASE = replace(_GLM4_9B, context_length=8192, rope_ratio=1)
_GLM4_9B_1M = replace(_GLM4_9B, num_kv_heads=4, context_length=1 << 20, rope_ratio=10000)
PUBLISHED = {
    f"THUDM/{name}": ModelConfig(28, 4096, 32, 2, 128, 13696, 65024, context_length, 1e-5, rope_ratio)
    for name, context_length, rope_ratio in (
        ("chatglm3-6b", 8192, 1),
        ("chatglm3-6b-base", 32768, 1),
        ("chatglm3-6b-32k", 32768, 50),
        ("chatglm3-6b-128k", 131072, 500),
        ("chatglm2-6b", 32768, 1),
        ("chatglm2-6b-32k", 32768, 1),  # it divides positions, which takes no memory
        ("codegeex2-6b", 8192, 1),
    )
} | {
    f"THUDM/glm-4-9b{name}": model_config
    for name, model_config in (
        ("", _GLM4_9B_BASE),
        ("-chat", _GLM4_9B),
        ("-chat-1m", _GLM4_9B_1M),
        ("-hf", _GLM4_9B_BASE),
        ("-chat-hf", _GLM4_9B),
        ("-chat-1m-hf", _GLM4_9B_1M),
    )
}


def has_weights(folder: Path) -> bool:
    """Whether the folder has files with weights, in either layout."""
    return folder.is_dir() and any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir())


def read_dimensions(model: Path) -> ModelConfig:
    """Of a folder with config.json in either layout, else of the published model ORG/NAME or NAME.

    Raises UserError: it is neither, or config.json belongs to another model.
    """
    file = model / "config.json"
    if file.is_file():
        config = read_json(file)
        if config.get("model_type") == "chatglm":
            return ModelConfig.from_original(config, file)
        return ModelConfig.from_native(config, file, quantized=True)
    organization, _, name = model.as_posix().rpartition("/")
    canonical = f"{ORGANIZATION_ALIASES.get(organization, organization) or 'THUDM'}/{name}"
    if canonical not in PUBLISHED:
        raise UserError(
            f"{model} is neither a folder with config.json nor a published model",
            f"name such a folder, or one of {', '.join(KNOWN_MODELS)}",
        )
    return PUBLISHED[canonical]
