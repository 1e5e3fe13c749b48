"""`glm quantize`, and `glm chat` with what it makes. Traps B7, I2 and I3 of the list of reported pains."""

import json
import os
import platform
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from entrypoints.__main__ import main
from entrypoints.checkpoint import ggml
from entrypoints.checkpoint.gguf import TYPES, open_gguf
from entrypoints.checkpoint.layout import FOLDER_TYPES
from entrypoints.engines import machine
from entrypoints.engines.packages import EXTRAS, QUANTISING, SMALL_FOLDERS, TRAINING

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("type_", TYPES)
def test_each_type_is_written_and_answers(type_, toy_native, tmp_path, capsys):
    file = tmp_path / "new" / "out.gguf"
    assert main(["quantize", str(toy_native), str(file), "--type", type_]) == 0
    out, err = capsys.readouterr()
    assert out == f"{file}\n"
    told = rf"{file.stat().st_size / 1e6:,.0f} MB, mean KL 0\.\d+, \d+ of \d+ greedy tokens as the source"
    assert re.fullmatch(told, err.splitlines()[-1])
    assert open_gguf(file).type == type_
    asked = ["chat", "--model", str(file), "--prompt", "你好", "--max-new-tokens", "8", "--temperature", "0", "--json"]
    assert main(asked) == 0  # an untrained model would draw an end now and then
    answer = json.loads(capsys.readouterr().out)
    assert (answer["finish_reason"], answer["completion_tokens"]) == ("length", 8)


def test_four_bits_are_the_default_and_smaller_than_eight(toy_native, toy_gguf, tmp_path):
    sizes = []
    for name, flags in (("four.gguf", []), ("eight.gguf", ["--type", "q8_0"])):
        assert main(["quantize", str(toy_native), str(tmp_path / name), *flags]) == 0
        sizes.append((tmp_path / name).stat().st_size)
    assert open_gguf(tmp_path / "four.gguf").type == "q4_0"
    assert sizes[0] < sizes[1] < toy_gguf.stat().st_size


def test_an_existing_file_ends_in_one_line(toy_native, toy_gguf, capsys):
    assert main(["quantize", str(toy_native), str(toy_gguf)]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"glm: {toy_gguf} exists; choose another name, or remove it"


def test_an_original_checkpoint_is_sent_to_convert_first(toy_original, tmp_path, capsys):
    assert main(["quantize", str(toy_original), str(tmp_path / "out.gguf")]) == 1
    assert "convert it first: glm convert" in capsys.readouterr().err


def test_a_quantised_file_is_not_quantised_again(toy_gguf, tmp_path, glm):
    words = glm("quantize", toy_gguf, tmp_path / "out.gguf").mistake()
    assert words == f"glm: {toy_gguf} is quantised already; name the converted checkpoint it was made from"


def test_a_prefix_is_no_adapter_to_merge(toy_native, tmp_path, glm):
    folder = tmp_path / "prefix"
    folder.mkdir()
    import torch
    from safetensors.torch import save_file

    save_file({"prefix": torch.zeros(8, 2, 3, 32)}, folder / "prefix.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"adapter_type": "ptuning-v2", "pre_seq_len": 3}))
    words = glm("quantize", toy_native, tmp_path / "out.gguf", "--adapter", folder).mistake()
    assert "is a P-Tuning v2 prefix: keys and values, no weights to merge" in words
    assert not (tmp_path / "out.gguf").exists()


def test_rows_of_ones_own_say_what_matters(toy_native, rows_file, tmp_path, glm, sample_rows):
    rows = rows_file(*sample_rows[:8])
    done = glm("quantize", toy_native, tmp_path / "out.gguf", "--type", "q4_k_m", "--imatrix", rows)
    assert (done.code, done.out) == (0, f"{tmp_path / 'out.gguf'}\n")
    assert "weighing the columns by 8 rows of rows.jsonl" in done.err
    words = glm("quantize", toy_native, tmp_path / "other.gguf", "--type", "f16", "--imatrix", rows).mistake()
    assert "--imatrix changes nothing with --type f16" in words


@pytest.fixture
def ordered(monkeypatch):
    """What the command asks for; nothing is made."""
    from entrypoints.engines import quantising
    from entrypoints.engines.gguf_check import Comparison

    orders = []
    monkeypatch.setattr(quantising, "quantise", lambda order: (orders.append(order), (0, Comparison(0.0, 1, 1)))[1])
    return orders


def test_rows_in_gbk_with_earlier_turns_are_read_as_training_reads_them(toy_native, tmp_path, glm, ordered):
    file, words = tmp_path / "rows.jsonl", ["quantize", toy_native, tmp_path / "out.gguf", "--imatrix"]
    row = {"q": "再来一件", "a": "白色长裙", "turns": [["推荐一件衣服", "蓝色上衣"]]}
    file.write_bytes(json.dumps(row, ensure_ascii=False).encode("gb18030") + b"\n{}\n")
    flags = ["--prompt-column", "q", "--response-column", "a", "--history-column", "turns"]
    assert "--encoding gb18030" in glm(*words, file, *flags).mistake()
    done = glm(*words, file, *flags, "--encoding", "gb18030")
    assert done.code == 0, done.err
    assert [turn.content for turn in ordered[0].rows[0].messages()] == [*row["turns"][0], row["q"], row["a"]]
    assert "1 rows of" in done.err
    assert "cannot be used: see glm data check" in done.err


def test_rows_of_messages_weigh_too(toy_native, rows_file, tmp_path, glm, ordered):
    turns = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "好"}]
    file = rows_file({"mine": turns})
    words = ["quantize", toy_native, tmp_path / "out.gguf", "--imatrix", file]
    assert glm(*words, "--conversations-column", "mine").code == 0
    assert [turn.content for turn in ordered[0].rows[0].messages()] == ["你好", "好"]
    assert "--conversations-column" in glm(*words, "--conversations-column", "other").mistake()


