import importlib.metadata
import platform
import re
import shutil
import sys

import pytest

from entrypoints.checkpoint import ggml
from entrypoints.engines import llamacpp_build, llamacpp_engine, machine
from entrypoints.jobs import doctor


def lines_of(text):
    return {line[:16].strip(): line[17:] for line in text.splitlines()}


def test_every_fact_of_the_machine_has_a_line(glm):
    done = glm("doctor")
    facts = lines_of(done.out)
    assert done.code == 0
    machine = {"memory", "threads", "disk", "/dev/shm", "driver", "toolkit", "processor"}
    assert {"python", *doctor.PACKAGES, *machine, "llama.cpp", "settings"} <= set(facts)
    assert any(name.startswith("gpu") for name in facts)
    assert facts["torch"] == importlib.metadata.version("torch")
    assert re.match(r"\d+\.\d GB available", facts["memory"])
    assert re.match(r"\d+\.\d GB free in /", facts["disk"])
    assert re.fullmatch(r"bfloat16 in hardware: (yes|no)", facts["processor"])


def test_a_package_that_is_not_installed_is_called_missing(monkeypatch, glm):
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    assert lines_of(glm("doctor").out)["no-such-package"] == "missing"


def test_settings_are_shown_without_the_token(monkeypatch, glm):
    monkeypatch.setenv("HF_TOKEN", "hf_QuiteSecret")
    done = glm("doctor")
    assert "hf_token" in lines_of(done.out)["settings"]
    assert "QuiteSecret" not in done.out + done.err


@pytest.mark.parametrize("by", ["flag", "variable"])
def test_a_model_is_checked_and_its_size_and_place_are_told(by, toy_native, monkeypatch, glm):
    monkeypatch.setenv("MODEL_PATH", str(toy_native) if by == "variable" else "/no/such/model")
    done = glm("doctor", *(["--model", toy_native] if by == "flag" else []))
    facts = lines_of(done.out)
    assert facts["model"] == f"{toy_native}, 4 layers, window 1024, files as they should be"
    assert facts["float32"].endswith("GB of weights")
    assert re.fullmatch(r"(cpu|mps|cuda:0) in (float32|bfloat16|float16)", facts["goes to"])


def test_a_broken_model_is_a_mistake_that_names_the_file(toy_native, tmp_path, glm):
    folder = shutil.copytree(toy_native, tmp_path / "native")
    with (folder / "model.safetensors").open("r+b") as weights:
        weights.truncate(1000)
    done = glm("doctor", "--model", folder)
    assert done.code == 1
    assert "model.safetensors" in done.err.splitlines()[-1]
    assert "torch" in lines_of(done.out)  # what is known of the machine is told all the same


def test_a_model_that_does_not_fit_is_a_mistake_with_both_sizes(toy_native, monkeypatch, glm):
    monkeypatch.setenv("DEVICE", "cpu")
    monkeypatch.setattr("entrypoints.engines.placement.available_memory", lambda: 1_000_000)
    done = glm("doctor", "--model", toy_native)
    assert done.code == 1
    assert re.search(r"glm: the model needs [\d.]+ GB of memory in .*, 0\.0 GB are available", done.err)


def test_what_would_fit_which_machine_is_told(toy_native, glm):
    facts = lines_of(glm("doctor", "--model", toy_native).out)
    assert facts["fits here"].startswith("q8_0 (0.0 GB)")
    assert facts["8 GB memory"].startswith("q8_0 (0.0 GB), q5_k_m (0.0 GB)")
    assert facts["counted with"] == "--slots 1 of 1024 tokens; 0.00 GB more for each further slot"
    assert re.fullmatch(r"16 bits \(\d+ windows\), --load-in 8bit .*", facts["6 GB GPU"])


@pytest.mark.parametrize(
    ("find", "unused", "words"),
    [
        (
            lambda: None,
            [],
            "this build of xllamacpp does not show ggml_quantize_chunk: only q4_0, q8_0 and f16 can be made",
        ),
        (ggml._function, [], "all GGUF types of glm quantize"),
        (
            ggml._function,
            ["AVX512", "AMX_INT8"],
            "all GGUF types of glm quantize; faster with AVX512, AMX_INT8: make llamacpp, or LLAMACPP_CPU for an image",
        ),
    ],
)
def test_it_tells_which_types_can_be_made_and_what_would_be_faster(find, unused, words, monkeypatch, glm):
    monkeypatch.setattr(ggml, "_function", find)
    monkeypatch.setattr(llamacpp_build, "unused", lambda: unused)
    assert lines_of(glm("doctor").out)["llama.cpp"] == words


@pytest.mark.parametrize(
    ("hidden", "words"),
    [
        ("xllamacpp", "does not run here: this needs the package xllamacpp; pip install 'glm-entrypoints[quantized]'"),
        ("torch", "runs GGUF files; glm quantize makes none here: this needs the package torch; pip install"),
    ],
)
def test_types_are_not_promised_where_a_package_is_missing(hidden, words, glm, monkeypatch):
    monkeypatch.setitem(sys.modules, hidden, None)
    assert lines_of(glm("doctor").out)["llama.cpp"].startswith(words)


def test_the_processor_is_asked_before_llama_cpp_is(glm, tmp_path, monkeypatch):
    """Its library may end with SIGILL, or promise what it cannot, where the processor lacks what it was built for."""
    (tmp_path / "cpuinfo").write_text("flags\t: sse2 avx f16c\n")
    monkeypatch.setattr(machine, "PROCESSOR", tmp_path / "cpuinfo")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    asked = []
    monkeypatch.setattr(llamacpp_build, "_compiled_for", lambda: asked.append("build") or [])
    monkeypatch.setattr(ggml, "_function", lambda: asked.append("function"))
    words = lines_of(glm("doctor").out)["llama.cpp"]
    assert words.startswith("does not run here: this processor has no avx2, bmi2, fma, which llama.cpp's build needs")
    assert asked == []


def test_a_gguf_file_is_told_with_what_it_needs_and_whether_it_fits(toy_gguf, glm, monkeypatch):
    done = glm("doctor", "--model", toy_gguf)
    facts = lines_of(done.out)
    assert done.code == 0
    assert facts["model"] == f"{toy_gguf}, f16, 4 layers, window 1024"
    assert facts["needs"] == "0.0 GB with --slots 1 of 1024 tokens; 0.00 GB more for each further slot"
    assert re.fullmatch(r"\d+\.\d GB", facts["available"])
    monkeypatch.setattr(llamacpp_engine, "available_memory", lambda: 1_000_000)
    done = glm("doctor", "--model", toy_gguf)
    assert done.code == 1
    assert re.search(r"glm: .*toy\.gguf with 1 slots of 1024 tokens needs 0\.0 GB of memory, 0\.0 GB are", done.err)
