"""The folder of a training run: what the training page, the reports and a resumed run read from it."""

import json
import shutil
from html.parser import HTMLParser

import pytest
from canary import write_canary
from fuzzing import fuzz
from mutations import HOSTILE_TEXTS, damage_bytes, damage_json_text
from transformers import TrainerState

from entrypoints.checkpoint.manifest import sha256
from entrypoints.training.arguments import TrainArguments
from entrypoints.training.checkpoints.folders import list_checkpoints
from entrypoints.training.checkpoints.store import find_checkpoint
from entrypoints.training.checkpoints.trainer_state import read_trainer_state
from entrypoints.training.result import report
from entrypoints.web.training_runs.panels import Panels
from entrypoints.web.training_runs.status import read_training_status

pytestmark = pytest.mark.fuzz
EVENTS = [
    {"step": step, "epoch": step / 10, "time": 100.0 + step, "loss": 3.0 / step, "learning_rate": 1e-4, "grad_norm": 1}
    for step in range(1, 6)
]
STATE = {"global_step": 5, "max_steps": 50, "epoch": 0.5, "log_history": EVENTS, "save_steps": 5}
RESULTS = {"train_runtime": 12.5, "train_loss": 1.0, "epoch": 1.0}
SCORES = {"bleu_4": 12.5, "rouge_1": 30.0}
SAMPLE = {"prompt": "类型#裙", "reference": "好", "prediction": "好看"}
FOLDERS = (
    "checkpoint-5",
    "checkpoint-²",
    "checkpoint-٣",
    "checkpoint-99999999999999999999",
    "checkpoint--1",
    "checkpoint-x",
)


def lines(values, chance):
    texts = [
        damage_json_text(value, chance) if chance.random() < 0.5 else json.dumps(value).encode() for value in values
    ]
    return b"\n".join(texts)


def write_run(folder, chance):
    """Files of a run, each of them damaged or missing by chance."""
    contents = {
        "training_log.jsonl": lambda: lines(EVENTS, chance),
        "trainer_state.json": lambda: damage_json_text(STATE, chance),
        "train_results.json": lambda: damage_json_text(RESULTS, chance),
        "predict_results.json": lambda: damage_json_text(SCORES, chance),
        "generated_predictions.jsonl": lambda: lines([SAMPLE] * 3, chance),
    }
    for name, content in contents.items():
        (folder / name).unlink(missing_ok=True)
        if chance.random() < 0.8:
            (folder / name).write_bytes(content())
    for name in FOLDERS:
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "trainer_state.json").write_bytes(damage_json_text(STATE, chance))


def test_status_of_runs(tmp_path):
    def attempt(chance):
        write_run(tmp_path, chance)
        status = read_training_status(tmp_path)
        assert status is None or {one.folder.name for one in status.checkpoints} <= {"checkpoint-5"}
        if status:
            json.dumps({**vars(status), "checkpoints": [], "best": None}, allow_nan=False)
            for seconds in (status.elapsed_seconds, status.remaining_seconds):
                Panels("en").duration(seconds)

    fuzz("status_of_runs", attempt, 300, outcomes=["accepted"])


TAGS = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "table", "tr", "td", "th"}


class Page(HTMLParser):
    """Fails for any tag or attribute that the report does not write."""

    def handle_starttag(self, tag, attrs):
        assert tag in TAGS
        assert dict(attrs) in ({}, {"charset": "utf-8"})