@pytest.mark.parametrize(
    ("hidden", "words", "told"),
    [
        ("torch", ["quantize", "DIR", "OUT.gguf"], "package torch; pip install 'glm-entrypoints[transformers]'"),
        ("sentencepiece", ["quantize", "DIR", "OUT.gguf"], "package sentencepiece; pip install"),
        ("torch,gguf", ["quantize", "DIR", "OUT.gguf"], "packages torch, gguf; pip install 'glm-entrypoints[quant"),
        ("torch,bitsandbytes", ["quantize", "DIR", "OUT", "--type", "nf4"], "[qlora,transformers]'"),
        ("torch", ["prepare", "DIR", "STORE"], "package torch; pip install 'glm-entrypoints[transformers]'"),
        ("sentencepiece", ["prepare", "DIR", "STORE"], "package sentencepiece; pip"),
        ("xllamacpp", ["prepare", "DIR", "STORE", "--quantize", "q4_0"], "'glm-entrypoints[quantized]'"),
        ("datasets", ["prepare", "demo", "STORE"], "package datasets; pip install 'glm-entrypoints[train]'"),
    ],
)
def test_a_package_that_is_missing_is_told_in_one_line_with_the_extra_that_brings_it(hidden, words, told, tmp_path):
    code = (
        "import sys; sys.modules.update(dict.fromkeys(sys.argv[1].split(',')));"
        "from entrypoints.__main__ import main; sys.exit(main(sys.argv[2:]))"
    )
    words = [sys.executable, "-c", code, hidden, *words]
    path = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(words, cwd=tmp_path, env=path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    lines = [line for line in done.stderr.splitlines() if line.startswith("glm: this needs the ")]
    assert len(lines) == 1, done.stderr
    assert told in lines[0]
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_each_extra_that_is_named_brings_its_package():
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert len(EXTRAS) >= 10
    for package, extra in EXTRAS.items():
        assert package in [re.split(r"[^\w-]", line)[0] for line in extras[extra]]
    assert {*QUANTISING, *SMALL_FOLDERS, *TRAINING} == set(EXTRAS)


@pytest.mark.parametrize("type_", FOLDER_TYPES)
def test_no_compiler_is_needed_for_fewer_bits(type_, toy_native, tmp_path):
    """I1: a PATH on which there is neither gcc nor cc, and no variable that names one."""
    pytest.importorskip("bitsandbytes", reason="needs the package bitsandbytes (extra qlora)")
    code = (
        "import shutil, sys; assert not any(map(shutil.which, ('gcc', 'cc', 'c++', 'clang')));"
        "from entrypoints.__main__ import main; folder, target, type_, load_in = sys.argv[1:];"
        "asked = '--prompt 你好 --max-new-tokens 4 --temperature 0 --json'.split();"
        "sys.exit(main(['quantize', folder, target, '--type', type_]) or main(['chat', '--model', target, *asked])"
        " or main(['chat', '--model', folder, '--load-in', load_in, *asked]))"
    )
    words = [sys.executable, "-c", code, toy_native, tmp_path / "out", type_, FOLDER_TYPES[type_]]
    bare = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
    bare |= {"PATH": str(tmp_path / "nothing"), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(list(map(str, words)), env=bare, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [answer["completion_tokens"] for answer in answers] == [4, 4]


def test_without_llama_cpps_quantiser_the_plain_types_remain(toy_native, tmp_path, monkeypatch, glm):
    monkeypatch.setattr(ggml, "_function", lambda: None)
    words = glm("quantize", toy_native, tmp_path / "out.gguf", "--type", "q5_k_m").mistake()
    assert "does not show ggml_quantize_chunk; use --type q4_0, q8_0 or f16" in words
    assert glm("quantize", toy_native, tmp_path / "out.gguf", "--type", "q8_0").code == 0


def test_a_processor_without_avx2_is_refused_before_llama_cpp_is_loaded(
    toy_native, toy_gguf, tmp_path, monkeypatch, glm
):
    (tmp_path / "cpuinfo").write_text("flags\t\t: fpu sse2 avx f16c\n")
    monkeypatch.setattr(machine, "PROCESSOR", tmp_path / "cpuinfo")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for words in (["quantize", toy_native, tmp_path / "out.gguf"], ["chat", "--model", toy_gguf, "--prompt", "hi"]):
        assert "this processor has no avx2, bmi2, fma, which llama.cpp's build needs" in glm(*words).mistake()


@pytest.mark.parametrize(("name", "type_"), [("out.gguf", "q4_0"), ("out", "nf4")])
def test_a_disk_that_fills_up_midway_leaves_nothing(name, type_, toy_native, tmp_path):
    """A limit on the size of files stands for the disk: the check before writing does not see it either."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20));"
        "from entrypoints.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    if type_ == "nf4":
        pytest.importorskip("bitsandbytes", reason="needs the package bitsandbytes (extra qlora)")
    words = [sys.executable, "-c", code, "quantize", toy_native, tmp_path / name, "--type", type_]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert re.search(rf"glm: writing .*{name} failed: .*; free space or check the disk", done.stderr)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def small(toy_native, tmp_path_factory):
    """The toy as a folder in 8 bits, made by the command."""
    pytest.importorskip("bitsandbytes", reason="needs the package bitsandbytes (extra qlora)")
    folder = tmp_path_factory.mktemp("small") / "int8"
    assert main(["quantize", str(toy_native), str(folder), "--type", "int8"]) == 0
    return folder


def test_a_folder_in_fewer_bits_is_known_to_every_command_that_asks(small, rows_file, sample_rows, tmp_path, glm):
    assert f"{small}: 8 files as the manifest says" in glm("verify", small).out
    facts = glm("doctor", "--model", small)
    assert (facts.code, "8bit" in facts.out, "goes to" in facts.out) == (0, True, True)
    asked = glm("chat", "--model", small, "--prompt", "你好", "--max-new-tokens", 8, "--temperature", 0, "--json")
    assert json.loads(asked.out)["completion_tokens"] == 8
    rows = rows_file(*sample_rows[:2])
    words = ["evaluate", "--model", small, "--test-file", rows, "--output-dir", tmp_path / "scores"]
    done = glm(*words, "--max-target-length", 8)
    assert done.code == 0, done.err
    assert len((tmp_path / "scores" / "generated_predictions.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("method", ["full", "lora", "freeze"])
def test_a_folder_in_fewer_bits_is_not_tuned(method, small, rows_file, sample_rows, tmp_path, glm):
    """I2: the weights it was made from are; QLoRA makes fewer bits of them itself."""
    words = ["--train-file", rows_file(*sample_rows[:2]), "--output-dir", tmp_path / "out", "--method", method]
    told = glm("train", "--model-name-or-path", small, *words).mistake()
    assert f"{small} is quantised already: it can be asked, not tuned" in told
    assert not (tmp_path / "out").exists()


def test_a_folder_in_fewer_bits_is_not_quantised_again(small, tmp_path, glm):
    for name, type_ in (("out.gguf", "q4_0"), ("out", "nf4")):
        assert "is quantised already" in glm("quantize", small, tmp_path / name, "--type", type_).mistake()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--adapter", "lora"], "--type int8 takes no --adapter; merge a LoRA first: glm export"),
        (["--imatrix", "rows.jsonl"], "--imatrix changes nothing with --type int8"),
    ],
)
def test_what_a_folder_in_fewer_bits_cannot_take_is_refused(flags, words, toy_native, tmp_path, glm):
    assert words in glm("quantize", toy_native, tmp_path / "out", "--type", "int8", *flags).mistake()


def test_a_folder_with_the_name_of_a_file_or_one_that_is_there_is_refused(toy_native, tmp_path, glm):
    told = glm("quantize", toy_native, tmp_path / "out.gguf", "--type", "nf4").mistake()
    assert "--type nf4 makes a folder" in told
    (tmp_path / "out").mkdir()
    told = glm("quantize", toy_native, tmp_path / "out", "--type", "nf4").mistake()
    assert told == f"glm: {tmp_path / 'out'} exists; choose another name, or remove it"
