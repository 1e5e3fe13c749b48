"""`glm data check` and `glm data split` as a user runs them."""

import json
import os
import subprocess
import sys

import pytest

from entrypoints.__main__ import main
from entrypoints.jobs import data

ROW = {"content": "类型#裤", "summary": "好"}


@pytest.fixture(autouse=True)
def no_default_model(monkeypatch):
    monkeypatch.delenv("MODEL_PATH", raising=False)


def file_of(tmp_path, *rows, name="train.json", encoding="utf-8"):
    path = tmp_path / name
    path.write_bytes("\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode(encoding))
    return str(path)


def checked(capsys, *argv):
    """Run `glm data check ... --json` and return the report."""
    assert main(["data", "check", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def error_of(capsys, *argv):
    """Run `glm data ...`, which must fail; the error message on stderr, which is one line."""
    capsys.readouterr()
    assert main(["data", *argv]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("glm: ")]
    assert len(lines) == 1
    assert "Traceback" not in captured.err
    return lines[0]


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
@pytest.mark.parametrize(
    "text",
    [
        '{"content": "a", "summary": "b"}\n{"content": "c", "summary": "d"}\n',
        '[{"content": "a", "summary": "b"},\n {"content": "c", "summary": "d"}]',
        '{\n    "content": "a",\n    "summary": "b"\n}\n{\n    "content": "c",\n    "summary": "d"\n}',
    ],
)
def test_two_rows_are_read_from_any_layout_with_any_suffix(text, name, tmp_path, capsys):
    """Readers that go by the suffix take a pretty-printed file for one row, or fail."""
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert checked(capsys, str(tmp_path / name))["used"] == 2


def test_a_byte_order_mark_does_not_rename_the_first_column(tmp_path, capsys):
    """utf-8 would read the name of the first column as \ufeffcontent."""
    assert checked(capsys, file_of(tmp_path, ROW, encoding="utf-8-sig"))["columns"] == {"content": 1, "summary": 1}


def test_a_gbk_file_is_rejected_with_the_flag_that_reads_it(tmp_path, capsys):
    """Files exported by Chinese editors are often GBK."""
    path = file_of(tmp_path, ROW, encoding="gbk")
    message = error_of(capsys, "check", path)
    assert f"{path}:1: byte 13 of the file is not utf-8" in message
    assert "--encoding gb18030" in message
    assert checked(capsys, path, "--encoding", "gb18030")["used"] == 1


@pytest.mark.parametrize("locale", [{"LANG": "C"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}])
def test_the_command_runs_in_a_c_locale(locale, tmp_path):
    """A column name that a C terminal cannot show is escaped and raises no UnicodeEncodeError."""
    path = file_of(tmp_path, {**ROW, "备注": "x"}, name="数据.json")
    env = {"PATH": os.environ["PATH"], "PYTHONUTF8": "0", **locale}
    command = [sys.executable, "-m", "entrypoints", "data"]
    done = subprocess.run([*command, "check", path], env=env, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"1 rows, 1 used" in done.stdout
    done = subprocess.run([*command, "split", path, tmp_path / "out", "--dev-rows", "1"], env=env, capture_output=True)
    assert (done.returncode, done.stderr.count(b"1 out of 1 rows")) == (1, 1)


def test_a_wrong_column_is_rejected_with_the_existing_columns(tmp_path, capsys):
    """Flags with underscores, as the ChatGLM tutorials spell them."""
    path = file_of(tmp_path, ROW)
    message = error_of(capsys, "check", path, "--response_column", "response")
    problem = "no column 'response' in train.json; columns: content, summary"
    assert message == f"glm: {problem}; select an existing column with --response-column"
    both = error_of(capsys, "check", path, "--prompt_column", "prompt", "--response_column", "response")
    assert "no column 'prompt' and no column 'response' in train.json; columns: content, summary" in both


def test_null_empty_and_number_cells_are_reported(tmp_path, capsys):
    """No row is dropped silently."""
    rows = [("a", ""), (None, "b"), ("c", "d"), (1, 2)]
    path = file_of(tmp_path, *({"content": content, "summary": summary} for content, summary in rows))
    assert main(["data", "check", path]) == 0
    out = capsys.readouterr().out
    assert "4 rows, 1 used, 3 skipped" in out
    for reason in (
        "empty response: 1 (line 1)",
        "null prompt: 1 (line 2)",
        "column 'content' is a number, not a string: 1 (line 4)",
    ):
        assert reason in out


def test_a_file_with_only_unusable_rows_is_rejected(tmp_path, capsys):
    """The error counts the reasons."""
    path = file_of(tmp_path, {"content": "a", "summary": ""}, {"content": None, "summary": "b"})
    assert "no usable row in train.json: 1 empty response, 1 null prompt" in error_of(capsys, "check", path)


def test_a_literal_unk_is_reported(tmp_path, capsys):
    """300 of the 1,070 public development answers contain it."""
    path = file_of(tmp_path, {"content": "类型#裙", "summary": "<UNK>的设计"})
    assert checked(capsys, path)["unk_responses"] == {"count": 1, "lines": [1]}


def test_other_columns_and_a_history_can_be_selected(tmp_path, capsys):
    path = file_of(tmp_path, {"q": "abc", "a": "de", "h": [["x", "yz"]]})
    report = checked(capsys, path, "--prompt-column", "q", "--response-column", "a", "--history-column", "h")
    assert (report["prompt_length"]["max"], report["response_length"]["max"]) == (6, 2)


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
TALK = [
    {"role": "system", "content": "查"},
    {"role": "user", "content": "北京"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
    {"role": "tool", "content": "31度"},
    {"role": "assistant", "content": "好"},
]


def test_conversations_with_tools_are_checked(tmp_path, capsys):
    """Rows that training skips are skipped here; the question is everything before the last answer."""
    rows = [{"talk": TALK}, {"talk": TALK}, {"talk": [*TALK[:3], {"role": "tool", "content": "5度"}, TALK[4]]}]
    rows += [{"talk": [*TALK[:4], {"role": "assistant", "content": "冷"}]}, {"talk": [{"role": "x", "content": "y"}]}]
    report = checked(capsys, file_of(tmp_path, *rows), "--conversations-column", "talk")
    assert report["skipped"] == {"turn 0 has role 'x'": {"count": 1, "lines": [5]}}
    assert (report["used"], report["duplicates"]["lines"], report["conflicts"]["lines"]) == (4, [[1, 2]], [[1, 2, 4]])
    call = "```python\ntool_call()\n```"
    assert report["prompt_length"]["max"] == len(f"查北京{call}31度")
    assert "no column 'turns'" in error_of(capsys, "check", file_of(tmp_path, *rows), "--conversations-column", "turns")


def test_with_a_model_tools_are_counted_and_rows_too_long_for_the_limits_are_skipped(tmp_path, capsys, toy_native):
    """As training does; the text of the tools is longer than the limit."""
    words = ("--conversations-column", "talk", "--model", str(toy_native), "--max-source-length", "60")
    path = file_of(tmp_path, {"talk": TALK}, {"talk": TALK, "tools": [TOOL] * 9}, {"talk": [*TALK[1:2], TALK[4]]})
    report = checked(capsys, path, *words)
    assert report["skipped"] == {
        "--max-source-length 60 does not hold the prompt's system text, tools, tool calls and role tags": {
            "count": 1,
            "lines": [2],
        }
    }
    assert (report["used"], report["unit"], report["cut_prompts"]["count"]) == (2, "tokens", 0)
    longer = checked(capsys, path, *words, "--source-prefix", "请回答")
    assert longer["prompt_length"]["max"] > report["prompt_length"]["max"]
    plain = checked(capsys, path, *words, "--template", "round")
    assert plain["skipped"] == {"the template `round` has no system turn": {"count": 2, "lines": [1, 2]}}


def test_the_default_limits_are_512(tmp_path, capsys):
    path = file_of(tmp_path, {"content": "裙" * 513, "summary": "美" * 512})
    report = checked(capsys, path)
    assert (report["max_source_length"], report["max_target_length"]) == (512, 512)
    assert (report["cut_prompts"]["count"], report["cut_responses"]["count"]) == (1, 0)
    report = checked(capsys, path, "--max-source-length", "513", "--max-target-length", "64")
    assert (report["cut_prompts"]["count"], report["cut_responses"]["count"]) == (0, 1)


def test_lengths_are_tokens_of_the_model_and_the_flag_overrides_the_variable(tmp_path, capsys, monkeypatch):
    models = []
    monkeypatch.setattr(
        data, "_token_counter", lambda model, args: models.append(str(model)) or (lambda example: (7, 9))
    )
    path = file_of(tmp_path, ROW)
    report = checked(capsys, path, "--model", "models/mine")
    assert (report["unit"], report["prompt_length"]["max"], report["response_length"]["max"]) == ("tokens", 7, 9)
    monkeypatch.setenv("MODEL_PATH", "models/theirs")
    assert checked(capsys, path)["unit"] == "tokens"
    checked(capsys, path, "--model", "models/mine")
    assert models == ["models/mine", "models/theirs", "models/mine"]


def test_the_report_goes_to_stdout_and_the_log_to_stderr(tmp_path, capsys):
    assert main(["data", "check", file_of(tmp_path, ROW)]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{tmp_path / 'train.json'}: 1 rows, 1 used, 0 skipped\n")
    assert "read 1 rows" in captured.err
    assert "类型#裤" not in captured.out + captured.err


def test_split_writes_both_files_and_reports_their_row_counts(tmp_path, capsys):
    source, out = file_of(tmp_path, *({"content": str(n), "summary": "x"} for n in range(10))), tmp_path / "out"
    assert main(["data", "split", source, str(out), "--dev-share", "0.2"]) == 0
    assert capsys.readouterr().out == f"{out / 'train.jsonl'}: 8 rows\n{out / 'dev.jsonl'}: 2 rows\n"
    assert "choose another folder or pass --overwrite" in error_of(capsys, "split", source, str(out), "--dev-rows", "1")
    assert main(["data", "split", source, str(out), "--dev-rows", "1", "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "train": str(out / "train.jsonl"),
        "dev": str(out / "dev.jsonl"),
        "train_rows": 9,
        "dev_rows": 1,
        "shared_rows": 0,
    }


def test_split_warns_about_development_rows_that_are_also_training_rows(tmp_path, capsys):
    folder = tmp_path / "AdvertiseGen"
    folder.mkdir()
    file_of(folder, ROW, {"content": "a", "summary": "b"})
    file_of(folder, ROW, name="dev.json")
    assert main(["data", "split", str(folder), str(tmp_path / "out")]) == 0
    assert "1 development rows are also training rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["check"],
        ["chekc", "x"],
        [],
        ["check", "x", "--max-source-length", "0"],
        ["check", "x", "--max-target-length", "-1"],
        ["check", "x", "--max-target-length", "many"],
        ["split", "x"],
        ["convert", "x"],
        ["check", "x", "--format", "csv"],
        ["split", "x", "y", "--dev-rows", "1", "--dev-share", "0.1"],
        ["split", "x", "y", "--dev-rows", "0"],
    ],
)
def test_wrong_usage_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["data", *argv])
    assert caught.value.code == 2
    assert "usage: glm data" in capsys.readouterr().err


SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "北京"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"max-results": 5}}'},
        {"from": "observation", "value": "31度"},
        {"from": "gpt", "value": "好"},
    ],
    "id": "x1",
}


