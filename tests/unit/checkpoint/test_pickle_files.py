"""Pickles cannot run code: only tensors and listed classes are accepted."""

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from canary import LEAKED_CODE, write_canary

import entrypoints
from entrypoints.__main__ import main
from entrypoints.checkpoint.native import open_native
from entrypoints.checkpoint.pickle_files import DEEPSPEED_CLASSES, check_pickle, restricted_unpickling
from entrypoints.errors import UserError

FORMS = ("zip", "legacy", "pickle")
SOURCES = sorted(Path(entrypoints.__file__).parent.rglob("*.py"))
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


@pytest.mark.parametrize("form", FORMS)
def test_code_in_a_file_is_found_without_running_it(form, tmp_path):
    write_canary(tmp_path / "optimizer.pt", tmp_path / "executed", form)
    with pytest.raises(
        UserError,
        match=r"optimizer\.pt .*could run code when loaded \(contains (posix\.mkdir|more than tensors)\); remove it",
    ) as error:
        check_pickle(tmp_path / "optimizer.pt", "remove it")
    assert not LEAKED_CODE.search(str(error.value))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"half", b"PK\x03\x04" + bytes(200)])
def test_a_damaged_file_is_rejected_with_a_clear_error_message(content, tmp_path):
    (tmp_path / "optimizer.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"optimizer\.pt is damaged or could run code"):
        check_pickle(tmp_path / "optimizer.pt", "remove it")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("variable", [None, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
def test_a_library_that_loads_with_weights_only_false_does_not_run_code(variable, form, tmp_path, monkeypatch):
    """Neither does the user's setting of the opposite, which torch would reject together with ours."""
    if variable:
        monkeypatch.setenv(variable, "1")
    write_canary(tmp_path / "file", tmp_path / "executed", form)
    before = dict(os.environ)
    with restricted_unpickling(), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "file", weights_only=False)
    assert not (tmp_path / "executed").exists()
    assert dict(os.environ) == before


def test_a_process_started_meanwhile_is_restricted_as_well(tmp_path):
    write_canary(tmp_path / "file", tmp_path / "executed")
    load = f"import torch; torch.load({str(tmp_path / 'file')!r}, weights_only=False)"
    with restricted_unpickling():
        done = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True, check=False)
    assert "UnpicklingError" in done.stderr
    assert not (tmp_path / "executed").exists()


def test_what_deepspeed_saves_is_accepted_inside_the_block_only(tmp_path, monkeypatch):
    """The classes of a float16 run with a dynamic loss scale, and of the other precisions."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    scalers = [DynamicLossScaler(2.0**16, 1000, 1.0, 2, False), LossScaler(1.0)]
    state = {"stage": ZeroStageEnum.gradients, "slices": fragment_address(numel=4, start=2), "loss_scaler": scalers}
    for zipped in (False, True):
        torch.save(state, tmp_path / "states.pt", _use_new_zipfile_serialization=zipped)
        check_pickle(tmp_path / "states.pt", "remove it")
    with restricted_unpickling():
        loaded = torch.load(tmp_path / "states.pt", weights_only=False)
    assert {name: loaded[name] for name in ("stage", "slices")} == {name: state[name] for name in ("stage", "slices")}
    assert [vars(scaler) for scaler in loaded["loss_scaler"]] == [vars(scaler) for scaler in scalers]
    assert {f"{type(one).__module__}.{type(one).__qualname__}" for one in (*scalers, *list(state.values())[:2])} == {
        *DEEPSPEED_CLASSES
    }
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "states.pt", weights_only=True)


class _AsInPython3112:
    """Pickled as Python 3.11.0 to 3.11.3 pickle a member of an enumeration: getattr(owner, name)."""

    def __init__(self, owner, name):
        self.call = (owner, name)

    def __reduce__(self):
        return getattr, self.call


@pytest.fixture
def stages(monkeypatch):
    """DeepSpeed's enumeration of ZeRO stages."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    return pytest.importorskip("deepspeed.runtime.zero.config").ZeroStageEnum


@pytest.mark.parametrize("zipped", [True, False])
def test_an_enumeration_member_written_by_python_3_11_2_is_accepted(zipped, stages, tmp_path):
    """The Python of the images writes it, also in the format before torch 1.6."""
    state = {"zero_stage": _AsInPython3112(stages, "gradients"), "fp32": torch.ones(2)}
    torch.save(state, tmp_path / "states.pt", _use_new_zipfile_serialization=zipped)
    for _ in range(2):
        check_pickle(tmp_path / "states.pt", "remove it")
        with restricted_unpickling():
            with restricted_unpickling():
                pass  # an inner block leaves the outer one as it is
            loaded = torch.load(tmp_path / "states.pt", weights_only=False)
        assert loaded["zero_stage"] is stages.gradients
        assert torch.equal(loaded["fp32"], torch.ones(2))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("stages", "mro"),
        ("stages", "__subclasses__"),
        ("stages", "no_such_stage"),
        ("stages", 2),
        ("stages", ["gradients"]),
        ("stages", b"gradients"),
        ("tensor", "numpy"),
        ("class", "__init__"),
        ("member", "name"),
    ],
)
def test_no_other_attribute_can_be_read(owner, name, zipped, stages, tmp_path):
    owners = {"stages": stages, "tensor": torch.ones(2), "class": torch.Tensor, "member": stages.gradients}
    torch.save([_AsInPython3112(owners[owner], name)], tmp_path / "states.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"states\.pt .*could run code when loaded \(.*; remove it") as error:
        check_pickle(tmp_path / "states.pt", "remove it")
    assert not LEAKED_CODE.search(str(error.value))
    with restricted_unpickling(), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "states.pt", weights_only=False)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin"])
def test_a_received_model_or_adapter_does_not_run_code(name, toy_original, toy_native, tmp_path, capsys):
    """`glm convert` names the file, without torch's advice to load it anyway."""
    source = tmp_path / "received"
    source.mkdir()
    if name == "adapter_model.bin":
        config = {"peft_type": "LORA", "r": 8, "lora_alpha": 32, "target_modules": ["query_key_value"], "bias": "none"}
        (source / "adapter_config.json").write_text(json.dumps(config))
    else:
        for file in ("config.json", "tokenizer.model"):
            shutil.copy(toy_original / file, source)
    write_canary(source / name, tmp_path / "executed")
    assert main(["convert", str(source), str(tmp_path / "converted"), "--base", str(toy_native)]) == 1
    err = capsys.readouterr().err
    assert f"{name} cannot be read (contains posix.mkdir)" in err
    assert not LEAKED_CODE.search(err)
    assert not (tmp_path / "executed").exists()


def test_a_model_folder_with_code_in_its_weights_cannot_be_opened(toy_native, tmp_path):
    folder = shutil.copytree(toy_native, tmp_path / "received")
    for file in (*folder.glob("model*.safetensors*"), folder / "manifest.json"):
        file.unlink()
    write_canary(folder / "pytorch_model.bin", tmp_path / "executed")
    with pytest.raises(UserError, match=r"pytorch_model\.bin cannot be read \(contains posix\.mkdir\)"):
        open_native(folder)
    assert not (tmp_path / "executed").exists()


def _unsafe_call(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    module, _, function = name.rpartition(".")
    values = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if name == "torch.load":
        return values.get("weights_only") != "True"
    is_unpickler = function in ("load", "loads", "Unpickler", "open", "read_pickle")
    return values.get("allow_pickle") == "True" or (module in UNPICKLERS and is_unpickler) or function == "read_pickle"


def _imports_a_load_function(node: ast.AST) -> bool:
    """`from torch import load`, which the search for calls of torch.load would not find."""
    if not isinstance(node, ast.ImportFrom):
        return False
    return node.module in {*UNPICKLERS, "torch"} and any(
        one.name in ("load", "loads", "Unpickler") for one in node.names
    )


@pytest.mark.parametrize("source", SOURCES, ids=lambda file: "/".join(file.parts[-2:]))
def test_no_module_unpickles_without_an_allow_list(source):
    nodes = list(ast.walk(ast.parse(source.read_text(encoding="utf-8"))))
    unsafe = [node.lineno for node in nodes if isinstance(node, ast.Call) and _unsafe_call(node)]
    assert not unsafe + [node.lineno for node in nodes if _imports_a_load_function(node)]
    assert "trust_remote_code=True" not in source.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "pickle.loads(b)",
        "pickle.Unpickler(f)",
        "joblib.load(f)",
        "np.load(f, allow_pickle=True)",
        "pandas.read_pickle(f)",
    ],
)
def test_the_search_finds_unsafe_calls(code):
    assert _unsafe_call(ast.parse(code).body[0].value)
