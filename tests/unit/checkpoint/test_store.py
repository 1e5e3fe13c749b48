"""The model store that `glm prepare` fills: whole or not there, checked when it is, safe to fill again and at once."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from entrypoints.checkpoint import store
from entrypoints.checkpoint.gguf import open_gguf
from entrypoints.checkpoint.gguf_writing import write_gguf
from entrypoints.checkpoint.hub import KNOWN
from entrypoints.checkpoint.hub_transfer import ATTEMPTS
from entrypoints.checkpoint.manifest import read_manifest, write_manifest
from entrypoints.checkpoint.native import open_native
from entrypoints.errors import UserError
from entrypoints.settings import Settings

MODEL = "THUDM/chatglm3-6b"


@pytest.fixture
def fill(tmp_path, toy_native):
    """Fill tmp_path/store; the demo's checkpoint is the toy."""
    made = []

    def call(model, look_in=(), settings=Settings()):  # noqa: B008 - frozen
        return store.fill(
            tmp_path / "store", model, look_in, "auto", settings, lambda folder: made.append(folder) or toy_native
        )

    call.made = made
    return call


@pytest.fixture
def on_the_hub(huggingface, toy_original):
    """The toy under the name of the real model."""
    revision = KNOWN[MODEL]["huggingface"].revision
    huggingface.revisions[revision] = {file.name: file.read_bytes() for file in toy_original.iterdir()}
    huggingface.storage.revisions = huggingface.revisions
    return huggingface


def quantized(folder: Path) -> Path:
    """Its q4_0 file; that `glm prepare` has the file checked too is seen in unit/jobs/test_prepare.py."""
    return store.quantized(
        folder, "q4_0", lambda folder, file, type_, finished: write_gguf(folder, file, type_, check=finished)
    )


def shown(folder: Path) -> list[str]:
    """What is seen by who looks for models."""
    return sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))


def test_the_demo_is_made_once_and_then_checked_alone(fill, tmp_path):
    folder = fill("demo")
    assert folder == tmp_path / "store" / "demo"
    assert open_native(folder, verify=True)
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert fill("demo") == folder
    assert len(fill.made) == 1
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    assert shown(folder.parent) == ["demo"]


def test_a_folder_in_the_original_layout_is_converted_under_its_own_name(fill, toy_original):
    assert fill(str(toy_original)).name == "original"
    assert open_native(fill(str(toy_original)), verify=True)


def test_a_converted_folder_is_copied_without_what_a_run_left_in_it(fill, toy_native, tmp_path):
    run = shutil.copytree(toy_native, tmp_path / "run")
    (run / "checkpoint-3").mkdir()
    (run / "checkpoint-3" / "optimizer.pt").write_bytes(b"state")
    folder = fill(str(run))
    assert set(shown(folder)) == {*read_manifest(toy_native)["files"], "manifest.json"}


def test_a_converted_folder_without_a_manifest_gets_one(fill, toy_native, tmp_path):
    bare = shutil.copytree(toy_native, tmp_path / "bare")
    (bare / "manifest.json").unlink()
    (bare / "notes.txt").write_text("not the model's", encoding="utf-8")
    folder = fill(str(bare))
    assert open_native(folder, verify=True)
    assert "notes.txt" not in shown(folder)


def test_a_name_is_looked_up_in_the_given_folders_and_keeps_its_name(fill, toy_native, tmp_path):
    shutil.copytree(toy_native, tmp_path / "runs" / "mine")
    shutil.copytree(toy_native, tmp_path / "mirror" / "THUDM" / "chatglm3-6b")
    look_in = [tmp_path / "mirror", tmp_path / "runs"]
    assert fill("mine", look_in) == tmp_path / "store" / "mine"
    assert fill(MODEL, look_in) == tmp_path / "store" / MODEL


def test_a_run_that_was_trained_anew_replaces_its_copy_and_the_file_made_of_it(fill, toy_native, tmp_path):
    run = shutil.copytree(toy_native, tmp_path / "mine")
    folder = fill(str(run))
    file = quantized(folder)
    first = file.read_bytes()
    (run / "prompt.json").write_text('{"template": "chatglm3", "source_prefix": "写广告："}', encoding="utf-8")
    write_manifest(run, {"made_by": "glm train"})
    assert fill(str(run)) == folder
    assert open_native(folder, verify=True).prompt_format.source_prefix == "写广告："
    assert quantized(folder).read_bytes() != first
    assert open_gguf(file).prompt_format.source_prefix == "写广告："


def test_a_name_without_its_folder_is_served_from_the_store(fill, toy_native, tmp_path):
    shutil.copytree(toy_native, tmp_path / "runs" / "mine")
    folder = fill("mine", [tmp_path / "runs"])
    shutil.rmtree(tmp_path / "runs")
    assert fill("mine", [tmp_path / "runs"]) == folder


