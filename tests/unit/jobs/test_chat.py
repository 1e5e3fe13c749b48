"""`glm chat` without a terminal: one --prompt, or the lines of a pipe. The terminal: test_chat_terminal.py."""

import io
import json
import os
import shutil
import subprocess
import sys

import pytest

from entrypoints.chat_format.prompt import Message
from entrypoints.checkpoint.prompt_file import read_prompt_format
from entrypoints.checkpoint.tokenizer import load_tokenizer

GREEDY = ("--temperature", 0, "--dtype", "float32", "--device", "cpu")
SHORT = (*GREEDY, "--max-new-tokens", 4)
ERROR_SECONDS = 3


@pytest.fixture
def piped(glm, toy_native, monkeypatch):
    """Runs `glm chat --json` with bytes on standard input; returns the printed objects, and stderr."""

    def run(data, *arguments):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        done = glm("chat", "--model", toy_native, "--json", *arguments)
        assert done.code == 0
        return [json.loads(line) for line in done.out.splitlines()], done.err

    return run


def answer_of(glm, model, *arguments):
    done = glm("chat", "--model", model, "--json", *arguments)
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_a_prompt_is_answered_once_and_stdout_contains_only_the_answer(toy_native, glm):
    expected = answer_of(glm, toy_native, "--prompt", "你好", *SHORT)
    assert expected["response"]
    done = glm("chat", "--model", toy_native, "--prompt", "你好", *SHORT)
    assert (done.code, done.out) == (0, expected["response"] + "\n")


def test_json_describes_an_answer_completely(toy_native, glm):
    answer = answer_of(glm, toy_native, "--prompt", "你好", *SHORT)
    assert answer == {
        "prompt": "你好",
        "response": answer["response"],
        "tool_calls": [],
        "finish_reason": "length",
        "prompt_tokens": answer["prompt_tokens"],
        "completion_tokens": 4,
        "dropped_turns": 0,
    }


def test_each_line_of_a_pipe_is_a_question_with_the_earlier_ones_as_history(toy_native, piped):
    answers, _ = piped("你好\n\n  你是谁  \n".encode(), *SHORT)
    assert [answer["prompt"] for answer in answers] == ["你好", "你是谁"]
    turns = [Message("user", "你好"), Message("assistant", answers[0]["response"]), Message("user", "你是谁")]
    prompt = read_prompt_format(toy_native).encode(turns, load_tokenizer(toy_native))
    assert answers[1]["prompt_tokens"] == len(prompt)


def test_clear_starts_a_new_conversation_and_keeps_the_system_prompt(toy_native, piped):
    answers, _ = piped("你好\nclear\n你好\n".encode(), *SHORT, "--system", "你是导购")
    assert len(answers) == 2
    assert answers[0] == answers[1]
    turns = [Message("system", "你是导购"), Message("user", "你好")]
    prompt = read_prompt_format(toy_native).encode(turns, load_tokenizer(toy_native))
    assert answers[1]["prompt_tokens"] == len(prompt)


def test_stop_ends_the_conversation(piped):
    answers, _ = piped("你好\nstop\n你是谁\n".encode(), *SHORT)
    assert [answer["prompt"] for answer in answers] == ["你好"]


def test_invalid_utf8_in_a_pipe_does_not_end_the_conversation(piped):
    answers, _ = piped(b"\xff\xfe\xe4\xbd\n" + "你好".encode(), *SHORT)
    assert [answer["prompt"] for answer in answers] == ["\ufffd" * 3, "你好"]


def test_chinese_is_read_and_printed_correctly_in_a_c_locale(toy_gguf):
    removed = ("LC_", "LANG", "PYTHONUTF8", "PYTHONIOENCODING")
    env = {name: value for name, value in os.environ.items() if not name.startswith(removed)} | {"LANG": "C"}
    flags = ["--json", "--temperature", "0", "--max-new-tokens", "4"]
    arguments = [sys.executable, "-m", "entrypoints", "chat", "--model", toy_gguf, *flags]
    data = "连衣裙\n".encode() + b"\xff\n"
    done = subprocess.run(arguments, input=data, capture_output=True, env=env, check=True)
    assert [json.loads(line)["prompt"] for line in done.stdout.splitlines()] == ["连衣裙", "\ufffd"]
    assert "连衣裙".encode() in done.stdout


def test_a_closed_standard_input_ends_the_conversation_and_does_not_affect_a_prompt(toy_native, monkeypatch, glm):
    monkeypatch.setattr("sys.stdin", None)  # what `<&-` leaves
    assert glm("chat", "--model", toy_native, *SHORT).out == ""
    assert answer_of(glm, toy_native, "--prompt", "你好", *SHORT)["response"]


def test_temperature_zero_gives_the_same_answer_twice(toy_native, glm):
    arguments = ("--prompt", "你好", "--max-new-tokens", 16, *GREEDY)
    assert answer_of(glm, toy_native, *arguments) == answer_of(glm, toy_native, *arguments)


def test_the_same_seed_repeats_an_answer_and_another_seed_changes_it(toy_native, glm):
    def response(seed):
        arguments = ("--prompt", "你好", "--max-new-tokens", 12, "--temperature", 1, "--top-p", 1, "--seed", seed)
        return answer_of(glm, toy_native, *arguments)["response"]

    assert response(7) == response(7)
    assert response(7) != response(8)


