"""LoRAs that the locked PEFT writes, with each of its fields: applied whole wherever an adapter goes, or refused.

Expected values are those of PEFT, which reads its own file, on the same base model.
"""

import json
import logging
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GlmForCausalLM

from entrypoints.chat_format.prompt import PromptFormat
from entrypoints.checkpoint.adapters import convert_adapter, open_adapter
from entrypoints.checkpoint.native import open_native
from entrypoints.engines.loading import check_engine_options
from entrypoints.engines.options import EngineOptions
from entrypoints.engines.transformers.engine import TransformersEngine
from entrypoints.errors import UserError
from entrypoints.quantization.layerwise_forward import LayerwiseModel
from entrypoints.quantization.to_gguf import QuantizeOptions, quantize
from entrypoints.training.result.export import ExportOptions, export

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT, about unusual fields
IDS = [300, 301, 302, 303, 304]
APPLIED = {
    "plain": {},
    "alpha_pattern": {"alpha_pattern": {"model.layers.1.self_attn.q_proj": 64, "down_proj": 2}},
    "rank_pattern": {"rank_pattern": {"q_proj": 2, "^model.layers.0.mlp.down_proj": 6, "3.mlp.down_proj": 5}},
    "both patterns with rslora": {
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"q_proj": 3, "layers.2.mlp.down_proj": 0.5},
        "use_rslora": True,
    },
    "use_rslora": {"use_rslora": True},
    "layers_to_transform": {"layers_to_transform": [0, 2]},
    "layers_to_transform, the first": {"layers_to_transform": 0},
    "exact names": {"target_modules": ["model.layers.1.self_attn.k_proj", "layers.3.mlp.gate_up_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "lm_head": {"target_modules": ["q_proj", "lm_head"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "eva": {"init_lora_weights": "eva"},
    "ensure_weight_tying": {"ensure_weight_tying": True},
    "lora_dropout": {"lora_dropout": 0.3},
}
REFUSED = {
    "use_dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj"]},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "bias": {"bias": "all"},
    "init_lora_weights": {"init_lora_weights": "pissa"},
    "trainable_token_indices": {"trainable_token_indices": [300, 301]},
    "exclude_modules": {"exclude_modules": ["layers.1"]},
}
CONVERTED = {  # initializations that change the base model, saved as PEFT's documentation says
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter_4": {"init_lora_weights": "pissa_niter_4", "rank_pattern": {"down_proj": 2}},
    "olora": {"init_lora_weights": "olora", "use_rslora": True},
}


def base_model(folder):
    return GlmForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


@pytest.fixture
def wrap(toy_native):
    """The toy with a random adapter: `wrap(use_dora=True)`; further fields are those of PEFT's LoraConfig."""

    def create(config_class=peft.LoraConfig, **fields):
        if config_class is peft.LoraConfig:
            fields = {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "down_proj"], **fields}
        config = config_class(task_type="CAUSAL_LM", **fields)
        model = peft.get_peft_model(base_model(toy_native), config)
        randomize(model)
        return model.eval()

    return create


