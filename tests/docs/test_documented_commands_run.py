"""Every `glm` command of the documentation runs as written, in a folder where tiny models replace the real ones.

Commands that need a GPU or a network, and servers that other tests start, are listed below with the reason. Training
runs get `--max-steps 1` at the end; nothing else is changed.
"""

import importlib.util
import io
import json
import re
import shlex
import shutil
import tarfile
from dataclasses import asdict
from pathlib import Path

import pytest

from entrypoints.__main__ import main
from entrypoints.api.usage import UsageRecord

spec = importlib.util.spec_from_file_location("documentation", Path(__file__).with_name("test_documentation.py"))
documentation = importlib.util.module_from_spec(spec)
spec.loader.exec_module(documentation)

NOT_RUN = {
    r"^\S+=\S+ glm download|^glm download|^glm prepare THUDM": "needs a network",
    r"--num-gpus|--engine vllm": "needs GPUs",
    r"^glm (serve|web) ": "a server: tests/docs/test_ten_commands.py, tests/api and tests/web start them",
    r"^glm prepare demo ": "trains the demo model: tests/unit/jobs/test_prepare.py",
    r"…|SRC DST": "a placeholder",
    r"^docker compose exec ": "inside a container of the stack; the same command runs here outside",
    r"^kubectl ": "inside a pod of a cluster; the same command runs here outside",
    r" && (docker|kubectl) ": "a stack or a cluster; what is in front of it is documented and run alone",
    r"^glm export output/adgen-zero3": "needs a DeepSpeed checkpoint: tests/train exports one",
}
COMMANDS = sorted({line for _, line in documentation.ALL_COMMANDS if re.search(r"(^|\s)glm ", line)})


def reason_not_to_run(line: str) -> str | None:
    return next((reason for pattern, reason in NOT_RUN.items() if re.search(pattern, line)), None)


RUN = [line for line in COMMANDS if reason_not_to_run(line) is None]


def train(model: Path, rows: Path, output: Path, *flags: str) -> Path:
    words = ["train", "--model-name-or-path", model, "--train-file", rows, "--output-dir", output, "--max-steps", 1]
    assert main([str(word) for word in (*words, "--save-steps", 1, *flags)]) == 0
    return output


@pytest.fixture(scope="module")
def rows(tmp_path_factory, sample_rows) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [json.dumps({key: row[key] for key in ("content", "summary")}, ensure_ascii=False) for row in sample_rows]
    file.write_text("\n".join(lines[:24]) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def runs(tmp_path_factory, toy_native, rows) -> dict[str, Path]:
    """One full-parameter run and one LoRA run."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        "full": train(toy_native, rows, folder / "full", "--method", "full"),
        "lora": train(toy_native, rows, folder / "lora", "--method", "lora"),
    }


@pytest.fixture
def workspace(tmp_path, monkeypatch, request, rows, runs) -> Path:
    """The files that the documentation names, as copies and links of tiny ones; it is the current folder."""
    native = request.getfixturevalue("toy_native")
    for name in ("models", "adapters", "output", "demo/ads", "data/adgen"):
        (tmp_path / name).mkdir(parents=True)
    links = {
        "models/chatglm3-6b": native,
        "models/chatglm3-6b-original": request.getfixturevalue("toy_original"),
        "models/mine": native,
        "demo/native": native,
        "demo/tuned": native,
        "adapters/mine": runs["lora"],
        "output/mine": runs["lora"],
        "output/adgen-lora": runs["lora"],
        "tuned.gguf": request.getfixturevalue("toy_gguf"),
    }
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    (tmp_path / "output/adgen").mkdir()
    (tmp_path / "output/adgen/checkpoint-500").symlink_to(runs["full"] / "checkpoint-1")
    for name in ("train.jsonl", "rows.jsonl", "general.jsonl", "data/adgen/train.jsonl"):
        shutil.copy(rows, tmp_path / name)
    few = "".join(rows.read_text(encoding="utf-8").splitlines(keepends=True)[:4])  # each answer takes time
    for name in ("dev.jsonl", "demo/ads/train.jsonl", "demo/ads/dev.jsonl", "data/adgen/dev.jsonl"):
        (tmp_path / name).write_text(few, encoding="utf-8")
    with_history = {"content": "再短一点", "summary": "好的。", "history": [["写一句广告语", "简约百搭。"]]}
    for name in ("conversation.jsonl", "demo/train.jsonl"):
        (tmp_path / name).write_text(json.dumps(with_history, ensure_ascii=False) + "\n", encoding="utf-8")
    turns = [{"from": "human", "value": "再短一点"}, {"from": "gpt", "value": "好的。"}]
    (tmp_path / "sharegpt.json").write_text(json.dumps([{"conversations": turns}]), encoding="utf-8")
    preference = {"prompt": "写一句广告语", "chosen": "简约百搭。", "rejected": "不知道。"}
    (tmp_path / "preferences.jsonl").write_text(json.dumps(preference, ensure_ascii=False) + "\n", encoding="utf-8")
    with tarfile.open(tmp_path / "AdvertiseGen.tar.gz", "w:gz") as archive:
        archive.add(rows, "AdvertiseGen/train.json")
        archive.add(rows, "AdvertiseGen/dev.json")
    (tmp_path / "usage").mkdir()
    record = UsageRecord("2026-11-30T08:00:00.000Z", "chatcmpl-1", "team-a", "chatglm3-6b", "completed", 12, 30, 1.5)
    (tmp_path / "usage/usage-2026-11-30.jsonl").write_text(json.dumps(asdict(record)) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_room(line: str, workspace: Path, runs: dict[str, Path], request: pytest.FixtureRequest) -> None:
    """Remove or replace what this one command creates or reads."""
    words = shlex.split(line)
    if words[1] in ("convert", "export", "quantize") and (workspace / words[3]).is_symlink():
        (workspace / words[3]).unlink()
    if "output/adgen" in words and words[1] == "train":
        shutil.rmtree(workspace / "output/adgen")
    flag = next((word for word in words if word in ("--output-dir", "--output_dir")), None)
    if flag and (target := workspace / words[words.index(flag) + 1]).is_symlink():
        target.unlink()
    if words[1:3] == ["data", "split"]:
        shutil.rmtree(workspace / "data/adgen")
    if words[-1] == "--delete":
        assert main(["user", words[2], words[3]]) == 0
    if words[1] == "prepare":
        (workspace / "output/mine").unlink()
        (workspace / "output/mine").symlink_to(runs["full"])
    if words[2] in ("output/lora", "output/ptuning"):  # adapters in the original layout
        golden = request.getfixturevalue("golden")
        (workspace / words[2]).symlink_to(golden / f"original-tiny-{words[2].removeprefix('output/')}")
        (workspace / words[3]).unlink(missing_ok=True)
        (workspace / "models/chatglm3-6b").unlink()
        (workspace / "models/chatglm3-6b").symlink_to(request.getfixturevalue("golden_native"))


@pytest.mark.slow
@pytest.mark.parametrize("line", RUN)
def test_a_documented_command_runs_as_written(line, workspace, runs, request, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("你好，请介绍一下自己\n"))  # a question, or a password
    if len(shlex.split(line)) > 3:
        make_room(line, workspace, runs, request)
    words = shlex.split(line)[1:]
    assert main([*words, *(["--max-steps", "1"] if words[0] == "train" else [])]) == 0


def test_most_commands_are_run_and_every_reason_applies():
    assert len(RUN) >= 25
    for pattern in NOT_RUN:
        assert any(re.search(pattern, line) for line in COMMANDS), pattern
