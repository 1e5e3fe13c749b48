"""Logs go to stderr through one handler, as text or JSON lines, without secrets."""

import json
import logging
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from entrypoints import logs
from entrypoints.__main__ import COMMANDS, main
from entrypoints.settings import Settings

REPOSITORY = Path(__file__).resolve().parents[2]
TOKEN = 'hf_QuiteSecret"Token\\1'  # with characters that JSON escapes
VARIABLES = [name.upper() for name in Settings.__dataclass_fields__]


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def log_the_token(monkeypatch):
    """The command `probe` logs the token in a message, an argument, a traceback and a library's logger."""

    def run(args, settings):
        logger = logging.getLogger("entrypoints.probe")
        token = settings.hf_token.value
        logger.info(f"plain {token}")
        logger.warning("argument %s, 你好\nand a second line", token)
        try:
            raise ValueError(f"no entry for {token}")
        except ValueError:
            logger.exception("failed")
        logging.getLogger("huggingface_hub.file_download").warning("GET with %s", token)

    module = types.ModuleType("entrypoints.jobs.probe", "A command of the tests.")
    module.add_arguments, module.run = lambda parser: None, run
    monkeypatch.setitem(COMMANDS, "probe", "a command of the tests")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def test_json_logs_are_one_object_per_line(log_the_token, monkeypatch, capsys):
    monkeypatch.setenv("LOG_FORMAT", "json")
    assert main(["probe"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    lines = [json.loads(line) for line in err.splitlines()]
    assert [line["level"] for line in lines] == ["info", "warning", "error", "warning"]
    assert {"time", "level", "logger", "message"} <= set(lines[0])
    assert lines[1]["message"] == "argument ***, 你好\nand a second line"
    assert "ValueError: no entry for ***" in lines[2]["exception"]
    assert lines[3]["logger"] == "huggingface_hub.file_download"


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_token_never_reaches_a_log(log_format, log_the_token, capsys):
    assert main(["probe", "--log-format", log_format, "--log-level", "debug"]) == 0
    out, err = capsys.readouterr()
    assert err.count("***") == 4
    assert TOKEN not in out + err
    assert json.dumps(TOKEN)[1:-1] not in out + err
    assert "QuiteSecret" not in out + err


def test_text_logs_are_lines_with_time_level_and_logger(log_the_token, capsys):
    main(["probe"])
    assert re.match(r"\d\d:\d\d:\d\d INFO entrypoints\.probe: plain \*\*\*\n", capsys.readouterr().err)


@pytest.mark.parametrize("first", ["logs", "library"])
def test_a_library_cannot_bypass_the_root_handler(first, capsys):
    """transformers, datasets, huggingface_hub and jieba add a handler to their logger when they are imported."""

    def as_transformers_does():
        library = logging.getLogger("transformers")
        library.addHandler(logging.StreamHandler(sys.stderr))
        library.propagate = False

    steps = [lambda: logs.configure("json", secrets=[TOKEN]), as_transformers_does]
    for step in steps if first == "logs" else reversed(steps):
        step()
    logging.getLogger("transformers.modeling_utils").warning("with %s", TOKEN)
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert json.loads(err)["message"] == "with ***"


def test_libraries_log_from_warning_on_or_from_a_stricter_level(capsys):
    logs.configure(level="debug")
    logging.getLogger("datasets").info("chatter")
    logging.getLogger("entrypoints.x").debug("ours")
    logs.configure(level="error")
    logging.getLogger("datasets").warning("less chatter")
    assert [line.partition(": ")[2] for line in capsys.readouterr().err.splitlines()] == ["ours"]


@pytest.mark.slow
def test_no_library_logger_keeps_a_handler_and_a_clean_start_logs_nothing():
    """bitsandbytes, which PEFT imports, would warn about a kernel that CPUs with AVX512_BF16 lack."""
    script = """
import logging
from entrypoints import logs
logs.configure()
import entrypoints.engines.transformers.engine, entrypoints.training.run, peft, huggingface_hub
own = {name for name in logs.LIBRARIES if logging.getLogger(name).handlers or not logging.getLogger(name).propagate}
assert not own, own
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_line_of_a_real_command_is_json_in_json_mode(tmp_path):
    """There is no progress bar in JSON mode: it would break the lines of a log file."""
    env = {name: value for name, value in os.environ.items() if name not in VARIABLES} | {"LOG_FORMAT": "json"}
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"content": "你好", "summary": "你好！"}\n', encoding="utf-8")
    words = [sys.executable, "-m", "entrypoints", "data", "check", rows]
    done = subprocess.run(words, capture_output=True, text=True, cwd=REPOSITORY, env=env, check=True)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert lines
    assert done.stdout.startswith(f"{rows}: 1 rows")
