"""`glm quantize`, and `glm chat` with its output."""

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
from entrypoints.checkpoint.gguf_reader import GGUF_TYPES, open_gguf
from entrypoints.checkpoint.layout import FOLDER_QUANTIZATIONS
from entrypoints.engines.llamacpp import engine
from entrypoints.engines.packages import (
    BITSANDBYTES_PACKAGES,
    EXTRA_BY_PACKAGE,
    QUANTIZATION_PACKAGES,
    SCORING_PACKAGES,
    TRAINING_PACKAGES,
)
from entrypoints.hardware import resources

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Limit llama.cpp to one thread: at its barriers threads spin, which is slow on a busy machine."""
    monkeypatch.setattr(engine, "available_cpus", lambda: 1)


@pytest.mark.parametrize("type_", GGUF_TYPES)
def test_each_type_is_written_and_generates(type_, toy_native, tmp_path, capsys):
    file = tmp_path / "new" / "out.gguf"
    assert main(["quantize", str(toy_native), str(file), "--type", type_]) == 0
    out, err = capsys.readouterr()
    assert out == f"{file}\n"
    summary = rf"{file.stat().st_size / 1e6:.1f} MB, mean KL 0\.\d+, \d+ of \d+ greedy tokens match the source"
    assert re.fullmatch(summary, err.splitlines()[-1])
    assert open_gguf(file).type == type_
    assert main(["verify", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}: matches its SHA-256\n"
    chat = ["chat", "--model", str(file), "--prompt", "你好", "--max-new-tokens", "8", "--temperature", "0", "--json"]
    assert main(chat) == 0  # greedy: an untrained model would sample a stop token now and then
    answer = json.loads(capsys.readouterr().out)
    assert (answer["finish_reason"], answer["completion_tokens"]) == ("length", 8)


def test_an_existing_file_is_a_one_line_error(toy_native, toy_gguf, capsys):
    assert main(["quantize", str(toy_native), str(toy_gguf)]) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith("exists; choose another name, or move it elsewhere")


def test_an_original_checkpoint_must_be_converted_first(toy_original, tmp_path, capsys):
    assert main(["quantize", str(toy_original), str(tmp_path / "out.gguf")]) == 1
    assert "convert it first: glm convert" in capsys.readouterr().err


def test_a_quantized_file_is_not_quantized_again(toy_gguf, tmp_path, glm):
    error = glm("quantize", toy_gguf, tmp_path / "out.gguf").mistake()
    expected = f"glm: {toy_gguf} is already quantized; pass the converted checkpoint that it was created from"
    assert error == expected


def test_a_prefix_cannot_be_merged(toy_native, tmp_path, glm):
    folder = tmp_path / "prefix"
    folder.mkdir()
    import torch
    from safetensors.torch import save_file

    save_file({"prefix": torch.zeros(8, 2, 3, 32)}, folder / "prefix.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"adapter_type": "ptuning-v2", "pre_seq_len": 3}))
    error = glm("quantize", toy_native, tmp_path / "out.gguf", "--adapter", folder).mistake()
    assert "is a P-Tuning v2 prefix, which cannot be merged into weights" in error
    assert not (tmp_path / "out.gguf").exists()


def test_imatrix_measures_the_importance_on_rows(toy_native, rows_file, tmp_path, glm, sample_rows):
    rows = rows_file(*sample_rows[:8])
    done = glm("quantize", toy_native, tmp_path / "out.gguf", "--type", "q4_k_m", "--imatrix", rows)
    assert (done.code, done.out) == (0, f"{tmp_path / 'out.gguf'}\n")
    assert "measuring the importance matrix on 8 rows of rows.jsonl" in done.err
    error = glm("quantize", toy_native, tmp_path / "other.gguf", "--type", "f16", "--imatrix", rows).mistake()
    assert "--imatrix has no effect on --type f16" in error


@pytest.fixture
def options(monkeypatch):
    """The options that the command passes; nothing is quantized."""
    from entrypoints.quantization import to_gguf
    from entrypoints.quantization.divergence import DivergenceResult

    received = []
    result = (0, DivergenceResult(0.0, 1, 1))
    monkeypatch.setattr(to_gguf, "quantize", lambda options, _: received.append(options) or result)
    return received


def test_q4_0_is_the_default(toy_native, tmp_path, glm, options):
    """The smallest type: sizes are compared in quantization/test_gguf_writer.py."""
    assert glm("quantize", toy_native, tmp_path / "out.gguf").code == 0
    assert options[0].type == "q4_0"


def test_rows_in_gbk_with_histories_are_read_as_in_training(toy_native, tmp_path, glm, options):
    file, command = tmp_path / "rows.jsonl", ["quantize", toy_native, tmp_path / "out.gguf", "--imatrix"]
    row = {"q": "再来一件", "a": "白色长裙", "turns": [["推荐一件衣服", "蓝色上衣"]]}
    file.write_bytes(json.dumps(row, ensure_ascii=False).encode("gb18030") + b"\n{}\n")
    flags = ["--prompt-column", "q", "--response-column", "a", "--history-column", "turns"]
    assert "--encoding gb18030" in glm(*command, file, *flags).mistake()
    done = glm(*command, file, *flags, "--encoding", "gb18030")
    assert done.code == 0, done.err
    assert [turn.content for turn in options[0].rows[0].messages()] == [*row["turns"][0], row["q"], row["a"]]
    assert "1 rows of" in done.err
    assert "cannot be used: see glm data check" in done.err


def test_rows_of_messages_can_be_used(toy_native, rows_file, tmp_path, glm, options):
    turns = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "好"}]
    file = rows_file({"mine": turns})
    command = ["quantize", toy_native, tmp_path / "out.gguf", "--imatrix", file]
    assert glm(*command, "--conversations-column", "mine").code == 0
    assert [turn.content for turn in options[0].rows[0].messages()] == ["你好", "好"]
    assert "--conversations-column" in glm(*command, "--conversations-column", "other").mistake()


@pytest.mark.parametrize(
    ("hidden", "command", "message"),
    [
        ("torch", ["quantize", "DIR", "OUT.gguf"], "package torch; pip install 'glm-entrypoints[transformers]'"),
        ("sentencepiece", ["quantize", "DIR", "OUT.gguf"], "package sentencepiece; pip install"),
        ("torch,gguf", ["quantize", "DIR", "OUT.gguf"], "packages torch, gguf; pip install 'glm-entrypoints[quant"),
        ("torch,bitsandbytes", ["quantize", "DIR", "OUT", "--type", "nf4"], "[qlora,transformers]'"),
        ("torch", ["prepare", "DIR", "STORE"], "package torch; pip install 'glm-entrypoints[transformers]'"),
        ("sentencepiece", ["prepare", "DIR", "STORE"], "package sentencepiece; pip"),
        ("xllamacpp", ["prepare", "DIR", "STORE", "--quantize", "q4_0"], "'glm-entrypoints[quantized]'"),
        ("nltk", ["evaluate", "--model", "DIR", "--test-file", "F", "--output-dir", "OUT"], "'glm-entrypoints[train]'"),
        ("datasets", ["prepare", "demo", "STORE"], "package datasets; pip install 'glm-entrypoints[train]'"),
    ],
)
def test_a_missing_package_is_a_one_line_error_with_the_extra_to_install(hidden, command, message, tmp_path):
    code = (
        "import sys; sys.modules.update(dict.fromkeys(sys.argv[1].split(',')));"
        "from entrypoints.__main__ import main; sys.exit(main(sys.argv[2:]))"
    )
    command = [sys.executable, "-c", code, hidden, *command]
    path = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=tmp_path, env=path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    lines = [line for line in done.stderr.splitlines() if line.startswith("glm: this needs the ")]
    assert len(lines) == 1, done.stderr
    assert message in lines[0]
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_each_extra_contains_the_packages_it_is_named_for():
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert len(EXTRA_BY_PACKAGE) >= 10
    for package, extra in EXTRA_BY_PACKAGE.items():
        assert package.replace("_", "-") in [re.split(r"[^\w-]", line)[0] for line in extras[extra]]
    assert {*QUANTIZATION_PACKAGES, *BITSANDBYTES_PACKAGES, *TRAINING_PACKAGES, *SCORING_PACKAGES} == set(
        EXTRA_BY_PACKAGE
    )


@pytest.mark.slow
@pytest.mark.parametrize("type_", FOLDER_QUANTIZATIONS)
def test_bitsandbytes_needs_no_compiler(type_, toy_native, tmp_path):
    """A PATH without gcc and cc, and no variable that names a compiler."""
    pytest.importorskip("bitsandbytes", reason="needs the package bitsandbytes (extra qlora)")
    code = (
        "import shutil, sys; assert not any(map(shutil.which, ('gcc', 'cc', 'c++', 'clang')));"
        "from entrypoints.__main__ import main; folder, target, type_, load_in = sys.argv[1:];"
        "flags = '--prompt 你好 --max-new-tokens 4 --temperature 0 --json'.split();"
        "sys.exit(main(['quantize', folder, target, '--type', type_]) or main(['chat', '--model', target, *flags])"
        " or main(['chat', '--model', folder, '--load-in', load_in, *flags]))"
    )
    command = [sys.executable, "-c", code, toy_native, tmp_path / "out", type_, FOLDER_QUANTIZATIONS[type_]]
    bare = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
    bare |= {"PATH": str(tmp_path / "nothing"), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(list(map(str, command)), env=bare, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [answer["completion_tokens"] for answer in answers] == [4, 4]


def test_a_cpu_without_avx2_is_rejected_before_llama_cpp_is_loaded(toy_native, toy_gguf, tmp_path, monkeypatch, glm):
    (tmp_path / "cpuinfo").write_text("flags\t\t: fpu sse2 avx f16c\n")
    monkeypatch.setattr(resources, "CPUINFO_FILE", tmp_path / "cpuinfo")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for command in (["quantize", toy_native, tmp_path / "out.gguf"], ["chat", "--model", toy_gguf, "--prompt", "hi"]):
        assert "this CPU has no avx2, bmi2, fma, which this build of llama.cpp needs" in glm(*command).mistake()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "type_"), [("out.gguf", "q4_0"), ("out", "nf4")])
def test_a_disk_that_fills_up_while_writing_leaves_no_output(name, type_, toy_native, tmp_path):
    """A limit on file sizes simulates it: the check before writing does not detect that either."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20));"
        "from entrypoints.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    if type_ == "nf4":
        pytest.importorskip("bitsandbytes", reason="needs the package bitsandbytes (extra qlora)")
    command = [sys.executable, "-c", code, "quantize", toy_native, tmp_path / name, "--type", type_]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert re.search(rf"glm: writing .*{name} failed: .*; free space or check the disk", done.stderr)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def small(toy_native, tmp_path_factory):
    """The tiny model as an int8 folder, created by the command."""
    pytest.importorskip("bitsandbytes", reason="needs the package bitsandbytes (extra qlora)")
    folder = tmp_path_factory.mktemp("small") / "int8"
    assert main(["quantize", str(toy_native), str(folder), "--type", "int8"]) == 0
    return folder


