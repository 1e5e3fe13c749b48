"""The `glm` command line: help, exit codes, flags and signals of every command. Logs: test_logs.py."""

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
HELP_CPU_SECONDS = 0.5  # importing torch takes a second
HEAVY = (
    "torch", "transformers", "numpy", "datasets", "peft", "modelscope", "huggingface_hub", "nltk", "jieba",
    "fastapi", "gradio", "streamlit",
)  # fmt: skip
CLEAN_ENVIRONMENT = {
    name: value for name, value in os.environ.items() if name.lower() not in Settings.__dataclass_fields__
}
CLEAN_ENVIRONMENT.pop("PYTHONUNBUFFERED", None)
HELP_ARGUMENTS = [
    ["--help"],
    *([name, "--help"] for name in command.COMMANDS),
    ["data", "check", "--help"],
    ["data", "split", "--help"],
]


def glm(*words, env=None, **options):
    """Run the command as a user does; returns a CompletedProcess with text."""
    arguments = [sys.executable, "-m", "entrypoints", *map(str, words)]
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "cwd": REPOSITORY, **options}
    return subprocess.run(
        arguments, text=True, timeout=120, check=False, env=CLEAN_ENVIRONMENT | (env or {}), **options
    )


@pytest.fixture
def probe(monkeypatch):
    """Register a function, called with (args, settings), as the command `probe`."""

    def register(run):
        module = types.ModuleType("entrypoints.jobs.probe", "A command of the tests.")
        module.add_arguments = lambda parser: parser.add_argument("--some-text", help="a text")
        module.run = run
        monkeypatch.setitem(command.COMMANDS, "probe", "a command of the tests")
        monkeypatch.setitem(sys.modules, module.__name__, module)

    for name in Settings.__dataclass_fields__:
        monkeypatch.delenv(name.upper(), raising=False)
    return register


def test_every_command_is_listed_and_has_a_module():
    assert len(command.COMMANDS) >= 9
    modules = {path.stem for path in (REPOSITORY / "entrypoints" / "jobs").glob("*.py")} - {"__init__"}
    assert set(command.COMMANDS) == modules


