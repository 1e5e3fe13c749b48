"""The cache of encoded rows: keyed by content, built once, with counts of skipped rows."""

import json
import multiprocessing
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from entrypoints.chat_format.prompt import IGNORE_INDEX, PromptFormat, as_messages
from entrypoints.dataset.columns import Columns
from entrypoints.errors import UserError
from entrypoints.training.arguments import TrainArguments
from entrypoints.training.rows import encoded_rows
from entrypoints.training.rows.collation import RowEncoder


@pytest.fixture
def arguments(toy_native, tmp_path):
    return TrainArguments(toy_native, tmp_path / "rows.jsonl", tmp_path / "out")


@pytest.fixture
def file(tmp_path) -> Path:
    lines = (json.dumps({"content": f"类型#裙*第{number}条", "summary": "好看。" * number}) for number in range(1, 9))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "rows.jsonl"


def encoder(toy_tokenizer, length=64):
    return RowEncoder(toy_tokenizer, PromptFormat(), length, length)


def cached(output):
    return sorted(folder.name for folder in (output / encoded_rows.FOLDER).iterdir() if folder.is_dir())


def test_the_same_rows_are_encoded_once_and_changed_rows_again(arguments, file, toy_tokenizer, caplog):
    caplog.set_level("INFO")
    first = encoded_rows.load_encoded_rows([file], arguments, encoder(toy_tokenizer))
    again = encoded_rows.load_encoded_rows([file], arguments, encoder(toy_tokenizer))
    assert first["input_ids"][:] == again["input_ids"][:]
    assert caplog.text.count("8 rows used") == 1
    assert "using the cached encoded rows" in caplog.text
    assert len(cached(arguments.output_dir)) == 1
    encoded_rows.load_encoded_rows([file], arguments, encoder(toy_tokenizer, 32))
    file.write_text(file.read_text() + '\n{"content": "甲", "summary": "乙"}')
    assert len(encoded_rows.load_encoded_rows([file], arguments, encoder(toy_tokenizer))) == 9
    assert len(cached(arguments.output_dir)) == 3


def encode(arguments, file, tokenizer):
    """Run in each process."""
    encoded_rows.load_encoded_rows([file], arguments, encoder(tokenizer))


@pytest.mark.slow
def test_of_processes_that_start_at_once_one_encodes_and_all_get_the_rows(arguments, file, toy_tokenizer):
    """No process waits in a collective call, which could time out."""
    spawn = multiprocessing.get_context("spawn")
    started = [spawn.Process(target=encode, args=(arguments, file, toy_tokenizer)) for _ in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    assert [process.exitcode for process in started] == [0, 0]
    assert len(cached(arguments.output_dir)) == 1


def test_the_partial_folder_of_a_killed_encoding_is_not_used(arguments, file, toy_tokenizer):
    half = arguments.output_dir / encoded_rows.FOLDER / "0123.partial"
    half.mkdir(parents=True)
    assert len(encoded_rows.load_encoded_rows([file], arguments, encoder(toy_tokenizer))) == 8


TOOL = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
CONVERSATION = [
    {"role": "system", "content": "查天气", "tools": [TOOL]},
    {"role": "user", "content": "北京天气"},
    {"role": "assistant", "metadata": "get_weather", "content": "```python\ntool_call(city='北京')\n```"},
    {"role": "observation", "content": "31度"},
    {"role": "assistant", "content": "北京31度。"},
]


def test_a_conversation_with_tools_is_encoded_as_the_api_encodes_it(arguments, toy_tokenizer, tmp_path):
    """The row starts with the token ids of the API's prompt; the answer follows."""
    file = tmp_path / "turns.jsonl"
    other = [{"role": "user", "content": "好"}, {"role": "assistant", "content": "你好。"}]
    file.write_text("\n".join(json.dumps({"conversations": turns}) for turns in (CONVERSATION, other)))
    arguments = replace(arguments, columns=Columns(conversations="conversations"))
    found = encoded_rows.load_encoded_rows([file], arguments, encoder(toy_tokenizer, 512))
    prompt = PromptFormat().encode(as_messages(CONVERSATION[:-1]), toy_tokenizer)
    assert found[0]["input_ids"][: len(prompt)] == prompt
    labels = [label for label in found[0]["labels"] if label != IGNORE_INDEX]
    assert len(labels) > len(toy_tokenizer.encode("北京31度。")) + len(toy_tokenizer.encode("get_weather"))


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        (CONVERSATION[:-1], "the conversation does not end with an answer"),
        ([*CONVERSATION[:1], {"role": "critic", "content": "x"}], "turn 1 has role 'critic'"),
        ([{"role": "user", "content": "x", "tool_calls": [1]}], "turn 0 has a call that is not JSON with name"),
        ([{"role": "system", "content": "x"}, {"role": "assistant", "content": "y"}], "does not follow a question"),
        ("你好", "column 'talk' is a string, not a list of messages"),
        ([], "the conversation does not end with an answer"),
    ],
)
def test_an_unusable_conversation_is_skipped_with_its_reason(turns, reason, arguments, toy_tokenizer, tmp_path):
    """Without --max-skipped it ends the run."""
    file = tmp_path / "turns.jsonl"
    file.write_text("\n".join(json.dumps({"talk": row}) for row in (CONVERSATION, turns)))
    arguments = replace(arguments, columns=Columns(conversations="talk"))
    allowed = replace(arguments, max_skipped=1)
    assert len(encoded_rows.load_encoded_rows([file], allowed, encoder(toy_tokenizer, 512))) == 1
    with pytest.raises(UserError) as caught:
        encoded_rows.load_encoded_rows([file], arguments, encoder(toy_tokenizer, 512))
    assert caught.value.problem.startswith(f"{file}:2: ")
    assert reason in caught.value.problem
    assert caught.value.problem.endswith("; 1 row cannot be used")
    assert caught.value.remedy == "fix them, or allow them with --max-skipped 1"


