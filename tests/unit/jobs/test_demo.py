"""The demo with a single pass over its sample, in one process. CI runs the full demo with its subprocesses."""

import contextlib
import io
import json
from types import SimpleNamespace

import pytest

from entrypoints.__main__ import main
from entrypoints.checkpoint.native import open_native


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Its folder and its outcome; the ten commands run in this process, which saves starting Python."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr("subprocess.run", lambda words, check: SimpleNamespace(returncode=main(words[3:])))
        patch.setenv("DEVICE", "cpu")
        code = main(["demo", "--output-dir", str(folder), "--num-train-epochs", "1"])
    return folder, SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


@pytest.mark.slow
def test_the_demo_completes_and_prints_the_command_of_every_step(demo):
    _, done = demo
    assert done.returncode == 0, done.stderr
    shown = [line.split()[2] for line in done.stdout.splitlines() if line.startswith("$ glm ")]
    assert shown == ["convert", "data", "data", "train", "evaluate", "evaluate", "chat", "chat", "chat", "chat"]
    assert "Traceback" not in done.stderr


def test_all_output_files_exist_and_are_valid(demo):
    folder, done = demo
    for name in ("native", "tuned"):
        assert open_native(folder / name, verify=True)
        assert f"{folder / name}\n" in done.stdout
    assert len((folder / "ads" / "dev.jsonl").read_text(encoding="utf-8").splitlines()) == 30
    for name in ("scores-train", "scores-dev"):
        scores = json.loads((folder / name / "predict_results.json").read_text(encoding="utf-8"))
        answers = (folder / name / "generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
        assert scores["n"] == len(answers)


def test_the_demo_ends_with_the_scores_and_the_next_command(demo):
    folder, done = demo
    *_, scores, hint = done.stdout.rpartition("Done in ")[2].split("\n\n")
    assert "training rows" in scores
    assert "held-out rows" in scores
    assert hint.strip() == f"Chat with it:  glm chat --model {folder}/tuned"


def test_a_folder_that_cannot_be_created_is_a_user_error(tmp_path, glm):
    (tmp_path / "taken").write_text("")
    assert "choose another --output-dir" in glm("demo", "--output-dir", tmp_path / "taken" / "out").mistake()


@pytest.mark.slow
def test_a_failed_step_ends_the_demo_with_its_name_and_code(tmp_path, glm, monkeypatch):
    monkeypatch.setattr("entrypoints.demo.model.write_demo_model", lambda folder, texts, family: None)
    done = glm("demo", "--output-dir", tmp_path / "out")
    assert done.code == 1
    assert "glm: glm convert exited with code 1" in done.err