@pytest.mark.slow
def test_a_history_that_is_too_long_loses_its_oldest_turns_with_a_warning(toy_native, piped):
    """The context length is 1024, so that about nine questions of 100 tokens fit."""
    question = "裙" * 100
    answers, err = piped((question + "\n").encode() * 12, *SHORT, "--system", "你是导购")
    dropped = [answer["dropped_turns"] for answer in answers]
    assert dropped[0] == 0
    assert dropped[-1] >= 2
    assert max(answer["prompt_tokens"] for answer in answers) <= 1024 - 4
    assert f"the {dropped[-1]} oldest turns were omitted" in err
    assert all(answer["response"] for answer in answers)


@pytest.mark.slow
def test_the_model_and_the_adapter_come_from_the_environment_and_flags_override_it(
    golden, golden_native, tmp_path, monkeypatch, glm
):
    glm("convert", golden / "original-tiny-ptuning", tmp_path / "prefix")
    arguments = ("--prompt", "你好", "--json", *SHORT)
    plain, adapted = (
        glm("chat", "--model", golden_native, *arguments, *flags).out
        for flags in ((), ("--adapter", tmp_path / "prefix"))
    )
    assert plain != adapted
    monkeypatch.setenv("MODEL_PATH", str(golden_native))
    assert glm("chat", *arguments).out == plain
    monkeypatch.setenv("ADAPTER_PATH", str(tmp_path / "prefix"))
    assert glm("chat", *arguments).out == adapted
    monkeypatch.setenv("MODEL_PATH", "/no/such/model")
    assert glm("chat", "--model", golden_native, *arguments).out == adapted


def test_verify_checks_the_files_before_loading(toy_native, tmp_path, glm):
    folder = shutil.copytree(toy_native, tmp_path / "native")
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert glm("chat", "--model", folder, "--prompt", "你好", *SHORT).code == 0
    error = glm("chat", "--model", folder, "--prompt", "你好", *SHORT, "--verify").mistake()
    assert "model.safetensors does not match its SHA-256" in error


def test_a_missing_model_flag_is_a_user_error(glm):
    assert "--model" in glm("chat", "--prompt", "你好").mistake()


@pytest.mark.parametrize(
    "arguments",
    [("--temperature", -1), ("--temperature", "nan"), ("--top-p", -0.1), ("--top-k", 0), ("--max-new-tokens", 0),
     ("--repetition-penalty", 0)],
    ids=str,
)  # fmt: skip
def test_a_number_out_of_bounds_is_named(arguments, toy_native, glm):
    error = glm("chat", "--model", toy_native, "--prompt", "你好", *arguments).mistake()
    assert arguments[0].removeprefix("--").replace("-", "_") in error


def test_too_long_a_question_is_refused_with_both_numbers(toy_native, glm):
    error = glm("chat", "--model", toy_native, "--prompt", "裙" * 5000, *SHORT).mistake()
    assert "tokens" in error
    assert "1020 fit" in error


def test_a_question_that_is_too_long_in_a_pipe_ends_with_a_user_error(toy_native, monkeypatch, glm):
    """A script must notice it; the answers before it are on stdout."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(("你好\n" + "裙" * 5000).encode()), encoding="utf-8"))
    done = glm("chat", "--model", toy_native, "--json", *SHORT)
    assert done.code == 1
    assert len(done.out.splitlines()) == 1
    assert len([line for line in done.err.splitlines() if line.startswith("glm: ")]) == 1


def unusable(what, toy_original, toy_native, tmp_path):
    """Flags that name an unusable model, and the expected part of the message."""
    folder = tmp_path / "native"
    if what == "nowhere":
        return ("--model", "/no/such/model"), "folder not found: /no/such/model"
    if what == "original":
        return ("--model", toy_original), "convert it first: glm convert"
    shutil.copytree(toy_native, folder)
    if what == "no weights":
        (folder / "model.safetensors").unlink()
        return ("--model", folder), "model.safetensors is missing"
    if what == "cut short":
        with (folder / "model.safetensors").open("r+b") as weights:
            weights.truncate(10_000)
        return ("--model", folder), "model.safetensors has 10000 bytes"
    if what == "no vocabulary":
        (folder / "manifest.json").unlink()
        (folder / "tokenizer.json").unlink()
        return ("--model", folder), "tokenizer.json"
    if what == "another template":
        (folder / "manifest.json").unlink()
        (folder / "prompt.json").write_text('{"template": "llama"}')
        return ("--model", folder), "unknown prompt template 'llama'"
    return ("--model", folder, "--adapter", toy_native), "adapter_config.json"


KINDS = ["nowhere", "original", "no weights", "cut short", "no vocabulary", "another template", "no adapter"]


@pytest.mark.parametrize("what", KINDS)
def test_an_unusable_model_is_one_line_that_names_the_cause(what, toy_original, toy_native, tmp_path, glm):
    arguments, cause = unusable(what, toy_original, toy_native, tmp_path)
    assert cause in glm("chat", *arguments, "--prompt", "你好").mistake()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["original", "cut short"])
def test_a_user_error_takes_less_than_three_seconds(what, toy_original, toy_native, tmp_path):
    """CPU time: transformers, whose import takes two seconds, is not needed to find it."""
    arguments, _ = unusable(what, toy_original, toy_native, tmp_path)
    command = [sys.executable, "-m", "entrypoints", "chat", *map(str, arguments), "--prompt", "你好"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 1
    assert usage.ru_utime + usage.ru_stime < ERROR_SECONDS