def randomize(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.1


@torch.inference_mode()
def logits_of(model):
    return model(input_ids=torch.tensor([IDS])).logits[0]


def logits_layer_by_layer(model):
    return model.logits(model.hidden_states([IDS]))[0]


def check_everywhere(folder, toy_native, merged, tmp_path):
    """merged: PEFT's own merge, in float32."""
    base = open_native(toy_native)
    adapter = open_adapter(folder, base.model_config)
    engine = TransformersEngine.load(toy_native, EngineOptions(adapter=folder, device="cpu", dtype="float32"))
    expected = logits_of(merged)
    assert (expected - logits_of(base_model(toy_native))).abs().max() > 0.05
    torch.testing.assert_close(logits_of(engine.model), expected, atol=1e-4, rtol=1e-4)
    for model in (LayerwiseModel(base, merged=adapter), LayerwiseModel(base, by_peft=adapter)):
        torch.testing.assert_close(logits_layer_by_layer(model), expected, atol=1e-4, rtol=1e-4)
    export(folder, tmp_path / "exported", ExportOptions(toy_native, "float32"))
    exported, weights = load_file(tmp_path / "exported" / "model.safetensors"), merged.state_dict()
    assert exported.keys() == weights.keys()
    for name, tensor in exported.items():
        torch.testing.assert_close(tensor, weights[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fields", APPLIED.values(), ids=APPLIED)
def test_a_lora_of_peft_is_applied_whole_everywhere(fields, wrap, toy_native, tmp_path):
    wrap(**fields).save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    own = peft.PeftModel.from_pretrained(base_model(toy_native), tmp_path / "lora")
    check_everywhere(tmp_path / "lora", toy_native, own.merge_and_unload(), tmp_path)


@pytest.mark.parametrize("fields", CONVERTED.values(), ids=CONVERTED)
def test_the_remedy_for_an_initialization_that_changes_the_base_gives_a_plain_lora(fields, toy_native, tmp_path):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"], **fields)
    model = peft.get_peft_model(base_model(toy_native), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    randomize(model)
    model.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    check_everywhere(tmp_path / "lora", toy_native, model.eval().merge_and_unload(), tmp_path)


def refused_everywhere(folder, toy_native, tmp_path, message):
    """In chat and serve on both engines of model folders, in quantize, export and convert."""
    target, gguf = tmp_path / "out", tmp_path / "out.gguf"
    named = EngineOptions(adapters={"mine": folder})
    places = [
        lambda: check_engine_options(toy_native, EngineOptions(adapter=folder)),
        lambda: check_engine_options(toy_native, named),
        lambda: TransformersEngine.load(toy_native, EngineOptions(adapter=folder, device="cpu")),
        lambda: quantize(QuantizeOptions(toy_native, gguf, "f16", folder)),
        lambda: export(folder, target, ExportOptions(toy_native)),
        lambda: convert_adapter(folder, target, toy_native, PromptFormat()),
    ]
    for place in places:
        with pytest.raises(UserError, match=message):
            place()
    assert not target.exists()
    assert not gguf.exists()


@pytest.mark.parametrize("field", REFUSED)
def test_a_field_that_is_not_supported_is_refused_by_name_everywhere(field, wrap, toy_native, tmp_path):
    wrap(**REFUSED[field]).save_pretrained(tmp_path / "lora")
    refused_everywhere(tmp_path / "lora", toy_native, tmp_path, rf"adapter_config\.json: {field} .* is not supported")


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "IA3", "ADALORA", "PROMPT_TUNING"])
def test_another_kind_of_adapter_is_refused_by_its_type_everywhere(kind, wrap, toy_native, tmp_path):
    config_class, fields = {
        "PREFIX_TUNING": (peft.PrefixTuningConfig, {"num_virtual_tokens": 4}),
        "PROMPT_TUNING": (peft.PromptTuningConfig, {"num_virtual_tokens": 4}),
        "IA3": (peft.IA3Config, {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
        "ADALORA": (peft.AdaLoraConfig, {"target_modules": ["q_proj"], "total_step": 10}),
    }[kind]
    wrap(config_class, **fields).save_pretrained(tmp_path / "adapter")
    message = rf"adapter_config\.json: peft_type {kind} is not supported"
    refused_everywhere(tmp_path / "adapter", toy_native, tmp_path, message)


@pytest.mark.parametrize("field", ["use_dora", "lora_bias", "modules_to_save", "bias"])
def test_a_model_that_peft_merged_as_the_remedy_says_answers_like_its_adapter(field, wrap, toy_native, tmp_path):
    """Merged into a copy of the base folder, without the manifest of the base weights."""
    wrap(**REFUSED[field]).save_pretrained(tmp_path / "lora")
    shutil.copytree(toy_native, tmp_path / "merged")
    (tmp_path / "merged" / "manifest.json").unlink()
    own = peft.PeftModel.from_pretrained(base_model(toy_native), tmp_path / "lora")
    expected = logits_of(own)
    own.merge_and_unload().save_pretrained(tmp_path / "merged")
    engine = TransformersEngine.load(tmp_path / "merged", EngineOptions(device="cpu", dtype="float32"))
    torch.testing.assert_close(logits_of(engine.model), expected, atol=1e-4, rtol=1e-4)


def test_vllm_refuses_patterns_that_it_would_ignore(wrap, toy_native, tmp_path, monkeypatch):
    monkeypatch.setattr("entrypoints.engines.loading.require_engine_packages", lambda engine: None)
    wrap(**APPLIED["both patterns with rslora"]).save_pretrained(tmp_path / "lora")
    options = EngineOptions(engine="vllm", adapters={"mine": tmp_path / "lora"})
    with pytest.raises(UserError, match=r"vLLM ignores rank_pattern and alpha_pattern of the adapter mine.*glm export"):
        check_engine_options(toy_native, options)
    wrap(use_rslora=True).save_pretrained(tmp_path / "plain")
    check_engine_options(toy_native, EngineOptions(engine="vllm", adapters={"mine": tmp_path / "plain"}))


def test_of_several_adapters_in_a_folder_one_has_to_be_named(wrap, toy_native, tmp_path, caplog):
    """PEFT saves the one named `default` in the folder itself, and others in subfolders."""
    model = wrap()
    model.add_adapter("second", peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "saved", selected_adapters=["second"])
    refused_everywhere(tmp_path / "saved", toy_native, tmp_path, r"contains several adapters: second; name one: ")
    base = open_native(toy_native).model_config
    open_adapter(tmp_path / "saved" / "second", base)
    model.save_pretrained(tmp_path / "saved")
    with caplog.at_level(logging.WARNING):
        open_adapter(tmp_path / "saved", base)
    assert "contains further adapters, which are not used: second" in caplog.text


def test_several_adapters_in_one_file_are_refused(wrap, toy_native, tmp_path):
    """The state of a whole PEFT model, with the name of each adapter in the names of its tensors."""
    model = wrap()
    model.save_pretrained(tmp_path / "lora")
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if ".lora_" in name}
    save_file(state, tmp_path / "lora" / "adapter_model.safetensors")
    for name in ("default", "second"):
        with pytest.raises(UserError, match=rf"lora_A\.{name}\.weight, which is not a LoRA factor.*save_pretrained"):
            open_adapter(tmp_path / "lora", open_native(toy_native).model_config)
        state = {key.replace("default", "second"): tensor for key, tensor in state.items()}
        save_file(state, tmp_path / "lora" / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"lora_A\.second\.weight, which is not a LoRA factor"):
        convert_adapter(tmp_path / "lora", tmp_path / "out", toy_native, PromptFormat())


def test_an_adapter_in_the_older_file_format_is_refused_with_what_helps(wrap, toy_native, tmp_path):
    model, base = wrap(), open_native(toy_native).model_config
    model.save_pretrained(tmp_path / "lora", safe_serialization=False)
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors; save it as safetensors: PEFT's save_pretr"):
        open_adapter(tmp_path / "lora", base)
    with pytest.raises(UserError, match="is already in the native layout; use it as it is"):
        convert_adapter(tmp_path / "lora", tmp_path / "out", toy_native, PromptFormat())
    model.save_pretrained(tmp_path / "lora")
    open_adapter(tmp_path / "lora", base)


def test_an_adapter_with_a_copy_of_the_output_layer_is_refused_with_what_helps(wrap, toy_native, tmp_path):
    """PEFT adds it if lm_head has a LoRA; it may differ from that of the base model."""
    wrap(**APPLIED["lm_head"]).save_pretrained(tmp_path / "lora")
    refused_everywhere(tmp_path / "lora", toy_native, tmp_path, r"lm_head\.base_layer.*save_embedding_layers=False")


def test_tensors_of_a_module_that_target_modules_does_not_name_are_refused(wrap, toy_native, tmp_path):
    """PEFT would only warn, and answer without them."""
    wrap().save_pretrained(tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": ["q_proj"]}))
    with pytest.raises(UserError, match=r"target_modules does not name model\.layers\.0\.mlp\.down_proj"):
        open_adapter(tmp_path / "lora", open_native(toy_native).model_config)


@pytest.mark.parametrize(
    "changed",
    [
        {"rank_pattern": {"x_proj": 2}},
        {"alpha_pattern": {".*q_proj": 2}},
        {"alpha_pattern": {"q_proj": "2"}},
        {"rank_pattern": {"q_proj": 0}},
        {"rank_pattern": [2]},
        {"alpha_pattern": {"^q_proj": 2}},
        {"alpha_pattern": {"q_proj": 2, "3.self_attn.q_proj": 3}},
    ],
    ids=str,
)
def test_a_pattern_that_names_no_module_or_no_number_is_refused(changed, wrap, toy_native, tmp_path):
    wrap().save_pretrained(tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(UserError, match=rf"adapter_config\.json: ({next(iter(changed))}|q_proj) "):
        open_adapter(tmp_path / "lora", open_native(toy_native).model_config)
