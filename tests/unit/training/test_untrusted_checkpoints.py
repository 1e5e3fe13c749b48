"""A checkpoint folder that somebody else wrote cannot run code: each of its files in turn is a pickle that would."""

import json
import pickle
import shutil

import pytest
import torch
from canary import LEAKED_CODE, write_canary

from entrypoints.checkpoint.pickle_files import restricted_unpickling
from entrypoints.errors import UserError
from entrypoints.training.checkpoints import store
from entrypoints.training.checkpoints.store import find_checkpoint
from entrypoints.training.methods import deepspeed_config
from entrypoints.training.result.export import ExportOptions, export

SHARDS = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt")


@pytest.fixture(scope="module")
def trained(tune, tmp_path_factory):
    """A checkpoint of a full fine-tuning and one of a LoRA."""
    folder = tmp_path_factory.mktemp("trained")
    return {
        method: tune(folder / method, method=method, max_steps=2, save_steps=1) / "checkpoint-1"
        for method in ("full", "lora")
    }


@pytest.fixture
def received(trained, tmp_path):
    """`received("lora", "rng_state.pth", "zip")`: a copy with a canary as this file, recorded with its new size."""

    def copy(method, name, form="zip"):
        folder = shutil.copytree(trained[method], tmp_path / "out" / "checkpoint-1")
        (folder / name).parent.mkdir(exist_ok=True)
        write_canary(folder / name, tmp_path / "executed", form)
        _record_sizes(folder)
        return folder

    return copy


@pytest.fixture
def received_shards(tmp_path):
    """A DeepSpeed checkpoint whose shards are canaries, without weights and configuration."""
    folder = tmp_path / "out" / "checkpoint-1"
    (folder / "global_step1").mkdir(parents=True)
    (folder / "latest").write_text("global_step1")
    for name in SHARDS:
        write_canary(folder / "global_step1" / name, tmp_path / "executed")
    return folder


def _record_sizes(folder):
    record = json.loads((folder / "checkpoint.json").read_text())
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != "checkpoint.json"]
    record["files"] |= {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
    (folder / "checkpoint.json").write_text(json.dumps(record))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["zip", "pickle"])
@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("full", "optimizer.pt"),
        ("full", "scheduler.pt"),
        ("full", "scaler.pt"),
        ("full", "rng_state.pth"),
        ("full", "rng_state_1.pth"),
        ("full", "optimizer.bin"),
        ("full", "pytorch_model.bin"),
        ("full", "model.safetensors"),
        ("full", "trainer_state.json"),
        ("lora", "adapter_model.safetensors"),
        ("lora", "adapter_model.bin"),
        *(("full", f"global_step1/{name}") for name in SHARDS),
        ("full", "global_step1/zero_pp_rank_0_mp_rank_00_model_states.pt"),
        ("full", "global_step1/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        ("full", "global_step1_universal/fp32.pt"),
    ],
)
def test_resuming_names_the_file_and_does_not_run_it(method, name, form, received, tmp_path, caplog):
    folder = received(method, name, form)
    for resume in (str(folder), "auto"):
        with pytest.raises(UserError, match=name.rsplit("/", 1)[-1].replace(".", r"\.")) as error:
            find_checkpoint(resume, folder.parent)
        assert not LEAKED_CODE.search(str(error.value))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_file_that_changes_after_the_check_does_not_run_either(name, received, tune, tmp_path, monkeypatch):
    folder = received("full", name)
    monkeypatch.setattr(store, "check_pickle", lambda *_: None)
    with pytest.raises(UserError, match=r"checkpoint-1: a file contains posix\.mkdir; use another checkpoint") as error:
        tune(folder.parent, max_steps=2, save_steps=1, resume="auto")
    assert not LEAKED_CODE.search(str(error.value))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_file_with_another_state_is_a_user_error(name, received, tune):
    """It is a plain state dict and its hash is recorded."""
    folder = received("full", "training_args.bin")
    torch.save({"another": torch.ones(2)}, folder / name)
    _record_sizes(folder)
    with pytest.raises(UserError, match=r"checkpoint-1: a file holds another state than that of this run \("):
        tune(folder.parent, max_steps=2, save_steps=1, resume="auto")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("global_step", "1"),
        ("global_step", 10**30),
        ("global_step", -1),
        ("global_step", True),
        ("max_steps", 1e300),
        ("epoch", "x"),
        ("save_steps", [1]),
        ("total_flos", float("nan")),
        ("log_history", None),
        ("log_history", [None]),
        ("log_history", [{"loss": 1.0}]),
        ("log_history", [{"step": 1, "loss": 10**400}]),
        ("stateful_callbacks", [{}]),
        ("no_such_field", 1),
    ],
)
def test_a_trainer_state_of_other_types_is_a_user_error(field, value, received, tmp_path):
    """The Trainer would fail with a traceback, or the report at the end of the run."""
    folder = received("lora", "training_args.bin")
    state = json.loads((folder / "trainer_state.json").read_text())
    (folder / "trainer_state.json").write_text(json.dumps({**state, field: value}))
    _record_sizes(folder)
    with pytest.raises(UserError, match=rf"trainer_state\.json has fields that .* did not write: {field}; use"):
        find_checkpoint(str(folder), folder.parent)


