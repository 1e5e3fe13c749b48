"""Rows that are encoded once, by content. Traps F7 and G8 of the list of reported pains."""

import json
import multiprocessing
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from entrypoints.dataset.reading import Columns
from entrypoints.errors import UserError
from entrypoints.prompt import IGNORED, PromptFormat, as_messages
from entrypoints.training import rows
from entrypoints.training.arguments import TrainArguments
from entrypoints.training.batches import RowEncoder


@pytest.fixture
def told(toy_native, tmp_path):
    return TrainArguments(toy_native, tmp_path / "rows.jsonl", tmp_path / "out")


@pytest.fixture
def file(tmp_path) -> Path:
    lines = (json.dumps({"content": f"类型#裙*第{number}条", "summary": "好看。" * number}) for number in range(1, 9))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "rows.jsonl"


def encoder(toy_tokenizer, length=64):
    return RowEncoder(toy_tokenizer, PromptFormat(), length, length)


def made(output):
    return sorted(folder.name for folder in (output / rows.FOLDER).iterdir() if folder.is_dir())


def test_the_same_rows_are_encoded_once_and_others_anew(told, file, toy_tokenizer, caplog):
    caplog.set_level("INFO")
    first = rows.encoded([file], told, encoder(toy_tokenizer))
    again = rows.encoded([file], told, encoder(toy_tokenizer))
    assert first["input_ids"][:] == again["input_ids"][:]
    assert caplog.text.count("8 rows used") == 1
    assert "rows encoded before" in caplog.text
    assert len(made(told.output_dir)) == 1
    rows.encoded([file], told, encoder(toy_tokenizer, 32))
    file.write_text(file.read_text() + '\n{"content": "甲", "summary": "乙"}')
    assert len(rows.encoded([file], told, encoder(toy_tokenizer))) == 9
    assert len(made(told.output_dir)) == 3


def encode(told, file, tokenizer):
    """What each process of a run does."""
    rows.encoded([file], told, encoder(tokenizer))


def test_processes_that_come_at_once_all_get_the_rows_and_one_encodes(told, file, toy_tokenizer):
    """G8: nobody waits in a collective call."""
    spawn = multiprocessing.get_context("spawn")
    started = [spawn.Process(target=encode, args=(told, file, toy_tokenizer)) for _ in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    assert [process.exitcode for process in started] == [0, 0]
    assert len(made(told.output_dir)) == 1


def test_a_killed_encoding_leaves_nothing_that_is_taken_for_rows(told, file, toy_tokenizer):
    half = told.output_dir / rows.FOLDER / "0123.partial"
    half.mkdir(parents=True)
    assert len(rows.encoded([file], told, encoder(toy_tokenizer))) == 8


def test_a_file_that_is_not_there_is_named(told, toy_tokenizer, tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        rows.encoded([tmp_path / "nowhere.jsonl"], told, encoder(toy_tokenizer))


TOOL = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
CONVERSATION = [
    {"role": "system", "content": "查天气", "tools": [TOOL]},
    {"role": "user", "content": "北京天气"},
    {"role": "assistant", "metadata": "get_weather", "content": "```python\ntool_call(city='北京')\n```"},
    {"role": "observation", "content": "31度"},
    {"role": "assistant", "content": "北京31度。"},
]


def test_a_conversation_with_a_tool_is_taught_as_the_api_asks_it(told, toy_tokenizer, tmp_path):
    """F7: one encoder; the row begins with the ids of the API's prompt and goes on with the answer."""
    file = tmp_path / "turns.jsonl"
    other = [{"role": "user", "content": "好"}, {"role": "assistant", "content": "你好。"}]
    file.write_text("\n".join(json.dumps({"conversations": turns}) for turns in (CONVERSATION, other)))
    told = replace(told, columns=Columns(conversations="conversations"))
    found = rows.encoded([file], told, encoder(toy_tokenizer, 512))
    prompt = PromptFormat().encode(as_messages(CONVERSATION[:-1]), toy_tokenizer)
    assert found[0]["input_ids"][: len(prompt)] == prompt
    labels = [label for label in found[0]["labels"] if label != IGNORED]
    assert len(labels) > len(toy_tokenizer.encode("北京31度。")) + len(toy_tokenizer.encode("get_weather"))


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        (CONVERSATION[:-1], "the conversation does not end with an answer"),
        ([*CONVERSATION[:1], {"role": "critic", "content": "x"}], "turn 1 has role 'critic'"),
        ([{"role": "user", "content": "x", "weight": 0}], "turn 0 has an unknown field 'weight'"),
        ([{"role": "user", "content": "x", "tool_calls": [1]}], "turn 0 has tool_calls that are no list on an assis"),
        ([{"role": "system", "content": "x"}, {"role": "assistant", "content": "y"}], "follows no question"),
        ("你好", "is not a list of messages"),
        ([], "the conversation does not end with an answer"),
    ],
)
def test_a_conversation_that_cannot_be_learnt_is_skipped_with_its_reason(turns, reason, told, toy_tokenizer, tmp_path):
    """F7; with --max-skipped 0 it ends the run."""
    file = tmp_path / "turns.jsonl"
    file.write_text("\n".join(json.dumps({"talk": row}) for row in (CONVERSATION, turns)))
    told = replace(told, columns=Columns(conversations="talk"))
    assert len(rows.encoded([file], told, encoder(toy_tokenizer, 512))) == 1
    with pytest.raises(UserError, match="1 rows cannot be used .*1 .*" + re.escape(reason)):
        rows.encoded([file], replace(told, max_skipped=0), encoder(toy_tokenizer, 512))


