"""The model store of `glm prepare`: models appear atomically and are verified; running it again or twice is safe."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from permissions import denied

from entrypoints.checkpoint.manifest import read_manifest
from entrypoints.checkpoint.native import open_native
from entrypoints.errors import UserError
from entrypoints.hub import model_store
from entrypoints.hub.download import KNOWN_MODELS
from entrypoints.hub.model_store import PrepareOptions
from entrypoints.hub.transfer import MAX_ATTEMPTS
from entrypoints.settings import Settings

MODEL = "THUDM/chatglm3-6b"


@pytest.fixture
def prepare(tmp_path, toy_native):
    """Prepare a model in tmp_path/store; the tiny model replaces the demo checkpoint."""
    created = []

    def create_demo(folder):
        created.append(folder)
        return toy_native

    def call(model, look_in=(), settings=Settings(), family=None):  # noqa: B008 - frozen
        options = PrepareOptions(settings, create_demo, None, "auto", look_in, family)
        return model_store.prepare_model(tmp_path / "store", model, options)

    call.created = created
    return call


@pytest.fixture
def on_the_hub(huggingface, toy_original):
    """The tiny model under the name of the real one."""
    revision = KNOWN_MODELS[MODEL]["huggingface"].revision
    huggingface.revisions[revision] = {file.name: file.read_bytes() for file in toy_original.iterdir()}
    huggingface.storage.revisions = huggingface.revisions
    return huggingface


def visible(folder: Path) -> list[str]:
    """Names of the entries that are not hidden."""
    return sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))


def test_the_demo_is_created_once_and_then_only_verified(prepare, tmp_path):
    folder = prepare("demo")
    assert folder == tmp_path / "store" / "demo"
    assert open_native(folder, verify=True)
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert prepare("demo") == folder
    assert len(prepare.created) == 1
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    assert visible(folder.parent) == ["demo"]


@pytest.mark.parametrize("model", ["demo", "native"])
def test_a_model_of_another_family_is_named_and_stays(model, prepare, toy_native):
    look_in = [toy_native.parent]
    prepared = prepare(model, look_in)
    before = read_manifest(prepared)
    with pytest.raises(UserError, match=f"{prepared} is a ChatGLM3-6B model, which --family glm4 contradicts; omit"):
        prepare(model, look_in, family="glm4")
    assert read_manifest(prepared) == before
    assert prepare(model, look_in, family="chatglm3") == prepared


def test_a_converted_folder_of_another_family_is_not_copied(prepare, toy_native, tmp_path):
    with pytest.raises(UserError, match="is a ChatGLM3-6B model"):
        prepare("native", [toy_native.parent], family="chatglm2")
    assert visible(tmp_path / "store") == []


def test_a_folder_in_the_original_layout_is_converted_under_its_own_name(prepare, toy_original):
    assert prepare(str(toy_original)).name == "original"
    assert open_native(prepare(str(toy_original)), verify=True)


def test_a_converted_folder_is_copied_without_the_states_of_a_run(prepare, toy_native, tmp_path):
    run = shutil.copytree(toy_native, tmp_path / "run")
    (run / "checkpoint-3").mkdir()
    (run / "checkpoint-3" / "optimizer.pt").write_bytes(b"state")
    folder = prepare(str(run))
    assert set(visible(folder)) == {*read_manifest(toy_native)["files"], "manifest.json"}


def test_a_converted_folder_without_a_manifest_gets_one(prepare, toy_native, tmp_path):
    bare = shutil.copytree(toy_native, tmp_path / "bare")
    (bare / "manifest.json").unlink()
    (bare / "notes.txt").write_text("not the model's", encoding="utf-8")
    folder = prepare(str(bare))
    assert open_native(folder, verify=True)
    assert "notes.txt" not in visible(folder)


def test_a_name_is_searched_in_the_given_folders(prepare, toy_native, tmp_path):
    shutil.copytree(toy_native, tmp_path / "runs" / "mine")
    shutil.copytree(toy_native, tmp_path / "mirror" / "THUDM" / "chatglm3-6b")
    look_in = [tmp_path / "mirror", tmp_path / "runs"]
    assert prepare("mine", look_in) == tmp_path / "store" / "mine"
    assert prepare(MODEL, look_in) == tmp_path / "store" / MODEL


def test_a_model_of_the_store_needs_its_source_folder_no_longer(prepare, toy_native, tmp_path):
    shutil.copytree(toy_native, tmp_path / "runs" / "mine")
    folder = prepare("mine", [tmp_path / "runs"])
    shutil.rmtree(tmp_path / "runs")
    assert prepare("mine", [tmp_path / "runs"]) == folder


def test_a_model_of_a_hub_is_downloaded_converted_and_its_download_removed(prepare, on_the_hub, settings, tmp_path):
    folder = prepare(MODEL, settings=settings)
    assert folder == tmp_path / "store" / MODEL
    assert open_native(folder, verify=True)
    assert read_manifest(folder)["provenance"]["download"]["commit"] == KNOWN_MODELS[MODEL]["huggingface"].revision
    assert not any((tmp_path / "store" / model_store.DOWNLOADS).rglob("*.bin"))
    on_the_hub.requests.clear()
    assert prepare(MODEL, settings=settings) == folder
    assert on_the_hub.requests == []


def test_an_interrupted_download_resumes(prepare, on_the_hub, settings, tmp_path):
    weights = "pytorch_model-00002-of-00002.bin"
    on_the_hub.storage.cuts[weights] = [1000] * 100
    with pytest.raises(UserError, match="attempts failed"):
        prepare(MODEL, settings=settings)
    assert not (tmp_path / "store" / MODEL).exists()
    on_the_hub.storage.cuts.clear()
    on_the_hub.storage.requests.clear()
    prepare(MODEL, settings=settings)
    assert [request.headers["range"] for request in on_the_hub.storage.requests_for(weights)] == [
        f"bytes={1000 * MAX_ATTEMPTS}-"
    ]
    assert open_native(tmp_path / "store" / MODEL, verify=True)


@pytest.mark.parametrize("name", ["absent", "../demo", "/srv/absent", "a/b/c"])
def test_a_model_that_is_not_found_is_reported_with_the_folders_searched(prepare, tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where "../demo" does not exist
    with pytest.raises(
        UserError, match=r"model .* not found: it is not a folder, nor is it in .*runs.*; use demo, ORG/NAME"
    ):
        prepare(name, [tmp_path / "runs"])
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("native", "config.json"),
        ("native", "manifest.json"),
        ("native", "model.safetensors"),
        ("original", "config.json"),
        ("original", "pytorch_model-00001-of-00002.bin"),
    ],
)
def test_a_source_file_without_read_permission_is_named_with_the_command_that_helps(
    name, layout, prepare, toy_native, toy_original, tmp_path
):
    """As root leaves it in a folder of models; the store is writable."""
    folder = shutil.copytree({"native": toy_native, "original": toy_original}[layout], tmp_path / "mine")
    file = folder / name
    with denied(file), pytest.raises(UserError) as caught:
        prepare(str(folder))
    assert caught.value.problem == f"cannot read {file} (Permission denied)"
    assert caught.value.remedy.endswith(f"chgrp {os.getgid()} {file} && chmod 640 {file}")
    assert visible(tmp_path / "store") == []


def test_a_store_that_this_process_may_not_enter_is_named(prepare, tmp_path):
    (tmp_path / "store").mkdir()
    with (
        denied(tmp_path / "store"),
        pytest.raises(UserError, match=r"cannot write in .*store .*must be writable for user"),
    ):
        prepare("demo")


def test_a_damaged_checkpoint_is_rejected(prepare):
    weights = prepare("demo") / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(
        UserError,
        match=r"model\.safetensors does not match its SHA-256; move .*demo elsewhere and run this",
    ):
        prepare("demo")


def test_an_adapter_that_does_not_name_its_base_is_rejected_with_the_command_that_merges_it(prepare, tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}), encoding="utf-8")
    with pytest.raises(UserError, match=r"does not name its base model; merge it: glm export \S+lora \S+lora-merged"):
        prepare(str(tmp_path / "lora"))


def test_of_three_at_once_one_creates_the_model(prepare):
    found = []
    threads = [threading.Thread(target=lambda: found.append(prepare("demo"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(found) == 3
    assert len(prepare.created) == 1


def test_a_store_that_is_a_file_is_named(prepare, tmp_path):
    (tmp_path / "store").write_text("")
    with pytest.raises(UserError, match=r"cannot write in .*store"):
        prepare("demo")


def test_a_disk_that_is_too_small_is_reported_before_anything_is_written(prepare, monkeypatch, tmp_path):
    monkeypatch.setattr(model_store, "DEMO_BYTES", 1 << 60)
    with pytest.raises(UserError, match="free; free space or choose another disk"):
        prepare("demo")
    assert visible(tmp_path / "store") == []


HELD = """
import sys, time
from entrypoints.__main__ import main
from entrypoints.hub import model_store
copy = model_store.shutil.copyfile
def once(source, target):
    copy(source, target)
    print("copied", flush=True)
    time.sleep(300)
model_store.shutil.copyfile = once
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_kill_leaves_no_incomplete_model_and_the_next_run_completes_it(number, prepare, toy_native, tmp_path):
    """Killed after its first file was copied."""
    words = ["prepare", str(toy_native), str(tmp_path / "store")]
    with subprocess.Popen([sys.executable, "-c", HELD, *words], stdout=subprocess.PIPE, text=True) as held:
        assert held.stdout.readline() == "copied\n"
        held.send_signal(number)
        held.wait(60)
    assert visible(tmp_path / "store") == []
    assert open_native(prepare(str(toy_native)), verify=True)
    assert not list((tmp_path / "store").glob(".*.partial"))
