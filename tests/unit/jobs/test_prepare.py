"""`glm prepare`: what it prints, and the demo's toy it makes. The store behind it: unit/checkpoint/test_store.py."""

import json
import re

import pytest

from entrypoints.checkpoint.native import open_native


@pytest.fixture
def shortened(monkeypatch):
    """One pass over its rows in place of thirty; everything else is real."""
    from entrypoints.demo import recipe

    monkeypatch.setattr(recipe, "QUICK", (*recipe.QUICK, "--num-train-epochs", "1"))


def test_it_prints_the_folder_and_the_file_and_both_answer(glm, shortened, tmp_path):
    store = tmp_path / "store"
    done = glm("prepare", "demo", store, "--quantize", "q4_0")
    assert (done.code, done.out) == (0, f"{store}/demo\n{store}/demo-q4_0.gguf\n"), done.err
    assert re.search(r"demo-q4_0\.gguf: \d MB, mean KL 0\.\d+, \d+ of \d+ greedy tokens as the source", done.err)
    assert open_native(store / "demo", verify=True)
    for model in (store / "demo", store / "demo-q4_0.gguf"):
        asked = glm("chat", "--model", model, "--prompt", "你好", "--max-new-tokens", 4, "--json")
        assert json.loads(asked.out)["completion_tokens"] >= 1
    again = glm("prepare", "demo", store, "--quantize", "q4_0")
    assert (again.code, again.out) == (0, done.out)
    assert "training" not in again.err
    assert not [entry for entry in store.iterdir() if entry.name.endswith((".scratch", ".partial"))]


def test_a_file_too_far_from_its_source_is_not_put_into_the_store(glm, toy_native, tmp_path, monkeypatch):
    """It is checked as `glm quantize` checks it, before its hash is written down."""
    from entrypoints.engines import gguf_check

    monkeypatch.setitem(gguf_check.BOUNDS, "q4_0", 1e-9)
    done = glm("prepare", toy_native, tmp_path / "store", "--quantize", "q4_0")
    assert "the q4_0 model is not its source: mean KL" in done.mistake()
    assert [entry.name for entry in (tmp_path / "store").iterdir() if "lock" not in entry.name] == ["native"]


def test_training_that_fails_is_told_with_its_code_and_leaves_nothing(glm, tmp_path, monkeypatch):
    from entrypoints.demo import recipe

    monkeypatch.setattr(recipe, "QUICK", ("--no-such-flag",))
    done = glm("prepare", "demo", tmp_path)
    assert "training the demo model ended with code 2; see its message above" in done.mistake()
    assert [entry.name for entry in tmp_path.iterdir() if "lock" not in entry.name] == []


def test_a_model_that_is_nowhere_is_one_line(glm, tmp_path):
    assert "no model 'absent': it is no folder" in glm("prepare", "absent", tmp_path / "store").mistake()
