"""A run with its base model opened: what its checks and its preparation start from."""

from dataclasses import dataclass, replace

from entrypoints.chat_format.prompt import PromptFormat
from entrypoints.checkpoint.adapters import open_adapter
from entrypoints.checkpoint.manifest import check_base_weights
from entrypoints.checkpoint.native import NativeCheckpoint, open_native
from entrypoints.checkpoint.prompt_file import read_prompt_format
from entrypoints.training.arguments import TrainArguments
from entrypoints.training.methods import deepspeed_config
from entrypoints.training.methods.precision import Precision, resolve_precision


@dataclass(frozen=True)
class RunContext:
    """A run with its base model opened (no weights loaded) and its precision decided."""

    arguments: TrainArguments
    base: NativeCheckpoint
    precision: Precision
    deepspeed: deepspeed_config.Config | None

    @property
    def prompt_format(self) -> PromptFormat:
        """The prompt format to train: that of base model or --adapter, changed by --template and --source-prefix."""
        arguments = self.arguments
        base = read_prompt_format(arguments.adapter) if arguments.adapter else self.base.prompt_format
        prefix = base.source_prefix if arguments.source_prefix is None else arguments.source_prefix
        return replace(base, template=arguments.template or base.template, source_prefix=prefix)


def open_run(arguments: TrainArguments, deepspeed: deepspeed_config.Config | None) -> RunContext:
    """Open the base model and decide the precision; `deepspeed` is what `quick_checks.check_inputs` returned.

    Raises UserError: damaged base model, an --adapter of another one, a device or precision that this machine or the
    DeepSpeed file does not allow.
    """
    precision = resolve_precision(arguments)
    if deepspeed and arguments.deepspeed:
        requested = deepspeed_config.requested_precision(arguments)
        by_hardware = {kind: None if requested[kind] is not None else getattr(precision, kind) for kind in requested}
        deepspeed_config.check_precision(arguments.deepspeed, deepspeed, by_hardware)
    base = open_native(arguments.model_name_or_path)
    if arguments.adapter:
        open_adapter(arguments.adapter, base.model_config)
        check_base_weights(arguments.adapter, arguments.model_name_or_path)
    return RunContext(arguments, base, precision, deepspeed)
