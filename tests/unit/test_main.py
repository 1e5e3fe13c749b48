"""What the `glm` command promises for every job: help, exit codes, flags and signals. Logs: test_logs.py."""

import argparse
import importlib
import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

from entrypoints import __main__ as command
from entrypoints.errors import UserError
from entrypoints.settings import Settings

REPOSITORY = Path(__file__).resolve().parents[2]
HELP_SECONDS = 0.5  # of processor time; torch alone takes a second
HEAVY = ("torch", "transformers", "datasets", "peft", "modelscope", "huggingface_hub", "fastapi", "gradio", "streamlit")
BARE = {name: value for name, value in os.environ.items() if name.lower() not in Settings.__dataclass_fields__}
BARE.pop("PYTHONUNBUFFERED", None)
HELPS = [
    ["--help"],
    *([job, "--help"] for job in command.JOBS),
    ["data", "check", "--help"],
    ["data", "split", "--help"],
]


def glm(*words, env=None, **options):
    """Run the command as a user does; a CompletedProcess with text."""
    arguments = [sys.executable, "-m", "entrypoints", *map(str, words)]
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "cwd": REPOSITORY, **options}
    return subprocess.run(arguments, text=True, timeout=120, check=False, env=BARE | (env or {}), **options)


@pytest.fixture
def job(monkeypatch):
    """Make a function the job `probe`, called with (args, settings)."""

    def make(run):
        module = types.ModuleType("entrypoints.jobs.probe", "A job of the tests.")
        module.add_arguments = lambda parser: parser.add_argument("--some-text", help="of the probe")
        module.run = run
        monkeypatch.setitem(command.JOBS, "probe", "a job of the tests")
        monkeypatch.setitem(sys.modules, module.__name__, module)

    for name in Settings.__dataclass_fields__:
        monkeypatch.delenv(name.upper(), raising=False)
    return make


def test_every_job_is_listed_and_has_a_module():
    assert len(command.JOBS) >= 9
    modules = {path.stem for path in (REPOSITORY / "entrypoints" / "jobs").glob("*.py")} - {"__init__"}
    assert set(command.JOBS) == modules