@pytest.mark.parametrize("words", HELP_ARGUMENTS, ids=" ".join)
def test_help_takes_less_than_half_a_second(words):
    """CPU time, the best of three processes, so that a busy machine does not matter."""

    def cpu_seconds():
        process = subprocess.Popen(
            [sys.executable, "-m", "entrypoints", *words],
            stdout=subprocess.DEVNULL,
            cwd=REPOSITORY,
            env=CLEAN_ENVIRONMENT,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        return usage.ru_utime + usage.ru_stime

    assert min(cpu_seconds() for _ in range(3)) < HELP_CPU_SECONDS


def test_help_imports_nothing_heavy():
    script = f"""
import sys
from entrypoints.__main__ import main
for words in sorted({HELP_ARGUMENTS}, key=lambda words: words[0] != "data"):
    try:
        main(words)
    except SystemExit as end:
        assert end.code == 0
    heavy = set({HEAVY}) | ({{"tokenizers"}} if words[0] == "data" else set())
    assert not heavy & set(sys.modules), (words, heavy & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", command.COMMANDS)
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
        assert all(action.help or action.metavar == "check|convert|split" for action in flags)
        for flag in (
            each for each in flags if each.option_strings and not each.required and each.help != "==SUPPRESS=="
        ):
            shown = (
                ""
                if flag.default in (argparse.SUPPRESS, None) or flag.default is False
                else f" (default: {flag.default})"
            )
            assert re.search(rf"{flag.option_strings[-1]}\b.*\s+{re.escape(flag.help + shown)}\n", text), flag


def test_the_main_help_lists_every_command_with_a_summary(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    text = capsys.readouterr().out
    for name, line in command.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(line)}$", text, re.MULTILINE)


def test_a_finished_command_exits_with_0(probe):
    probe(lambda args, settings: None)
    assert command.main(["probe"]) == 0


def test_a_user_error_is_one_line_on_stderr_and_exit_code_1(probe, capsys):
    def fail(args, settings):
        raise UserError("row 3 has no text", "give it one")

    probe(fail)
    assert command.main(["probe"]) == 1
    assert capsys.readouterr() == ("", "glm: row 3 has no text; give it one\n")


def test_debug_shows_the_traceback_of_a_user_error():
    words = ("data", "check", "/no/such/file")
    short, long = glm(*words), glm(*words, "--debug")
    assert (short.returncode, long.returncode) == (1, 1)
    assert "Traceback" not in short.stderr
    assert "Traceback" in long.stderr
    assert "UserError" in long.stderr


def test_a_bug_is_not_reported_as_a_user_error(probe):
    def fail(args, settings):
        raise ZeroDivisionError

    probe(fail)
    with pytest.raises(ZeroDivisionError):
        command.main(["probe"])


@pytest.mark.parametrize(
    "words",
    [[], ["nojob"], ["chat", "--nope"], ["chat", "--temperature", "warm"], ["chat", "--temp", "1"], ["verify"],
     ["data"], ["data", "check", "f", "--prompt-col", "x"], ["train", "--fp1"]],
    ids=" ".join,
)  # fmt: skip
def test_wrong_usage_is_exit_code_2_with_the_usage_on_stderr(words, capsys):
    """Abbreviated flags too: their meaning would change with a new flag that starts alike."""
    with pytest.raises(SystemExit) as end:
        command.main(words)
    captured = capsys.readouterr()
    assert end.value.code == 2
    assert captured.out == ""
    assert captured.err.startswith("usage: glm")


def test_an_unknown_command_is_rejected_with_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        command.main(["serv"])
    error = capsys.readouterr().err
    assert all(name in error for name in command.COMMANDS)


def test_ctrl_c_ends_a_running_command_with_130_and_one_line(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")  # reading it blocks
    words = [sys.executable, "-m", "entrypoints", "data", "check", tmp_path / "rows.jsonl"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, env=CLEAN_ENVIRONMENT) as process:
        fifo = os.open(tmp_path / "rows.jsonl", os.O_WRONLY)  # opens when the command reads
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=120)
        os.close(fifo)
    assert process.returncode == 130
    assert stderr == "glm: interrupted\n"


def test_the_reference_names_every_exit_code_in_both_languages():
    """Their causes: the tests above and below."""
    for page in ("README.md", "README.zh-CN.md"):
        text = (REPOSITORY / "entrypoints" / "jobs" / page).read_text(encoding="utf-8")
        sentence = re.split("Exit codes: |退出码：", text)[1].split("\n\n")[0]
        assert re.findall(r"\b(\d+) ?(?:success|user|wrong|inter|termi|成功|用户|用法|被中断|被终止)", sentence) == [
            "0",
            "1",
            "2",
            "130",
            "143",
        ]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_writing_leaves_no_partial_files(number, code, toy_original, tmp_path):
    """The conversion is paused after the weights are written and before the vocabulary is."""
    script = """
import sys, time
from entrypoints import __main__
from entrypoints.checkpoint import native
native.save_tokenizer = lambda *_: (print("written", flush=True), time.sleep(300))
sys.exit(__main__.main(sys.argv[1:]))
"""
    words = [sys.executable, "-c", script, "convert", toy_original, tmp_path / "native"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, text=True, cwd=REPOSITORY, env=CLEAN_ENVIRONMENT, **pipes) as process:
        assert process.stdout.readline() == "written\n"
        assert list(tmp_path.rglob("*.safetensors"))
        process.send_signal(number)
        process.wait(timeout=120)
        assert "Traceback" not in process.stderr.read()
    assert process.returncode == code
    assert list(tmp_path.iterdir()) == []


def test_dashes_and_underscores_in_a_flag_are_equal_and_its_value_is_unchanged(probe):
    seen = []
    probe(lambda args, settings: seen.append(args.some_text))
    for flag in ("--some-text", "--some_text"):
        command.main(["probe", flag, "a_b-c"])
        command.main(["probe", f"{flag}=--a_b"])
    assert seen == ["a_b-c", "--a_b"] * 2


def test_common_flags_can_precede_and_follow_a_subcommand(probe, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"content": "a", "summary": "b"}\n')
    for words in (["--log-level", "error", "check"], ["check", "--log-level", "error"]):
        assert command.main(["data", *words, str(tmp_path / "rows.jsonl")]) == 0
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("env", [{}, {"PYTHONUNBUFFERED": "1"}], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("words", [["--help"], ["data", "check", "entrypoints/demo/ad_copy.jsonl"]], ids=" ".join)
def test_a_closed_pipe_is_not_an_error(words, env):
    """`glm ... | head`: the rest of the output is dropped silently."""
    reading, writing = os.pipe()
    os.close(reading)
    done = glm(*words, env={"LOG_LEVEL": "error", **env}, capture_output=False, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_closed_stdout_is_not_an_error():
    """As a daemon starts a command: file descriptor 1 does not exist."""
    script = f"{sys.executable} -m entrypoints data check entrypoints/demo/ad_copy.jsonl >&- 2>/dev/null"
    assert subprocess.run(script, shell=True, cwd=REPOSITORY, env=CLEAN_ENVIRONMENT, check=False).returncode == 0


def test_the_installed_command_is_the_same_as_the_module():
    script = Path(sys.executable).with_name("glm")
    if not script.is_file():
        pytest.skip(f"the package is not installed next to {sys.executable}")
    installed = subprocess.run([script, "--help"], capture_output=True, text=True, env=CLEAN_ENVIRONMENT, check=True)
    assert installed.stdout == glm("--help").stdout


def test_a_flag_overrides_a_variable_and_a_variable_overrides_the_default(probe, monkeypatch, capsys):
    import logging

    probe(lambda args, settings: logging.getLogger("probe").info("shown"))
    shown = []
    for variable, flags in ((None, []), ("error", []), ("error", ["--log-level", "info"])):
        if variable:
            monkeypatch.setenv("LOG_LEVEL", variable)
        command.main(["probe", *flags])
        shown.append("shown" in capsys.readouterr().err)
    assert shown == [True, False, True]


@pytest.mark.parametrize("name", ["DEVICE", "LOG_FORMAT", "LOG_LEVEL"])
def test_an_invalid_value_is_reported_with_its_variable(name, probe, monkeypatch, capsys):
    probe(lambda args, settings: None)
    monkeypatch.setenv(name, "bogus")
    assert command.main(["probe"]) == 1
    assert f"{name}=bogus" in capsys.readouterr().err