def test_check_says_how_rows_were_read_and_names_what_is_not_used(tmp_path, capsys):
    path = file_of(tmp_path, SHAREGPT, SHAREGPT)
    assert main(["data", "check", path]) == 0
    out = capsys.readouterr().out
    assert "\nread as ShareGPT: 2 rows\n" in out
    assert "\nnot used: id in 2 rows\n" in out
    report = checked(capsys, path)
    assert (report["shape"], report["unused"]) == ("ShareGPT", {"id": 2})


def test_check_reads_the_parts_of_a_folder(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for number in range(3):
        file_of(tmp_path / "data", ROW, name=f"part-{number}.jsonl")
    report = checked(capsys, str(tmp_path / "data"))
    assert (report["file"], report["used"]) == (str(tmp_path / "data"), 3)


def test_convert_writes_messages_and_says_what_it_read(tmp_path, capsys):
    source, target = file_of(tmp_path, SHAREGPT), tmp_path / "messages.jsonl"
    assert main(["data", "convert", source, str(target)]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{target}: 1 rows\n"
    assert f"{source}: read as ShareGPT: 1 rows" in captured.err
    assert f"{source}: not used: id in 1 rows" in captured.err
    (line,) = target.read_text(encoding="utf-8").splitlines()
    call = {"id": "call_0", "type": "function", "function": {"name": "f", "arguments": '{"max-results": 5}'}}
    assert json.loads(line) == {
        "messages": [
            {"role": "user", "content": "北京"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_0", "content": "31度"},
            {"role": "assistant", "content": "好"},
        ]
    }


def test_convert_stops_at_a_row_it_would_lose_and_replaces_a_file_only_if_told(tmp_path, capsys):
    source, target = file_of(tmp_path, ROW, {"content": "a", "summary": {"b": 1}}), str(tmp_path / "messages.jsonl")
    message = error_of(capsys, "convert", source, target)
    assert f"{source}:2: column 'summary' is an object, not a string; 1 row cannot be used" in message
    assert sorted(file.name for file in tmp_path.iterdir()) == ["train.json"], "nothing is left behind"
    assert main(["data", "convert", source, target, "--max-skipped", "1"]) == 0
    assert "exists" in error_of(capsys, "convert", source, target, "--max-skipped", "1")
    assert main(["data", "convert", source, target, "--max-skipped", "1", "--overwrite"]) == 0
    assert "exists" in error_of(capsys, "convert", target, target, "--overwrite")
    assert "is not named .jsonl or .json" in error_of(capsys, "convert", source, str(tmp_path / "messages.parquet"))
    assert "cannot write" in error_of(capsys, "convert", source, str(tmp_path / "no" / "messages.jsonl"))
