"""`glm chat` in a terminal: a pseudo-terminal and a process, or a fake model where the moment of Ctrl-C matters."""

import contextlib
import fcntl
import os
import pty
import select
import subprocess
import sys
import termios
import time
from types import SimpleNamespace

import pytest

from entrypoints.jobs import chat

CTRL_C = b"\x03"
PROMPT = b"\n> "
SECONDS = 120
GREEDY = ["--temperature", "0", "--dtype", "float32", "--device", "cpu"]


class Terminal:
    """A process with a pseudo-terminal as its controlling terminal."""

    def __init__(self, arguments, stdout=None, env=None):
        self.fd, inner = pty.openpty()
        self.unread = b""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "entrypoints", *map(str, arguments)],
            stdin=inner, stdout=inner if stdout is None else stdout, stderr=inner, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0), env=os.environ | {"TERM": "xterm"} | (env or {}),
        )  # fmt: skip
        os.close(inner)

    def type(self, data):
        os.write(self.fd, data)

    def wait(self, seen):
        """Read until `seen(unread output)` is true."""
        end = time.monotonic() + SECONDS
        while not seen(self.unread):
            assert time.monotonic() < end, self.unread.decode(errors="replace")
            assert self.process.poll() is None, self.end()
            if select.select([self.fd], [], [], 1)[0]:
                self.unread += os.read(self.fd, 4096).replace(b"\r", b"")

    def read_until(self, wanted):
        """Wait for `wanted`; returns the output before it."""
        self.wait(lambda unread: wanted in unread)
        before, _, self.unread = self.unread.partition(wanted)
        return before

    def end(self):
        """The rest of the output, and the exit code."""
        with contextlib.suppress(OSError):  # EIO: the other side is closed
            while data := os.read(self.fd, 4096):
                self.unread += data
        code = self.process.wait(timeout=SECONDS)
        os.close(self.fd)
        return self.unread, code


@pytest.fixture
def terminal():
    started = []

    def start(*arguments, stdout=None, env=None):
        started.append(Terminal(arguments, stdout, env))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.process.kill()
            each.process.wait()


@pytest.mark.slow
def test_a_conversation_continues_after_ctrl_c_and_a_question_that_is_too_long_until_stop(toy_native, terminal):
    session = terminal("chat", "--model", toy_native, *GREEDY, "--max-new-tokens", 900)
    assert b"`clear` starts a new conversation, `stop` ends" in session.read_until(PROMPT)
    session.type("你好\n".encode())
    session.read_until("你好\n".encode())
    session.wait(bytes.strip)  # for the first token
    session.type(CTRL_C)
    assert b"(stopped)" in session.read_until(PROMPT)
    session.type("裙".encode() * 1200 + b"\n")
    assert b"glm: the prompt has" in session.read_until(PROMPT)
    session.type(b"clear\n")
    assert b"\033[2J" in session.read_until(PROMPT)
    session.type(b"stop\n")
    rest, code = session.end()
    assert (rest.strip(), code) == (b"stop", 0)


@pytest.mark.slow
def test_ctrl_c_at_the_prompt_ends_with_130_and_a_redirected_stdout_contains_only_answers(
    toy_native, tmp_path, terminal, glm
):
    with (tmp_path / "answers.txt").open("wb") as file:
        session = terminal("chat", "--model", toy_native, *GREEDY, "--max-new-tokens", 4, stdout=file)
        session.read_until(PROMPT)
        session.type("你好\n".encode())
        session.read_until(PROMPT)
        session.type(CTRL_C)
        rest, code = session.end()
    assert code == 130
    assert rest.strip().endswith(b"glm: interrupted")
    expected = glm("chat", "--model", toy_native, "--prompt", "你好", *GREEDY, "--max-new-tokens", 4).out
    assert (tmp_path / "answers.txt").read_text(encoding="utf-8") == expected


class Interrupted:
    """A model that is interrupted before its first token, then answers."""

    def __init__(self):
        self.questions = []

    def reply(self, turns, sampling):
        self.questions.append([turn.content for turn in turns])
        if len(self.questions) == 1:
            raise KeyboardInterrupt
        answer = SimpleNamespace(content="好的", tool_calls=[])
        yield SimpleNamespace(answer=answer, dropped_turns=0), "好的"


@pytest.fixture
def interrupted(monkeypatch):
    conversation = Interrupted()
    monkeypatch.setattr("entrypoints.chat_session.load_chat", lambda *_: conversation)
    monkeypatch.setattr(chat, "_in_terminal", lambda: True)
    questions = iter(["一", "二", "stop"])
    monkeypatch.setattr(chat, "_read_line", lambda: next(questions))
    return conversation


def test_ctrl_c_before_the_first_token_returns_to_the_prompt_without_the_interrupted_question(interrupted, glm):
    """The prefill of a long prompt takes seconds."""
    done = glm("chat", "--model", "any")
    assert (done.code, done.out) == (0, "好的\n")
    assert "(stopped)" in done.err
    assert interrupted.questions == [["一"], ["二"]]


def test_ctrl_c_at_a_single_prompt_ends_the_program(interrupted, glm):
    done = glm("chat", "--model", "any", "--prompt", "一")
    assert (done.code, done.out) == (130, "")


@pytest.mark.parametrize("env", [{"LC_ALL": "C"}, {"LC_ALL": "POSIX", "PYTHONUTF8": "0"}], ids=["C", "POSIX"])
def test_chinese_can_be_typed_in_every_locale(toy_gguf, terminal, env):
    """The bytes were taken for key codes: readline offered file names as completions."""
    session = terminal("chat", "--model", toy_gguf, "--max-new-tokens", 1, "--json", "--temperature", 0, env=env)
    session.read_until(PROMPT)
    session.type("你好\x7f们\tb\n".encode())
    answer = session.read_until(PROMPT).decode()
    assert '"prompt": "你们\\tb"' in answer
    session.type(b"stop\n")
    assert session.end()[1] == 0


@pytest.mark.parametrize("env", [{"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}], ids=["UTF-8 mode", "ASCII"])
def test_pipes_and_flags_are_utf_8_in_every_locale(toy_gguf, env):
    flags = ["--json", "--max-new-tokens", "1", "--temperature", "0"]
    argv = [sys.executable, "-m", "entrypoints", "chat", "--model", toy_gguf, *flags]
    done = {"capture_output": True, "env": os.environ | env, "timeout": SECONDS}
    piped = subprocess.run([*argv, "--system", "甲"], input="你好\n".encode(), **done, check=True)
    flag = subprocess.run([*argv, "--system", "甲", "--prompt", "你好"], **done, check=True)
    assert piped.stdout == flag.stdout
    assert '"prompt": "你好"' in piped.stdout.decode()
    gbk = subprocess.run(argv, input="你好\n".encode("gbk"), **done, check=True)
    assert "the input is not UTF-8: " in gbk.stderr.decode()
    assert subprocess.run([*argv, "--prompt", "你好".encode("gbk")], **done, check=False).returncode == 1