def test_reports_of_runs(toy_native, tmp_path):
    """Numbers come from a state that may have been resumed from a received checkpoint."""

    def attempt(chance):
        run = tmp_path / (chance.choice(HOSTILE_TEXTS).replace("/", "").replace("\0", "")[:60].strip() or "run")
        try:
            run.mkdir(exist_ok=True)
        except (OSError, UnicodeError):
            return
        (run / "trainer_state.json").write_bytes(damage_json_text(STATE, chance))
        read_trainer_state(run / "trainer_state.json")
        TrainerState.load_from_json(run / "trainer_state.json").save_to_json(run / "trainer_state.json")
        arguments = TrainArguments(toy_native, tmp_path / "rows", run)
        texts = [chance.choice(HOSTILE_TEXTS) for _ in range(3)]
        scores = {chance.choice(HOSTILE_TEXTS): 1.5, "definition": chance.choice(HOSTILE_TEXTS)}
        report.write_reports(arguments, [report.Answer(*texts)], [scores, scores])
        Page().feed((run / "report.html").read_text(encoding="utf-8"))
        rows = (run / "report.md").read_text(encoding="utf-8").partition("## Answers")[2].splitlines()
        assert len([row for row in rows if row.startswith("|")]) == 3

    fuzz("reports_of_runs", attempt, 300)


@pytest.fixture(scope="module")
def trained(tune, tmp_path_factory):
    """A run of one step with its checkpoint."""
    return tune(tmp_path_factory.mktemp("trained") / "out", method="lora", max_steps=1, save_steps=1)


def sign(checkpoint):
    """Record all files as they are now: whoever sends a folder can compute hashes."""
    record = json.loads((checkpoint / "checkpoint.json").read_text())
    record["files"] = {
        file.relative_to(checkpoint).as_posix(): {"size": file.stat().st_size, "sha256": sha256(file)}
        for file in checkpoint.rglob("*")
        if file.is_file() and file.name != "checkpoint.json"
    }
    (checkpoint / "checkpoint.json").write_text(json.dumps(record))


def damage_file(file, chance, executed):
    """Change a file of a checkpoint, or put something else in its place."""
    content = file.read_bytes()
    change = chance.randrange(8)
    if change == 0:
        file.unlink()
    elif change == 1:
        file.unlink()
        file.mkdir()
    elif change == 2:
        write_canary(file, executed, chance.choice(("zip", "legacy", "pickle")))
    elif change == 3 or file.suffix != ".json":
        file.write_bytes(damage_bytes(content, chance, chance.choice((200, 2000, len(content) or 1))))
    else:
        file.write_bytes(damage_json_text(json.loads(content), chance))


def damage_checkpoint(output, chance, executed):
    """The name of the changed file, and whether the record of the checkpoint contradicts it."""
    checkpoint = output / "checkpoint-1"
    files = sorted(file for file in checkpoint.rglob("*") if file.is_file())
    file = chance.choice(files)
    damage_file(file, chance, executed)
    signed = file.name != "checkpoint.json" and chance.random() < 0.7
    if signed:
        sign(checkpoint)
    return file.relative_to(checkpoint).as_posix(), signed


@pytest.mark.slow
def test_checkpoints_to_resume_from(trained, tmp_path):
    """No file runs code; one that is used has the recorded content."""

    def attempt(chance):
        output = tmp_path / "out"
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(trained, output)
        damage_checkpoint(output, chance, tmp_path / "executed")
        resume = chance.choice(("auto", str(output / "checkpoint-1")))
        read_training_status(output)
        list_checkpoints(output)
        try:
            found = find_checkpoint(resume, output)
        finally:
            assert not (tmp_path / "executed").exists()
        assert found is None or found.step >= 0

    fuzz("checkpoints_to_resume_from", attempt, 150)


@pytest.mark.slow
def test_resumed_runs(trained, tune, tmp_path):
    """The whole run, as far as it gets."""

    def attempt(chance):
        output = tmp_path / "out"
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(trained, output)
        damage_checkpoint(output, chance, tmp_path / "executed")
        if chance.random() < 0.3:
            (output / "training_log.jsonl").write_bytes(lines(EVENTS, chance))
        try:
            tune(output, method="lora", max_steps=2, save_steps=2, resume="auto")
        finally:
            assert not (tmp_path / "executed").exists()

    fuzz("resumed_runs", attempt, 8)
