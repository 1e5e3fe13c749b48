"""Makes a saved folder a complete checkpoint or adapter: tokenizer, prompt format, manifest with the run's origin."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from entrypoints.chat_format.prompt import PromptFormat
from entrypoints.checkpoint import native
from entrypoints.checkpoint.adapters import open_adapter
from entrypoints.checkpoint.manifest import MANIFEST_FILE, read_manifest, weights_fingerprint, write_manifest
from entrypoints.checkpoint.native import NativeCheckpoint
from entrypoints.training.arguments import TrainArguments
from entrypoints.training.checkpoints.output_dir import ADAPTER_FILES


class CheckpointFinalizer:
    """Adds to a saved model what the Trainer does not know: tokenizer, prompt format and origin of the weights."""

    def __init__(self, base: NativeCheckpoint, prompt_format: PromptFormat, arguments: TrainArguments) -> None:
        self.base = base
        self.prompt_format = prompt_format
        self.arguments = arguments
        self.provenance = {
            "made_by": "glm train",
            "method": arguments.method,
            "objective": arguments.objective,
            "base": base.folder.resolve().name,
            "base_weights": weights_fingerprint(base.folder),
            "base_provenance": _provenance(base.folder),
            "columns": {
                name: column
                for name, column in asdict(arguments.columns).items()
                if column not in (None, "auto", False) and arguments.objective == "sft"  # for rows to evaluate
            },
            "max_source_length": arguments.max_source_length,
            "max_target_length": arguments.max_target_length,
            **({"continued": arguments.adapter.resolve().name} if arguments.adapter else {}),
        }

    @property
    def base_dtype(self) -> torch.dtype:
        """The dtype in which the weights of the base model are stored."""
        return next(iter(self.base.files.tensors.values())).dtype

    def finalize(self, folder: Path, dtype: torch.dtype) -> None:
        """Add the missing files, list all model files in the manifest, and open the folder to validate it.

        dtype: that of a complete model's weights. Raises UserError when a saved tensor does not have the shape that
        the model needs.
        """
        if self.arguments.saves_adapter:
            native.write_prompt_format(folder, self.prompt_format)
            files = [folder / name for name in ADAPTER_FILES if (folder / name).is_file()]
        else:
            native.copy_vocabulary(self.base.folder, folder)
            name = str(dtype).removeprefix("torch.")
            native.write_config_files(folder, self.base.model_config, name, self.base.tokenizer, self.prompt_format)
            files = native.model_files(folder)
        for file in files:
            file.chmod(0o644)
        write_manifest(folder, self.provenance, files)
        if self.arguments.saves_adapter:
            open_adapter(folder, self.base.model_config)
        else:
            native.open_native(folder)


def _provenance(folder: Path) -> dict[str, Any]:
    return read_manifest(folder)["provenance"] if (folder / MANIFEST_FILE).is_file() else {}