def test_several_files_are_learnt_one_after_another(told, file, toy_tokenizer, tmp_path):
    (tmp_path / "more.json").write_text(json.dumps([{"content": "甲", "summary": "乙"}]))
    found = rows.encoded([file, tmp_path / "more.json"], told, encoder(toy_tokenizer))
    assert len(found) == 9
    assert found[8]["input_ids"] == rows.encoded([tmp_path / "more.json"], told, encoder(toy_tokenizer))[0]["input_ids"]


def judged(told, lines, toy_tokenizer, most=None, length=64):
    told.train_file.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return rows.encoded([told.train_file], told, encoder(toy_tokenizer, length), most)


GOOD, BAD = {"content": "裙", "summary": "好。"}, {"content": "裙", "summary": ""}


def test_rows_skipped_before_the_limit_is_reached_are_counted_and_logged(told, toy_tokenizer, caplog):
    caplog.set_level("INFO")
    assert len(judged(told, [BAD, GOOD, BAD, GOOD, BAD, GOOD], toy_tokenizer, most=2)) == 2
    assert f"{told.train_file}: 2 rows used, 2 skipped" in caplog.text


def test_rows_skipped_before_the_limit_is_reached_are_judged(told, toy_tokenizer):
    with pytest.raises(UserError, match=r"2 rows cannot be used \(2 empty response\)"):
        judged(replace(told, max_skipped=1), [BAD, GOOD, BAD, GOOD, BAD], toy_tokenizer, most=2)
    assert len(judged(replace(told, max_skipped=2), [BAD, GOOD, BAD, GOOD, BAD], toy_tokenizer, most=2)) == 2
    assert made(told.output_dir) != []


def test_a_limit_of_training_rows_leaves_other_files_whole_and_has_rows_of_its_own(told, file, toy_tokenizer):
    """As preparation.py calls it: the training files with the limit, the validation file without."""
    told = replace(told, max_train_samples=2)
    assert len(rows.encoded([file], told, encoder(toy_tokenizer), told.max_train_samples)) == 2
    assert len(rows.encoded([file], told, encoder(toy_tokenizer))) == 8
    assert len(rows.encoded([file], told, encoder(toy_tokenizer), 3)) == 3
    assert len(made(told.output_dir)) == 3


TOO_LONG = {"talk": [{"role": "system", "content": "规" * 300}, {"role": "user", "content": "裙"}, CONVERSATION[-1]]}
TALK = {"talk": [{"role": "user", "content": "裙"}, CONVERSATION[-1]]}


@pytest.mark.parametrize("lines", [[TOO_LONG, TALK, TALK], [TALK, TOO_LONG, TALK]])
def test_a_row_whose_system_text_exceeds_the_limit_is_skipped_named_and_judged(lines, told, toy_tokenizer, caplog):
    caplog.set_level("INFO")
    told = replace(told, columns=Columns(conversations="talk"))
    assert len(judged(told, lines, toy_tokenizer)) == 2
    line = lines.index(TOO_LONG) + 1
    assert f"skipped rows.jsonl:{line}: max_source_length 64 does not hold the prompt's frame" in caplog.text
    assert f"{told.train_file}: 2 rows used, 1 skipped" in caplog.text
    with pytest.raises(UserError, match=r"1 rows cannot be used \(1 max_source_length 64"):
        judged(replace(told, max_skipped=0), lines, toy_tokenizer)


def test_a_file_of_rows_that_are_all_too_long_is_refused(told, toy_tokenizer):
    told = replace(told, columns=Columns(conversations="talk"))
    with pytest.raises(UserError, match="no usable row: 2 max_source_length 64 does not hold"):
        judged(told, [TOO_LONG, TOO_LONG], toy_tokenizer)
    assert all(folder.endswith(".partial") for folder in made(told.output_dir))


READ = """
import resource, sys
from pathlib import Path
from entrypoints.checkpoint.native import open_native
from entrypoints.prompt import PromptFormat
from entrypoints.training import rows
from entrypoints.training.arguments import TrainArguments
from entrypoints.training.batches import RowEncoder

base, file, output = map(Path, sys.argv[1:])
encoder = RowEncoder(open_native(base).tokenizer, PromptFormat(), 64, 64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = rows.encoded([file], TrainArguments(base, file, output), encoder)
print(len(found), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10)
"""


def test_a_file_larger_than_the_memory_needs_a_small_part_of_it(toy_native, tmp_path):
    """400 MB in 400 rows; read whole they took 800 MB and more, piece by piece some 20."""
    file = tmp_path / "rows.jsonl"
    with file.open("w") as stream:
        for number in range(400):
            stream.write(json.dumps({"content": f"裙{number}", "summary": "好看。", "notes": "x" * 1_000_000}) + "\n")
    words = [sys.executable, "-c", READ, str(toy_native), str(file), str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200)
    file.unlink()
    count, more = map(int, done.stdout.split())
    assert count == 400
    assert more < 100 << 20, done.stderr
