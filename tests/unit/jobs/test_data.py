"""Trap names (F1 to F9) are those of the list of reported pains."""

import json
import os
import subprocess
import sys

import pytest

from entrypoints.__main__ import main
from entrypoints.jobs import data

ROW = {"content": "类型#裤", "summary": "好"}


@pytest.fixture(autouse=True)
def no_model_of_the_developer(monkeypatch):
    monkeypatch.delenv("MODEL_PATH", raising=False)


def file_of(tmp_path, *rows, name="train.json", encoding="utf-8"):
    path = tmp_path / name
    path.write_bytes("\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode(encoding))
    return str(path)


def checked(capsys, *argv):
    """Run `glm data check ... --json`; the report."""
    assert main(["data", "check", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *argv):
    """Run `glm data ...`, which must fail; the one line on stderr that is no log line."""
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
def test_two_rows_are_two_rows_in_any_shape_and_with_any_suffix(text, name, tmp_path, capsys):
    """F1."""
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert checked(capsys, str(tmp_path / name))["used"] == 2


def test_a_byte_order_mark_does_not_rename_the_first_column(tmp_path, capsys):
    """F2."""
    assert checked(capsys, file_of(tmp_path, ROW, encoding="utf-8-sig"))["columns"] == {"content": 1, "summary": 1}


def test_a_gbk_file_is_refused_with_the_flag_that_reads_it(tmp_path, capsys):
    """F3."""
    path = file_of(tmp_path, ROW, encoding="gbk")
    message = refused(capsys, "check", path)
    assert f"{path}:1: byte 13 of the file is not utf-8" in message
    assert "--encoding gb18030" in message
    assert checked(capsys, path, "--encoding", "gb18030")["used"] == 1


@pytest.mark.parametrize("locale", [{"LANG": "C"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}])
def test_the_job_runs_in_a_c_locale(locale, tmp_path):
    """F3; a column name that a C terminal cannot show comes out escaped, not as a UnicodeEncodeError."""
    path = file_of(tmp_path, {**ROW, "备注": "x"}, name="数据.json")
    env = {"PATH": os.environ["PATH"], "PYTHONUTF8": "0", **locale}
    command = [sys.executable, "-m", "entrypoints", "data"]
    done = subprocess.run([*command, "check", path], env=env, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"1 rows, 1 used" in done.stdout
    done = subprocess.run([*command, "split", path, tmp_path / "out", "--dev-rows", "1"], env=env, capture_output=True)
    assert (done.returncode, done.stderr.count(b"1 out of 1 rows")) == (1, 1)


def test_a_wrong_column_is_refused_with_the_columns_there_are(tmp_path, capsys):
    """F4, with the spelling of the tutorials."""
    path = file_of(tmp_path, ROW)
    message = refused(capsys, "check", path, "--response_column", "response")
    problem = "no column 'response' in train.json; columns: content, summary"
    assert message == f"glm: {problem}; name the right one with --response-column"
    both = refused(capsys, "check", path, "--prompt_column", "prompt", "--response_column", "response")
    assert "no column 'prompt' and no column 'response' in train.json; columns: content, summary" in both


def test_null_empty_and_number_cells_are_reported(tmp_path, capsys):
    """F5."""
    rows = [("a", ""), (None, "b"), ("c", "d"), (1, 2)]
    path = file_of(tmp_path, *({"content": content, "summary": summary} for content, summary in rows))
    assert main(["data", "check", path]) == 0
    out = capsys.readouterr().out
    assert "4 rows, 1 used, 3 skipped" in out
    for reason in ("empty response: 1 (line 1)", "null prompt: 1 (line 2)", "prompt is not a string: 1 (line 4)"):
        assert reason in out


def test_a_file_of_unusable_rows_is_refused(tmp_path, capsys):
    """F5."""
    path = file_of(tmp_path, {"content": "a", "summary": ""}, {"content": None, "summary": "b"})
    assert "no usable row in train.json: 1 empty response, 1 null prompt" in refused(capsys, "check", path)


def test_a_literal_unk_is_reported(tmp_path, capsys):
    """F9."""
    path = file_of(tmp_path, {"content": "类型#裙", "summary": "<UNK>的设计"})
    assert checked(capsys, path)["unk_responses"] == {"count": 1, "lines": [1]}


def test_other_columns_and_history_can_be_named(tmp_path, capsys):
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


def test_conversations_with_tools_are_checked_in_their_own_column(tmp_path, capsys):
    """F7: what training would skip is skipped here, and a question is all that stands in front of the answer."""
    rows = [{"talk": TALK}, {"talk": TALK}, {"talk": [*TALK[:3], {"role": "tool", "content": "5度"}, TALK[4]]}]
    rows += [{"talk": [*TALK[:4], {"role": "assistant", "content": "冷"}]}, {"talk": [{"role": "x", "content": "y"}]}]
    report = checked(capsys, file_of(tmp_path, *rows), "--conversations-column", "talk")
    assert report["skipped"] == {"turn 0 has role 'x'": {"count": 1, "lines": [5]}}
    assert (report["used"], report["duplicates"]["lines"], report["conflicts"]["lines"]) == (4, [[1, 2]], [[1, 2, 4]])
    call = "```python\ntool_call()\n```"
    assert report["prompt_length"]["max"] == len(f"查北京{call}31度")
    assert "no column 'turns'" in refused(capsys, "check", file_of(tmp_path, *rows), "--conversations-column", "turns")


def test_with_a_model_tools_count_and_rows_that_the_limits_cannot_hold_are_skipped(tmp_path, capsys, toy_native):
    """As training skips them; the text of the tools is longer than the limit."""
    words = ("--conversations-column", "talk", "--model", str(toy_native), "--max-source-length", "60")
    path = file_of(tmp_path, {"talk": TALK}, {"talk": TALK, "tools": [TOOL] * 9}, {"talk": [*TALK[1:2], TALK[4]]})
    report = checked(capsys, path, *words)
    assert report["skipped"] == {"max_source_length 60 does not hold the prompt's frame": {"count": 1, "lines": [2]}}
    assert (report["used"], report["unit"], report["cut_prompts"]["count"]) == (2, "tokens", 0)
    longer = checked(capsys, path, *words, "--source-prefix", "请回答")
    assert longer["prompt_length"]["max"] > report["prompt_length"]["max"]
    plain = checked(capsys, path, *words, "--template", "round")
    assert plain["skipped"] == {"the template `round` has no system turn": {"count": 2, "lines": [1, 2]}}


def test_limits_are_512_unless_given(tmp_path, capsys):
    path = file_of(tmp_path, {"content": "裙" * 513, "summary": "美" * 512})
    report = checked(capsys, path)
    assert (report["max_source_length"], report["max_target_length"]) == (512, 512)
    assert (report["cut_prompts"]["count"], report["cut_responses"]["count"]) == (1, 0)
    report = checked(capsys, path, "--max-source-length", "513", "--max-target-length", "64")
    assert (report["cut_prompts"]["count"], report["cut_responses"]["count"]) == (0, 1)


def test_a_model_counts_its_tokens_and_the_flag_beats_the_variable(tmp_path, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(
        data, "_token_counter", lambda model, args: asked.append(str(model)) or (lambda example: (7, 9))
    )
    path = file_of(tmp_path, ROW)
    report = checked(capsys, path, "--model", "models/mine")
    assert (report["unit"], report["prompt_length"]["max"], report["response_length"]["max"]) == ("tokens", 7, 9)
    monkeypatch.setenv("MODEL_PATH", "models/theirs")
    assert checked(capsys, path)["unit"] == "tokens"
    checked(capsys, path, "--model", "models/mine")
    assert asked == ["models/mine", "models/theirs", "models/mine"]


def test_the_report_goes_to_stdout_and_the_log_to_stderr(tmp_path, capsys):
    assert main(["data", "check", file_of(tmp_path, ROW)]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{tmp_path / 'train.json'}: 1 rows, 1 used, 0 skipped\n")
    assert "read 1 rows" in captured.err
    assert "类型#裤" not in captured.out + captured.err


def test_split_writes_both_files_and_says_how_many_rows_each_has(tmp_path, capsys):
    source, out = file_of(tmp_path, *({"content": str(n), "summary": "x"} for n in range(10))), tmp_path / "out"
    assert main(["data", "split", source, str(out), "--dev-share", "0.2"]) == 0
    assert capsys.readouterr().out == f"{out / 'train.jsonl'}: 8 rows\n{out / 'dev.jsonl'}: 2 rows\n"
    assert "choose another folder or pass --overwrite" in refused(capsys, "split", source, str(out), "--dev-rows", "1")
    assert main(["data", "split", source, str(out), "--dev-rows", "1", "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "train": str(out / "train.jsonl"),
        "dev": str(out / "dev.jsonl"),
        "train_rows": 9,
        "dev_rows": 1,
        "shared_rows": 0,
    }


def test_split_warns_of_development_rows_that_are_training_rows(tmp_path, capsys):
    folder = tmp_path / "AdvertiseGen"
    folder.mkdir()
    file_of(folder, ROW, {"content": "a", "summary": "b"})
    file_of(folder, ROW, name="dev.json")
    assert main(["data", "split", str(folder), str(tmp_path / "out")]) == 0
    assert "1 development rows are training rows too" in capsys.readouterr().err


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
        ["split", "x", "y", "--dev-rows", "1", "--dev-share", "0.1"],
        ["split", "x", "y", "--dev-rows", "0"],
    ],
)
def test_wrong_usage_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["data", *argv])
    assert caught.value.code == 2
    assert "usage: glm data" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], ["check", "--help"], ["split", "--help"]])
def test_help_needs_no_heavy_import(argv):
    code = (
        "import sys, entrypoints.__main__ as m\n"
        f"try: m.main(['data', *{argv!r}])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'nltk', 'jieba', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if len(argv) > 1:
        assert "(default: utf-8)" in " ".join(done.stdout.split())