def test_several_files_are_encoded_in_order(arguments, file, toy_tokenizer, tmp_path):
    (tmp_path / "more.json").write_text(json.dumps([{"content": "甲", "summary": "乙"}]))
    found = encoded_rows.load_encoded_rows([file, tmp_path / "more.json"], arguments, encoder(toy_tokenizer))
    assert len(found) == 9
    assert (
        found[8]["input_ids"]
        == encoded_rows.load_encoded_rows([tmp_path / "more.json"], arguments, encoder(toy_tokenizer))[0]["input_ids"]
    )


def encode_lines(arguments, lines, toy_tokenizer, max_rows=None, length=64):
    arguments.train_file.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return encoded_rows.load_encoded_rows([arguments.train_file], arguments, encoder(toy_tokenizer, length), max_rows)


GOOD, BAD = {"content": "裙", "summary": "好。"}, {"content": "裙", "summary": ""}


def test_rows_skipped_before_the_limit_is_reached_are_counted_and_logged(arguments, toy_tokenizer, caplog):
    caplog.set_level("INFO")
    arguments = replace(arguments, max_skipped=None)
    assert len(encode_lines(arguments, [BAD, GOOD, BAD, GOOD, BAD, GOOD], toy_tokenizer, max_rows=2)) == 2
    assert f"{arguments.train_file}: 2 rows used, 2 skipped" in caplog.text
    assert f"{arguments.train_file}: read as columns content and summary: 4 rows" in caplog.text


def test_rows_skipped_before_the_limit_is_reached_count_for_max_skipped(arguments, toy_tokenizer):
    with pytest.raises(UserError, match=r"rows.jsonl:1: empty response; 2 rows cannot be used"):
        encode_lines(replace(arguments, max_skipped=1), [BAD, GOOD, BAD, GOOD, BAD], toy_tokenizer, max_rows=2)
    assert (
        len(encode_lines(replace(arguments, max_skipped=2), [BAD, GOOD, BAD, GOOD, BAD], toy_tokenizer, max_rows=2))
        == 2
    )
    assert cached(arguments.output_dir) != []


