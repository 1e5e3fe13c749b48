"""Makes a saved folder a complete checkpoint or adapter: vocabulary, prompt format, manifest with the run's origin."""

from dataclasses import asdict
from pathlib import Path

import torch

from entrypoints.checkpoint import native
from entrypoints.checkpoint.adapters import CONFIG_FILE, LORA_FILE, PREFIX_FILE, open_adapter
from entrypoints.checkpoint.manifest import MANIFEST_FILE, read_manifest, weights_hash, write_manifest
from entrypoints.checkpoint.native import PROMPT_FILE, TEMPLATE_FILE, NativeCheckpoint
from entrypoints.prompt import PromptFormat
from entrypoints.training.arguments import TrainArguments
from entrypoints.training.methods import ENCODER_FILE

ADAPTER_FILES = (CONFIG_FILE, LORA_FILE, PREFIX_FILE, ENCODER_FILE, PROMPT_FILE, TEMPLATE_FILE)


class Finishing:
    """Knows what the Trainer does not: where the weights come from and how the model is asked."""

    def __init__(self, base: NativeCheckpoint, prompt_format: PromptFormat, arguments: TrainArguments) -> None:
        self.base = base
        self.prompt_format = prompt_format
        self.arguments = arguments
        self.origin = {
            "made_by": "glm train",
            "method": arguments.method,
            "base": base.folder.resolve().name,
            "base_weights": weights_hash(base.folder),
            "base_provenance": _provenance(base.folder),
            "columns": {name: column for name, column in asdict(arguments.columns).items() if column is not None},
            "max_source_length": arguments.max_source_length,
            "max_target_length": arguments.max_target_length,
        }

    @property
    def stored_dtype(self) -> torch.dtype:
        """What the base's weights are stored in."""
        return next(iter(self.base.files.tensors.values())).dtype

    def complete(self, folder: Path, dtype: torch.dtype) -> None:
        """Add what the Trainer does not save, check what it did, describe all model files in the manifest.

        dtype: what a whole model was saved in.

        Raises UserError when a saved tensor has not the shape that the model needs.
        """
        if self.arguments.makes_adapter:
            native.write_prompt_format(folder, self.prompt_format)
            files = [folder / name for name in ADAPTER_FILES if (folder / name).is_file()]
        else:
            native.copy_vocabulary(self.base.folder, folder)
            name = str(dtype).removeprefix("torch.")
            native.write_settings(folder, self.base.shape, name, self.base.tokenizer, self.prompt_format)
            files = native.model_files(folder)
        for file in files:
            file.chmod(0o644)
        write_manifest(folder, self.origin, files)
        if self.arguments.makes_adapter:
            open_adapter(folder, self.base.shape)
        else:
            native.open_native(folder)


def result_files(folder: Path) -> list[Path]:
    """The files of a finished result, of whichever method, without logs and checkpoints."""
    names = dict.fromkeys((*(file.name for file in native.model_files(folder)), *ADAPTER_FILES, MANIFEST_FILE))
    return [folder / name for name in names if (folder / name).is_file()]


def _provenance(folder: Path) -> dict:
    return read_manifest(folder)["provenance"] if (folder / MANIFEST_FILE).is_file() else {}
