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
from entrypoints.__main__ import JOBS, main
from entrypoints.settings import Settings

REPOSITORY = Path(__file__).resolve().parents[2]
TOKEN = 'hf_QuiteSecret"Token\\1'  # with characters that JSON escapes
VARIABLES = [name.upper() for name in Settings.__dataclass_fields__]


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def say_the_token(monkeypatch):
    """The job `probe` logs the token in every way there is: message, argument, traceback, a library's logger."""

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

    module = types.ModuleType("entrypoints.jobs.probe", "A job of the tests.")
    module.add_arguments, module.run = lambda parser: None, run
    monkeypatch.setitem(JOBS, "probe", "a job of the tests")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def test_json_logs_are_one_object_a_line(say_the_token, monkeypatch, capsys):
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
def test_a_token_never_reaches_a_log(log_format, say_the_token, capsys):
    assert main(["probe", "--log-format", log_format, "--log-level", "debug"]) == 0
    out, err = capsys.readouterr()
    assert err.count("***") == 4
    assert TOKEN not in out + err
    assert json.dumps(TOKEN)[1:-1] not in out + err
    assert "QuiteSecret" not in out + err


def test_text_logs_are_lines_with_time_level_and_logger(say_the_token, capsys):
    main(["probe"])
    assert re.match(r"\d\d:\d\d:\d\d INFO entrypoints\.probe: plain \*\*\*\n", capsys.readouterr().err)


@pytest.mark.parametrize("first", ["logs", "library"])
def test_a_library_cannot_print_past_our_handler(first, capsys):
    """transformers, datasets, huggingface_hub and jieba give themselves a handler when they are imported."""

    def as_transformers_does():
        library = logging.getLogger("transformers")
        library.addHandler(logging.StreamHandler(sys.stderr))
        library.propagate = False

    steps = [lambda: logs.set_up("json", secrets=[TOKEN]), as_transformers_does]
    for step in steps if first == "logs" else reversed(steps):
        step()
    logging.getLogger("transformers.modeling_utils").warning("with %s", TOKEN)
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert json.loads(err)["message"] == "with ***"


def test_libraries_are_quiet_below_a_warning_and_follow_a_stricter_level(capsys):
    logs.set_up(level="debug")
    logging.getLogger("datasets").info("chatter")
    logging.getLogger("entrypoints.x").debug("ours")
    logs.set_up(level="error")
    logging.getLogger("datasets").warning("less chatter")
    assert [line.partition(": ")[2] for line in capsys.readouterr().err.splitlines()] == ["ours"]


def test_no_logger_of_the_real_libraries_keeps_a_handler_of_its_own_and_a_clean_start_says_nothing():
    """bitsandbytes, which PEFT imports, would warn of what a processor with AVX512_BF16 lacks."""
    script = """
import logging
from entrypoints import logs
logs.set_up()
import entrypoints.engines.transformers_engine, entrypoints.training.trainer, peft, huggingface_hub
own = {name for name in logs.LIBRARIES if logging.getLogger(name).handlers or not logging.getLogger(name).propagate}
assert not own, own
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_line_of_a_real_job_is_json_where_json_is_wanted(toy_original, tmp_path):
    """Nobody watches a bar in a log file, and a bar in front of it would spoil the line."""
    env = {name: value for name, value in os.environ.items() if name not in VARIABLES} | {"LOG_FORMAT": "json"}
    words = [sys.executable, "-m", "entrypoints", "convert", toy_original, tmp_path / "native"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=REPOSITORY, env=env, check=True)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert lines
    assert done.stdout == f"{tmp_path / 'native'}\n"
