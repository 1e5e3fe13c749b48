"""`glm chat` in a terminal: a real pseudo-terminal and process, but where the moment of a Ctrl-C decides."""

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
ASKING = b"\n> "
SECONDS = 120
GREEDY = ["--temperature", "0", "--dtype", "float32", "--device", "cpu"]


class Terminal:
    """A process whose controlling terminal we hold."""

    def __init__(self, words, stdout=None):
        self.fd, inner = pty.openpty()
        self.unread = b""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "entrypoints", *map(str, words)],
            stdin=inner, stdout=inner if stdout is None else stdout, stderr=inner, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0), env=os.environ | {"TERM": "xterm"},
        )  # fmt: skip
        os.close(inner)

    def type(self, data):
        os.write(self.fd, data)

    def wait(self, seen):
        """Read until `seen` says that what is unread is enough."""
        end = time.monotonic() + SECONDS
        while not seen(self.unread):
            assert time.monotonic() < end, self.unread.decode(errors="replace")
            assert self.process.poll() is None, self.end()
            if select.select([self.fd], [], [], 1)[0]:
                self.unread += os.read(self.fd, 4096).replace(b"\r", b"")

    def read_until(self, wanted):
        """Wait for `wanted`; returns what came before it."""
        self.wait(lambda unread: wanted in unread)
        before, _, self.unread = self.unread.partition(wanted)
        return before

    def end(self):
        """What it still shows, and its exit code."""
        with contextlib.suppress(OSError):  # EIO: the other side is closed
            while data := os.read(self.fd, 4096):
                self.unread += data
        code = self.process.wait(timeout=SECONDS)
        os.close(self.fd)
        return self.unread, code


@pytest.fixture
def terminal():
    started = []

    def start(*words, stdout=None):
        started.append(Terminal(words, stdout))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.process.kill()
            each.process.wait()


def test_a_talk_goes_on_after_ctrl_c_and_too_long_a_question_until_stop(toy_native, terminal):
    talk = terminal("chat", "--model", toy_native, *GREEDY, "--max-new-tokens", 900)
    assert b"`clear` starts anew, `stop` ends" in talk.read_until(ASKING)
    talk.type("你好\n".encode())
    talk.read_until("你好\n".encode())
    talk.wait(bytes.strip)  # for its first words
    talk.type(CTRL_C)
    assert b"(stopped)" in talk.read_until(ASKING)
    talk.type("裙".encode() * 1200 + b"\n")
    assert b"glm: the prompt has" in talk.read_until(ASKING)
    talk.type(b"clear\n")
    assert b"\033[2J" in talk.read_until(ASKING)
    talk.type(b"stop\n")
    rest, code = talk.end()
    assert (rest.strip(), code) == (b"stop", 0)


def test_ctrl_c_at_the_question_ends_with_130_and_a_redirected_stdout_holds_answers_alone(
    toy_native, tmp_path, terminal, glm
):
    with (tmp_path / "answers.txt").open("wb") as file:
        talk = terminal("chat", "--model", toy_native, *GREEDY, "--max-new-tokens", 4, stdout=file)
        talk.read_until(ASKING)
        talk.type("你好\n".encode())
        talk.read_until(ASKING)
        talk.type(CTRL_C)
        rest, code = talk.end()
    assert code == 130
    assert rest.strip().endswith(b"glm: interrupted")
    expected = glm("chat", "--model", toy_native, "--prompt", "你好", *GREEDY, "--max-new-tokens", 4).out
    assert (tmp_path / "answers.txt").read_text(encoding="utf-8") == expected


class Interrupted:
    """A model that is interrupted before its first word, then answers."""

    def __init__(self):
        self.asked = []

    def reply(self, turns, sampling):
        self.asked.append([turn.content for turn in turns])
        if len(self.asked) == 1:
            raise KeyboardInterrupt
        answer = SimpleNamespace(content="好的", tool_calls=[])
        yield SimpleNamespace(answer=answer, dropped_turns=0), "好的"


@pytest.fixture
def interrupted(monkeypatch):
    model = Interrupted()
    monkeypatch.setattr("entrypoints.conversation.load_chat", lambda *_: model)
    monkeypatch.setattr(chat, "_in_terminal", lambda: True)
    questions = iter(["一", "二", "stop"])
    monkeypatch.setattr(chat, "_typed", lambda: next(questions))
    return model


def test_ctrl_c_before_the_first_word_returns_to_the_question_without_the_lost_one(interrupted, glm):
    """A long prompt is read for seconds before the first word comes."""
    done = glm("chat", "--model", "any")
    assert (done.code, done.out) == (0, "好的\n")
    assert "(stopped)" in done.err
    assert interrupted.asked == [["一"], ["二"]]


def test_ctrl_c_at_a_single_prompt_ends_the_program(interrupted, glm):
    done = glm("chat", "--model", "any", "--prompt", "一")
    assert (done.code, done.out) == (130, "")