def test_a_model_of_a_hub_is_downloaded_converted_and_its_download_removed(fill, on_the_hub, settings, tmp_path):
    folder = fill(MODEL, settings=settings)
    assert folder == tmp_path / "store" / MODEL
    assert open_native(folder, verify=True)
    assert read_manifest(folder)["provenance"]["download"]["commit"] == KNOWN[MODEL]["huggingface"].revision
    assert not any((tmp_path / "store" / store.DOWNLOADS).rglob("*.bin"))
    on_the_hub.asked.clear()
    assert fill(MODEL, settings=settings) == folder
    assert on_the_hub.asked == []


def test_an_interrupted_download_goes_on_where_it_stopped(fill, on_the_hub, settings, tmp_path):
    weights = "pytorch_model-00002-of-00002.bin"
    on_the_hub.storage.cuts[weights] = [1000] * 100
    with pytest.raises(UserError, match="attempts failed"):
        fill(MODEL, settings=settings)
    assert not (tmp_path / "store" / MODEL).exists()
    on_the_hub.storage.cuts.clear()
    on_the_hub.storage.asked.clear()
    fill(MODEL, settings=settings)
    assert [asked.headers["range"] for asked in on_the_hub.storage.got(weights)] == [f"bytes={1000 * ATTEMPTS}-"]
    assert open_native(tmp_path / "store" / MODEL, verify=True)


@pytest.mark.parametrize("name", ["absent", "../demo", "/srv/absent", "a/b/c"])
def test_a_model_that_is_nowhere_is_named_with_the_places(fill, tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)  # beside which there is no folder "demo"
    with pytest.raises(UserError, match=r"no model .*: it is no folder, nor one in .*runs.*; give demo, ORG/NAME"):
        fill(name, [tmp_path / "runs"])
    assert not (tmp_path / "store").exists()


def test_a_damaged_checkpoint_is_refused(fill):
    weights = fill("demo") / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match=r"model\.safetensors has other contents; remove .*demo and run this again"):
        fill("demo")


def test_a_damaged_gguf_file_is_refused(fill):
    file = quantized(fill("demo"))
    assert file.name == "demo-q4_0.gguf"
    assert quantized(fill("demo")) == file
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"demo-q4_0\.gguf has other contents .*; remove it"):
        quantized(fill("demo"))


def test_a_gguf_file_of_unknown_origin_is_not_taken(fill):
    file = quantized(fill("demo"))
    file.with_name(f"{file.name}.json").unlink()
    with pytest.raises(UserError, match=r"demo-q4_0\.gguf\.json is missing"):
        quantized(fill("demo"))


def test_an_adapter_is_no_model(fill, tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}), encoding="utf-8")
    with pytest.raises(UserError, match="is an adapter, no whole model; make one of it with its base: glm export"):
        fill(str(tmp_path / "lora"))


def test_two_at_once_make_it_once(fill):
    found = []
    threads = [threading.Thread(target=lambda: found.append(fill("demo"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(found) == 3
    assert len(fill.made) == 1


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere; tests/compose tries it in a container")
def test_a_store_that_cannot_be_written_is_named(fill, tmp_path):
    (tmp_path / "store").mkdir(mode=0o500)
    with pytest.raises(UserError, match="must be writable for user"):
        fill("demo")


def test_a_store_that_is_a_file_is_named(fill, tmp_path):
    (tmp_path / "store").write_text("")
    with pytest.raises(UserError, match=r"cannot write in .*store"):
        fill("demo")


def test_a_disk_that_is_too_small_is_told_before_anything_is_made(fill, monkeypatch, tmp_path):
    monkeypatch.setattr(store, "DEMO_BYTES", 1 << 60)
    with pytest.raises(UserError, match="GB free; free space or choose another disk"):
        fill("demo")
    assert shown(tmp_path / "store") == []


HELD = """
import sys, time
from entrypoints.__main__ import main
from entrypoints.checkpoint import store
copy = store.shutil.copyfile
def once(source, target):
    copy(source, target)
    print("copied", flush=True)
    time.sleep(300)
store.shutil.copyfile = once
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_kill_leaves_nothing_half_made_and_the_next_run_makes_it_whole(number, toy_native, tmp_path):
    """Killed after the first of its files."""
    words = ["prepare", str(toy_native), str(tmp_path / "store")]
    with subprocess.Popen([sys.executable, "-c", HELD, *words], stdout=subprocess.PIPE, text=True) as held:
        assert held.stdout.readline() == "copied\n"
        held.send_signal(number)
        held.wait(60)
    assert shown(tmp_path / "store") == []
    subprocess.run([sys.executable, "-m", "entrypoints", *words], check=True)
    assert open_native(tmp_path / "store" / "native", verify=True)
    assert not list((tmp_path / "store").glob(".*.partial"))
