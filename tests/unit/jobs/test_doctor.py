import importlib.metadata
import re
import shutil

import pytest

from entrypoints.checkpoint import ggml
from entrypoints.engines import llamacpp_build
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
    assert facts["fits here"].startswith("q8_0 (0.5 GB)")
    assert facts["8 GB memory"].startswith("q8_0 (0.5 GB), q5_k_m (0.5 GB)")
    assert re.fullmatch(r"16 bits \(\d+ windows\), --load-in 8bit .*", facts["6 GB GPU"])


@pytest.mark.parametrize(
    ("find", "unused", "words"),
    [
        (
            lambda: None,
            ["AVX512"],
            "this build of xllamacpp does not show ggml_quantize_chunk: only q4_0, q8_0 and f16 can be made",
        ),
        (ggml._function, [], "all types of glm quantize"),
        (
            ggml._function,
            ["AVX512", "AMX_INT8"],
            "all types of glm quantize; faster with AVX512, AMX_INT8: make llamacpp, or LLAMACPP_CPU for an image",
        ),
    ],
)
def test_it_tells_which_types_can_be_made_and_what_would_be_faster(find, unused, words, monkeypatch, glm):
    monkeypatch.setattr(ggml, "_function", find)
    monkeypatch.setattr(llamacpp_build, "unused", lambda: unused)
    assert lines_of(glm("doctor").out)["llama.cpp"] == words