@pytest.mark.slow
def test_an_int8_folder_works_with_every_inference_command(small, rows_file, sample_rows, tmp_path, glm):
    assert f"{small}: 8 files match the manifest" in glm("verify", small).out
    facts = glm("doctor", "--model", small)
    assert (facts.code, "8bit" in facts.out, "loads on" in facts.out) == (0, True, True)
    answer = glm("chat", "--model", small, "--prompt", "你好", "--max-new-tokens", 8, "--temperature", 0, "--json")
    assert json.loads(answer.out)["completion_tokens"] == 8
    rows = rows_file(*sample_rows[:2])
    command = ["evaluate", "--model", small, "--test-file", rows, "--output-dir", tmp_path / "scores"]
    done = glm(*command, "--max-target-length", 8)
    assert done.code == 0, done.err
    assert len((tmp_path / "scores" / "generated_predictions.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("method", ["full", "lora", "freeze"])
def test_an_int8_folder_cannot_be_fine_tuned(method, small, rows_file, sample_rows, tmp_path, glm):
    """Its source can be; QLoRA quantizes the source itself."""
    flags = ["--train-file", rows_file(*sample_rows[:2]), "--output-dir", tmp_path / "out", "--method", method]
    error = glm("train", "--model-name-or-path", small, *flags).mistake()
    assert f"{small} is already quantized: inference only" in error
    assert not (tmp_path / "out").exists()


def test_an_int8_folder_cannot_be_quantized_again(small, tmp_path, glm):
    for name, type_ in (("out.gguf", "q4_0"), ("out", "nf4")):
        assert "is already quantized" in glm("quantize", small, tmp_path / name, "--type", type_).mistake()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--adapter", "lora"], "--type int8 does not support --adapter; merge a LoRA first: glm export"),
        (["--imatrix", "rows.jsonl"], "--imatrix has no effect on --type int8"),
    ],
)
def test_options_that_folders_do_not_support_are_rejected(flags, message, toy_native, tmp_path, glm):
    assert message in glm("quantize", toy_native, tmp_path / "out", "--type", "int8", *flags).mistake()


def test_a_folder_target_that_names_a_file_or_exists_is_rejected(toy_native, tmp_path, glm):
    error = glm("quantize", toy_native, tmp_path / "out.gguf", "--type", "nf4").mistake()
    assert "--type nf4 writes a folder" in error
    (tmp_path / "out").mkdir()
    error = glm("quantize", toy_native, tmp_path / "out", "--type", "nf4").mistake()
    assert error == f"glm: {tmp_path / 'out'} exists; choose another name, or move it elsewhere"
