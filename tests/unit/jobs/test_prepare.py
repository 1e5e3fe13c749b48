"""`glm prepare`: its output, and the demo model. The model store is tested in unit/hub/test_model_store.py."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from entrypoints.checkpoint.native import open_native


@pytest.fixture
def shortened(monkeypatch):
    """One epoch in place of thirty."""
    from entrypoints.demo import recipe

    monkeypatch.setattr(recipe, "SHORT_TRAINING_FLAGS", (*recipe.SHORT_TRAINING_FLAGS, "--num-train-epochs", "1"))


@pytest.mark.slow
def test_it_prints_the_folder_and_the_file_and_both_can_be_loaded(glm, shortened, tmp_path):
    store = tmp_path / "store"
    done = glm("prepare", "demo", store, "--quantize", "q4_0")
    assert (done.code, done.out) == (0, f"{store}/demo\n{store}/demo-q4_0.gguf\n"), done.err
    assert re.search(r"demo-q4_0\.gguf: \d\.\d MB, mean KL 0\.\d+, \d+ of \d+ greedy tokens match the source", done.err)
    assert open_native(store / "demo", verify=True)
    for model in (store / "demo", store / "demo-q4_0.gguf"):
        reply = glm("chat", "--model", model, "--prompt", "你好", "--max-new-tokens", 4, "--json")
        assert json.loads(reply.out)["completion_tokens"] >= 1
    again = glm("prepare", "demo", store, "--quantize", "q4_0")
    assert (again.code, again.out) == (0, done.out)
    assert "training" not in again.err
    assert not [entry for entry in store.iterdir() if entry.name.endswith((".scratch", ".partial"))]


@pytest.mark.slow
def test_a_gguf_file_whose_divergence_is_too_large_is_not_kept(glm, toy_native, tmp_path, monkeypatch):
    """It is validated as by `glm quantize`, before its hash is recorded."""
    from entrypoints.quantization import divergence

    monkeypatch.setitem(divergence.MAX_MEAN_KL, "q4_0", 1e-9)
    done = glm("prepare", toy_native, tmp_path / "store", "--quantize", "q4_0")
    assert "the q4_0 model differs too much from its source: mean KL" in done.mistake()
    assert [entry.name for entry in (tmp_path / "store").iterdir() if "lock" not in entry.name] == ["native"]


def test_failed_training_is_reported_with_its_exit_code_and_leaves_nothing(glm, tmp_path, monkeypatch):
    from entrypoints.demo import recipe

    monkeypatch.setattr(recipe, "SHORT_TRAINING_FLAGS", ("--no-such-flag",))
    done = glm("prepare", "demo", tmp_path)
    assert "training the demo model exited with code 2; see its message above" in done.mistake()
    assert [entry.name for entry in tmp_path.iterdir() if "lock" not in entry.name] == []


def test_a_model_that_is_not_found_is_one_line(glm, tmp_path):
    assert "model 'absent' not found: it is not a folder" in glm("prepare", "absent", tmp_path / "store").mistake()


@pytest.fixture(scope="module")
def rows(tmp_path_factory, sample_rows):
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in sample_rows[:8]), encoding="utf-8")
    return file


def tune(glm, base, rows, output, *flags):
    short = ["--max-steps", 1, "--max-target-length", 64, "--device", "cpu", *flags]
    done = glm("train", "--model-name-or-path", base, "--train-file", rows, "--output-dir", output, *short)
    assert done.code == 0, done.err


@pytest.mark.slow
def test_a_lora_is_merged_into_its_base_which_is_found_by_its_weights(glm, toy_native, rows, tmp_path):
    """Tune, then serve: the run is prepared by its name, and again after it was repeated."""
    store, runs = tmp_path / "store", tmp_path / "runs"
    shutil.copytree(toy_native, store / "org" / "base")
    shutil.copytree(toy_native, store / "other")
    (store / "other" / "manifest.json").write_text('{"provenance": {}, "files": {}}')  # other weights
    tune(glm, toy_native, rows, runs / "mine", "--method", "lora", "--learning-rate", "0.01")
    done = glm("prepare", "mine", store, "--look-in", runs)
    assert (done.code, done.out) == (0, f"{store}/mine\n"), done.err
    assert f"merging {runs}/mine into {store}/org/base" in done.err
    merged = load_file(store / "mine" / "model.safetensors")
    base = load_file(toy_native / "model.safetensors")
    changed = {name.split(".")[-2] for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {"q_proj", "k_proj", "v_proj"}
    again = glm("prepare", "mine", store, "--look-in", runs)
    assert "mine exists: " in again.err
    assert "merging" not in again.err
    tune(glm, toy_native, rows, runs / "mine", "--method", "lora", "--seed", 7, "--overwrite-output-dir")
    assert "has changed since it was copied" in glm("prepare", "mine", store, "--look-in", runs).err


@pytest.mark.slow
def test_a_lora_without_its_base_is_an_error_that_names_it(glm, toy_native, rows, tmp_path):
    tune(glm, toy_native, rows, tmp_path / "runs" / "mine", "--method", "lora")
    mistake = glm("prepare", "mine", tmp_path / "store", "--look-in", tmp_path / "runs").mistake()
    assert f"runs/mine is an adapter of {toy_native.name}, whose weights are in none of {tmp_path}/store, " in mistake
    assert f"; prepare {toy_native.name} first" in mistake
    glm("prepare", toy_native, tmp_path / "store")  # the remedy
    assert glm("prepare", "mine", tmp_path / "store", "--look-in", tmp_path / "runs").code == 0


def test_a_prefix_is_an_error_with_the_flags_that_serve_it(glm, toy_native, rows, tmp_path):
    tune(glm, toy_native, rows, tmp_path / "mine", "--method", "ptuning", "--pre-seq-len", 4)
    glm("prepare", toy_native, tmp_path / "store")
    mistake = glm("prepare", "mine", tmp_path / "store", "--look-in", tmp_path).mistake()
    served = f"MODEL={toy_native.name} and glm serve --engine transformers --adapter mine={tmp_path}/mine"
    assert "is a P-Tuning v2 prefix, which cannot be merged into a model; serve its base model with it: " in mistake
    assert served in mistake