@pytest.mark.parametrize("words", HELPS, ids=" ".join)
def test_help_takes_less_than_half_a_second(words):
    """Processor time of the best of three processes: a busy machine is not the command's fault."""

    def seconds():
        process = subprocess.Popen(
            [sys.executable, "-m", "entrypoints", *words], stdout=subprocess.DEVNULL, cwd=REPOSITORY, env=BARE
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        return usage.ru_utime + usage.ru_stime

    assert min(seconds() for _ in range(3)) < HELP_SECONDS


def test_help_imports_nothing_heavy():
    script = f"""
import sys
from entrypoints.__main__ import main
for words in {HELPS}:
    try:
        main(words)
    except SystemExit as end:
        assert end.code == 0
    found = set({HEAVY}) & set(sys.modules)
    assert not found, (words, found)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", command.JOBS)
def test_help_is_in_english_and_explains_every_flag_with_its_default(name, monkeypatch, capsys):
    monkeypatch.setenv("LANGUAGE", "zh_CN")
    monkeypatch.setenv("COLUMNS", "1000")
    parser = argparse.ArgumentParser()
    importlib.import_module(f"entrypoints.jobs.{name}").add_arguments(parser)
    actions = {(name,): parser._actions}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            actions |= {(name, word): below._actions for word, below in action.choices.items()}
    for words, flags in actions.items():
        with pytest.raises(SystemExit):
            command.main([*words, "--help"])
        text = capsys.readouterr().out
        assert text.isascii()
        assert all(action.help or action.metavar == "check|split" for action in flags)
        for flag in (
            each for each in flags if each.option_strings and not each.required and each.help != "==SUPPRESS=="
        ):
            shown = "" if flag.default == argparse.SUPPRESS else f" (default: {flag.default})"
            assert re.search(rf"{flag.option_strings[-1]}\b.*\s+{re.escape(flag.help + shown)}\n", text), flag


def test_the_help_of_the_command_lists_every_job_with_a_line(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    text = capsys.readouterr().out
    for name, line in command.JOBS.items():
        assert re.search(rf"^  {name} +{re.escape(line)}$", text, re.MULTILINE)


def test_exit_code_0_is_what_a_finished_job_returns(job):
    job(lambda args, settings: None)
    assert command.main(["probe"]) == 0


def test_a_mistake_is_one_line_on_stderr_and_exit_code_1(job, capsys):
    def fail(args, settings):
        raise UserError("row 3 has no text", "give it one")

    job(fail)
    assert command.main(["probe"]) == 1
    assert capsys.readouterr() == ("", "glm: row 3 has no text; give it one\n")


def test_debug_brings_the_traceback_of_a_mistake():
    words = ("data", "check", "/no/such/file")
    short, long = glm(*words), glm(*words, "--debug")
    assert (short.returncode, long.returncode) == (1, 1)
    assert "Traceback" not in short.stderr
    assert "Traceback" in long.stderr
    assert "UserError" in long.stderr


def test_a_defect_of_ours_is_not_dressed_up_as_a_mistake(job):
    def fail(args, settings):
        raise ZeroDivisionError

    job(fail)
    with pytest.raises(ZeroDivisionError):
        command.main(["probe"])


@pytest.mark.parametrize(
    "words",
    [[], ["nojob"], ["chat", "--nope"], ["chat", "--temperature", "warm"], ["chat", "--temp", "1"], ["verify"],
     ["data"], ["data", "check", "f", "--prompt-col", "x"], ["train", "--fp16"]],
    ids=" ".join,
)  # fmt: skip
def test_wrong_usage_is_exit_code_2_with_the_usage_on_stderr(words, capsys):
    """Shortened flags too: what they mean would change with the next flag that begins alike."""
    with pytest.raises(SystemExit) as end:
        command.main(words)
    captured = capsys.readouterr()
    assert end.value.code == 2
    assert captured.out == ""
    assert captured.err.startswith("usage: glm")


def test_an_unknown_job_is_told_which_jobs_there_are(capsys):
    with pytest.raises(SystemExit):
        command.main(["serv"])
    told = capsys.readouterr().err
    assert all(name in told for name in command.JOBS)


def test_ctrl_c_ends_a_running_job_with_130_and_one_line(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")  # reading it waits for ever
    words = [sys.executable, "-m", "entrypoints", "data", "check", tmp_path / "rows.jsonl"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, env=BARE) as process:
        fifo = os.open(tmp_path / "rows.jsonl", os.O_WRONLY)  # opens once the job is reading
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=120)
        os.close(fifo)
    assert process.returncode == 130
    assert stderr == "glm: interrupted\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_middle_of_writing_leaves_nothing_half_written(number, code, toy_original, tmp_path):
    """The conversion is held where its weights are written and its vocabulary is not."""
    script = """
import sys, time
from entrypoints import __main__
from entrypoints.checkpoint import native
native.save_tokenizer = lambda *_: (print("written", flush=True), time.sleep(300))
sys.exit(__main__.main(sys.argv[1:]))
"""
    words = [sys.executable, "-c", script, "convert", toy_original, tmp_path / "native"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, text=True, cwd=REPOSITORY, env=BARE, **pipes) as process:
        assert process.stdout.readline() == "written\n"
        assert list(tmp_path.rglob("*.safetensors"))
        process.send_signal(number)
        process.wait(timeout=120)
        assert "Traceback" not in process.stderr.read()
    assert process.returncode == code
    assert list(tmp_path.iterdir()) == []


def test_dashes_and_underscores_in_a_flag_are_the_same_and_its_value_is_left_alone(job):
    seen = []
    job(lambda args, settings: seen.append(args.some_text))
    for flag in ("--some-text", "--some_text"):
        command.main(["probe", flag, "a_b-c"])
        command.main(["probe", f"{flag}=--a_b"])
    assert seen == ["a_b-c", "--a_b"] * 2


def test_common_flags_may_stand_before_and_after_a_jobs_own_words(job, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"content": "a", "summary": "b"}\n')
    for words in (["--log-level", "error", "check"], ["check", "--log-level", "error"]):
        assert command.main(["data", *words, str(tmp_path / "rows.jsonl")]) == 0
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("env", [{}, {"PYTHONUNBUFFERED": "1"}], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("words", [["--help"], ["data", "check", "entrypoints/demo/ad_copy.jsonl"]], ids=" ".join)
def test_a_reader_that_goes_away_is_no_error(words, env):
    """`glm ... | head`: what the pipe no longer takes is dropped, quietly."""
    reading, writing = os.pipe()
    os.close(reading)
    done = glm(*words, env={"LOG_LEVEL": "error", **env}, capture_output=False, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_closed_stdout_is_no_error():
    """A daemon's way to start a job: file descriptor 1 is not there at all."""
    script = f"{sys.executable} -m entrypoints data check entrypoints/demo/ad_copy.jsonl >&- 2>/dev/null"
    assert subprocess.run(script, shell=True, cwd=REPOSITORY, env=BARE, check=False).returncode == 0


def test_the_installed_command_is_the_same_as_the_module():
    script = Path(sys.executable).with_name("glm")
    if not script.is_file():
        pytest.skip(f"the package is not installed beside {sys.executable}")
    installed = subprocess.run([script, "--help"], capture_output=True, text=True, env=BARE, check=True)
    assert installed.stdout == glm("--help").stdout


def test_importing_does_nothing():
    """No environment, no logging, no signal, no torch: everything happens in main()."""
    script = f"""
import importlib, logging, os, pkgutil, signal, sys
environment, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
import entrypoints, entrypoints.jobs, entrypoints.__main__
names = [module.name for module in pkgutil.iter_modules(entrypoints.jobs.__path__)]
for name in names:
    importlib.import_module("entrypoints.jobs." + name)
assert len(names) >= 9
assert dict(os.environ) == environment
assert signal.getsignal(signal.SIGTERM) == handler
assert logging.getLogger().handlers == []
assert not set({HEAVY}) & set(sys.modules), set({HEAVY}) & set(sys.modules)
assert callable(entrypoints.load_chat)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_the_package_offers_load_chat_and_nothing_else():
    import entrypoints

    assert entrypoints.__all__ == ["load_chat"]
    with pytest.raises(AttributeError, match="no attribute 'load_model'"):
        _ = entrypoints.load_model


def test_a_flag_beats_a_variable_and_a_variable_beats_the_default(job, monkeypatch, capsys):
    import logging

    job(lambda args, settings: logging.getLogger("probe").info("shown"))
    shown = []
    for variable, flags in ((None, []), ("error", []), ("error", ["--log-level", "info"])):
        if variable:
            monkeypatch.setenv("LOG_LEVEL", variable)
        command.main(["probe", *flags])
        shown.append("shown" in capsys.readouterr().err)
    assert shown == [True, False, True]


@pytest.mark.parametrize("name", ["DEVICE", "LOG_FORMAT", "LOG_LEVEL"])
def test_a_value_that_is_not_understood_names_its_variable(name, job, monkeypatch, capsys):
    job(lambda args, settings: None)
    monkeypatch.setenv(name, "bogus")
    assert command.main(["probe"]) == 1
    assert f"{name}=bogus" in capsys.readouterr().err
