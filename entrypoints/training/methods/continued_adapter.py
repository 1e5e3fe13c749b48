"""--adapter: the LoRA or prefix that a run continues on its base model, with a new optimizer.

The shape of the adapter decides method, rank, targets and length; a flag that contradicts it is rejected. Weights and
shapes are checked by `open_adapter` before the model is loaded. No heavy import: flags are parsed with it.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

from entrypoints.checkpoint.adapter_config import CONFIG_FILE
from entrypoints.checkpoint.atomic_files import read_safetensors_header
from entrypoints.errors import UserError
from entrypoints.training.arguments import LORA_TARGETS, TrainArguments, flag_name
from entrypoints.untrusted import read_json_file

ENCODER_FILE = "prefix_encoder.safetensors"  # a prefix can be trained on exactly only with the parameters it came from
MERGE = "merge it into its base model and train the result: glm export ADAPTER DIR --base BASE"


def apply_shape(given: dict[str, Any], method: str) -> tuple[dict[str, Any], str]:
    """The fields of TrainArguments and the method, with those of `given["adapter"]` if there is one.

    Raises UserError: no adapter that can be continued, or a flag contradicts it.
    """
    adapter = given.get("adapter")
    if adapter is None:
        return given, method
    shape = _read_shape(adapter)
    adapter_method = shape.pop("method")
    if method == "full":
        method = adapter_method
    if method != adapter_method and (method, adapter_method) != ("qlora", "lora"):
        raise UserError(f"{adapter} is for --method {adapter_method}, not {method}", "omit --method")
    defaults = {field.name: field.default for field in fields(TrainArguments)}
    for name, value in shape.items():
        if given.get(name, defaults[name]) not in (defaults[name], value):
            raise UserError(f"{adapter} has {flag_name(name)} {value}, not {given[name]}", f"omit {flag_name(name)}")
    return {**given, **shape}, method


def _read_shape(adapter: Path) -> dict[str, Any]:
    file = adapter / CONFIG_FILE
    if not file.is_file():
        raise UserError(f"{adapter} contains no {CONFIG_FILE}", "name the folder of an adapter (--adapter)")
    config = read_json_file(file, "copy the adapter again")
    if not isinstance(config, dict):
        raise UserError(f"{file} is not a JSON object", "copy the adapter again")
    if config.get("adapter_type") == "ptuning-v2":
        encoder = adapter / ENCODER_FILE
        projected = encoder.is_file() and "trans.0.weight" in read_safetensors_header(encoder)
        return {"method": "ptuning", "pre_seq_len": config.get("pre_seq_len"), "prefix_projection": projected}
    if config.get("peft_type") != "LORA":
        raise UserError(f"{file} is neither LoRA nor P-Tuning v2", "convert such an adapter with glm convert")
    if config.get("use_rslora"):
        raise UserError(f"{file}: training does not continue a LoRA with use_rslora", MERGE)
    targets = config.get("target_modules")
    names = [
        name
        for name, modules in LORA_TARGETS.items()
        if isinstance(targets, list) and {*map(str, targets)} == {*modules}
    ]
    if not names:
        raise UserError(
            f"{file}: target_modules is {targets}, which is not one of --lora-target {' or '.join(LORA_TARGETS)}", MERGE
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if isinstance(alpha, float) and alpha.is_integer():  # neither infinite nor not a number
        alpha = int(alpha)
    if type(rank) is not int or type(alpha) is not int:
        raise UserError(f"{file}: r is {rank} and lora_alpha is {alpha}, not two whole numbers", MERGE)
    return {"method": "lora", "lora_rank": rank, "lora_alpha": alpha, "lora_target": names[0]}