def test_a_limit_of_training_rows_does_not_apply_to_other_files_and_has_its_own_cache_entry(
    arguments, file, toy_tokenizer
):
    """As in preparation.py: the training files with the limit, the validation file without."""
    arguments = replace(arguments, max_train_samples=2)
    assert (
        len(encoded_rows.load_encoded_rows([file], arguments, encoder(toy_tokenizer), arguments.max_train_samples)) == 2
    )
    assert len(encoded_rows.load_encoded_rows([file], arguments, encoder(toy_tokenizer))) == 8
    assert len(encoded_rows.load_encoded_rows([file], arguments, encoder(toy_tokenizer), 3)) == 3
    assert len(cached(arguments.output_dir)) == 3


TOO_LONG = {"talk": [{"role": "system", "content": "规" * 300}, {"role": "user", "content": "裙"}, CONVERSATION[-1]]}
TALK = {"talk": [{"role": "user", "content": "裙"}, CONVERSATION[-1]]}


@pytest.mark.parametrize("lines", [[TOO_LONG, TALK, TALK], [TALK, TOO_LONG, TALK]])
def test_a_row_whose_system_text_exceeds_the_limit_is_skipped_and_logged_and_counts_for_max_skipped(
    lines, arguments, toy_tokenizer, caplog
):
    caplog.set_level("INFO")
    arguments = replace(arguments, columns=Columns(conversations="talk"), max_skipped=1)
    assert len(encode_lines(arguments, lines, toy_tokenizer)) == 2
    line = lines.index(TOO_LONG) + 1
    assert f"skipped rows.jsonl:{line}: --max-source-length 64 does not hold the prompt's system text" in caplog.text
    assert f"{arguments.train_file}: 2 rows used, 1 skipped" in caplog.text
    with pytest.raises(UserError, match=rf"rows.jsonl:{line}: --max-source-length 64 .*; 1 row cannot be used"):
        encode_lines(replace(arguments, max_skipped=0), lines, toy_tokenizer)


def talk(system):
    return {"talk": [{"role": "system", "content": system}, *TALK["talk"]]}


def test_the_error_names_the_limit_that_holds_all_rows_that_are_too_long(arguments, toy_tokenizer):
    arguments = replace(arguments, columns=Columns(conversations="talk"))
    lines = [talk("规" * 100), talk("规" * 300), talk("规" * 200), TALK]
    with pytest.raises(UserError) as caught:
        encode_lines(arguments, lines, toy_tokenizer)
    longest = [{"role": "system", "content": "规" * 300}, {"role": "user", "content": ""}]
    least = len(PromptFormat().encode(longest, toy_tokenizer))
    assert caught.value.remedy == f"set --max-source-length {least}, or allow them with --max-skipped 3"
    assert len(encode_lines(arguments, lines, toy_tokenizer, length=least)) == 4
    with pytest.raises(UserError) as caught:
        encode_lines(arguments, [{"talk": []}, *lines], toy_tokenizer)
    assert caught.value.remedy == f"fix them and set --max-source-length {least}, or allow them with --max-skipped 4"


def test_a_file_whose_rows_are_all_too_long_is_rejected(arguments, toy_tokenizer):
    arguments = replace(arguments, columns=Columns(conversations="talk"))
    with pytest.raises(UserError, match=r"no usable row: 2 --max-source-length 64 .*; set --max-source-length \d+"):
        encode_lines(arguments, [TOO_LONG, TOO_LONG], toy_tokenizer)
    assert all(folder.endswith(".partial") for folder in cached(arguments.output_dir))


READ = """
import resource, sys
from pathlib import Path
from entrypoints.checkpoint.native import open_native
from entrypoints.chat_format.prompt import PromptFormat
from entrypoints.training.rows import encoded_rows
from entrypoints.training.arguments import TrainArguments
from entrypoints.training.rows.collation import RowEncoder

base, file, output = map(Path, sys.argv[1:])
encoder = RowEncoder(open_native(base).tokenizer, PromptFormat(), 64, 64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = encoded_rows.load_encoded_rows([file], TrainArguments(base, file, output), encoder)
print(len(found), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10)
"""


@pytest.mark.slow
def test_a_file_larger_than_the_memory_is_encoded_in_little_memory(toy_native, tmp_path):
    """400 MB in 400 rows: read at once they took more than 800 MB, in chunks about 20 MB."""
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