@pytest.mark.parametrize("name", ["training_args.bin", "zero_to_fp32.py", "tokenizer.model", "chat_template.jinja"])
def test_a_file_that_is_never_read_does_not_stop_a_run(name, received, tune, tmp_path):
    folder = received("full", name)
    tune(folder.parent, max_steps=2, save_steps=1, resume="auto")
    assert not (tmp_path / "executed").exists()


def test_a_conversion_by_another_process_does_not_disturb_the_check(trained, tmp_path):
    """Its files are partially written, and appear and disappear."""
    folder = shutil.copytree(trained["full"], tmp_path / "out" / "checkpoint-1")
    (folder / ".universal.partial").mkdir()
    (folder / ".universal.partial" / "fp32.pt").write_bytes(b"half")
    assert find_checkpoint("auto", tmp_path / "out").step == 1


@pytest.mark.parametrize("tag", ["../checkpoint-9/global_step9", "/tmp/global_step1", "", ".", "global_step1/.."])
def test_deepspeed_states_outside_the_checkpoint_are_rejected(tag, received, received_shards):
    """Their files have not been checked, and a conversion would write there."""
    (received_shards / "latest").write_text(tag)
    for read in (store.check_state_files, lambda folder: deepspeed_config.convert_to_universal({}, folder)):
        with pytest.raises(UserError, match="not the name of a folder global_stepN"):
            read(received_shards)


def test_an_export_names_the_shard_and_does_not_run_it(received_shards, toy_native, tmp_path):
    with pytest.raises(
        UserError,
        match=r"global_step1/mp_rank_00_model_states\.pt could run code when loaded \(contains posix\.mkdir\)",
    ):
        export(received_shards, tmp_path / "exported", ExportOptions(toy_native))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_an_export_ignores_the_other_files(method, received, toy_native, tmp_path):
    folder = received(method, "optimizer.pt")
    for name in ("training_args.bin", "adapter_model.bin", "pytorch_model.bin"):
        write_canary(folder / name, tmp_path / "executed")
    export(folder, tmp_path / "exported", ExportOptions(toy_native))
    assert not (tmp_path / "executed").exists()
    assert not [file.name for file in (tmp_path / "exported").iterdir() if file.suffix in (".pt", ".pth", ".bin")]


class TestDeepSpeed:
    """DeepSpeed's own loading functions, which pass weights_only=False, without the check before."""

    @pytest.fixture(autouse=True)
    def _cpu(self, monkeypatch):
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
        pytest.importorskip("deepspeed")

    def test_its_checkpoint_engine_does_not_run_code(self, received_shards, tmp_path):
        from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

        for name in SHARDS:
            with restricted_unpickling(), pytest.raises(pickle.UnpicklingError):
                TorchCheckpointEngine().load(str(received_shards / "global_step1" / name), map_location="cpu")
        assert not (tmp_path / "executed").exists()

    def test_its_conversion_to_float32_does_not_run_code(self, received_shards, toy_native, tmp_path, monkeypatch):
        monkeypatch.setattr("entrypoints.training.result.export.check_state_files", lambda _: None)
        with pytest.raises(UserError, match=r"incomplete or damaged \(contains posix\.mkdir\)"):
            export(received_shards, tmp_path / "exported", ExportOptions(toy_native))
        assert not (tmp_path / "executed").exists()

    @pytest.mark.slow
    @pytest.mark.parametrize("honest", [(), SHARDS[1:]], ids=["optimizer", "model"])
    def test_its_conversion_to_a_universal_checkpoint_does_not_run_code(self, honest, received_shards, tmp_path):
        """In a process of its own: the optimizer states are loaded first, then those of the model."""
        for name in honest:
            state = {"optimizer_state_dict": {"zero_stage": 2}}
            torch.save(state, received_shards / "global_step1" / name)
        with pytest.raises(UserError, match=r"cannot convert .*\(a file contains posix\.mkdir\)"):
            deepspeed_config.convert_to_universal({}, received_shards)
        assert not (tmp_path / "executed").exists()
