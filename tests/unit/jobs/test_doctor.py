"""`glm doctor`: a line for every fact, and an error for a model that is damaged or too large."""

import dataclasses
import importlib.metadata
import platform
import re
import shutil
import sys
from pathlib import Path

import pytest

from entrypoints.engines.llamacpp import cpu_features, engine
from entrypoints.hardware import resources
from entrypoints.jobs import doctor
from entrypoints.settings import Settings


def lines_of(text):
    return {line[:16].strip(): line[17:] for line in text.splitlines()}


def test_every_fact_about_the_machine_has_a_line(glm):
    done = glm("doctor")
    facts = lines_of(done.out)
    assert done.code == 0
    machine = {"memory", "cpus", "disk", "/dev/shm", "driver", "toolkit", "cpu"}
    assert {"python", *doctor.PACKAGES, *machine, "llama.cpp", "settings"} <= set(facts)
    assert any(name.startswith("gpu") for name in facts)
    assert facts["torch"] == importlib.metadata.version("torch")
    assert re.match(r"\d+\.\d GB available", facts["memory"])
    assert re.match(r"\d+\.\d GB free in /", facts["disk"])
    assert re.fullmatch(r"bfloat16 in hardware: (yes|no)", facts["cpu"])


def test_a_package_that_is_not_installed_is_missing(monkeypatch, glm):
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    assert lines_of(glm("doctor").out)["no-such-package"] == "missing"


def test_the_variables_that_are_set_are_shown_without_the_token(monkeypatch, glm):
    for name in (field.name.upper() for field in dataclasses.fields(Settings)):
        monkeypatch.delenv(name, raising=False)
    assert lines_of(glm("doctor").out)["settings"] == "defaults"
    monkeypatch.setenv("HF_TOKEN", "hf_QuiteSecret")
    monkeypatch.setenv("DEVICE", "cpu")
    done = glm("doctor")
    assert lines_of(done.out)["settings"] == "DEVICE=cpu, HF_TOKEN=(set)"
    assert "QuiteSecret" not in done.out + done.err


@pytest.mark.parametrize("by", ["flag", "variable"])
def test_a_model_is_checked_and_its_size_and_device_are_shown(by, toy_native, monkeypatch, glm):
    monkeypatch.setenv("MODEL_PATH", str(toy_native) if by == "variable" else "/no/such/model")
    done = glm("doctor", *(["--model", toy_native] if by == "flag" else []))
    facts = lines_of(done.out)
    assert facts["model"] == f"{toy_native}, 4 layers, context length 1024, files valid"
    assert facts["float32"].endswith("MB of weights")
    assert re.fullmatch(r"(cpu|mps|cuda:0) in (float32|bfloat16|float16)", facts["loads on"])


def test_a_damaged_model_is_an_error_that_names_the_file(toy_native, tmp_path, glm):
    folder = shutil.copytree(toy_native, tmp_path / "native")
    with (folder / "model.safetensors").open("r+b") as weights:
        weights.truncate(1000)
    done = glm("doctor", "--model", folder)
    assert done.code == 1
    assert "model.safetensors" in done.err.splitlines()[-1]
    assert "torch" in lines_of(done.out)  # the facts about the machine are printed before


def test_a_model_that_does_not_fit_is_an_error_with_both_sizes(toy_native, monkeypatch, glm):
    monkeypatch.setenv("DEVICE", "cpu")
    monkeypatch.setattr("entrypoints.hardware.placement.available_memory", lambda: 1_000_000)
    done = glm("doctor", "--model", toy_native)
    assert done.code == 1
    assert re.search(r"glm: the model needs \d+\.\d MB of memory in .*, 1\.0 MB are available", done.err)


def test_the_formats_that_fit_in_each_memory_size_are_shown(toy_native, glm):
    facts = lines_of(glm("doctor", "--model", toy_native).out)
    assert re.match(r"q8_0 \(\d+\.\d MB\), q5_k_m \(\d+\.\d MB\)", facts["fits here"])
    assert facts["8 GB memory"].startswith("q8_0 (")
    assert re.fullmatch(r"--slots 1 of 1024 tokens; each further slot takes \d+\.\d\d MB", facts["assumes"])
    assert re.fullmatch(r"16 bits \(\d+ full contexts\), --load-in 8bit .*", facts["6 GB GPU"])


@pytest.mark.parametrize(
    ("unused", "variant", "message"),
    [
        ([], None, "all GGUF types of glm quantize"),
        ([], "cascadelake", "all GGUF types of glm quantize; CPU code: cascadelake"),
        (
            ["AVX512", "AMX_INT8"],
            None,
            "all GGUF types of glm quantize; faster with AVX512, AMX_INT8: make llamacpp",
        ),
    ],
)
def test_the_loaded_cpu_code_or_the_cpu_features_that_the_build_does_not_use_are_named(
    unused, variant, message, monkeypatch, glm
):
    monkeypatch.setattr(cpu_features, "unused_cpu_features", lambda: unused)
    monkeypatch.setattr(cpu_features, "load_cpu_code", lambda: variant)
    assert lines_of(glm("doctor").out)["llama.cpp"] == message


@pytest.mark.parametrize(
    ("hidden", "message"),
    [
        ("xllamacpp", "cannot run: this needs the package xllamacpp; pip install 'glm-entrypoints[quantized]'"),
        ("torch", "runs GGUF files; glm quantize cannot run: this needs the package torch; pip install"),
    ],
)
def test_a_missing_package_for_gguf_files_is_reported(hidden, message, glm, monkeypatch):
    monkeypatch.setitem(sys.modules, hidden, None)
    assert lines_of(glm("doctor").out)["llama.cpp"].startswith(message)


def test_cpu_features_are_checked_before_llama_cpp_is_loaded(glm, tmp_path, monkeypatch):
    """On a CPU without the features of its build the library can end with SIGILL."""
    (tmp_path / "cpuinfo").write_text("flags\t: sse2 avx f16c\n")
    monkeypatch.setattr(resources, "CPUINFO_FILE", tmp_path / "cpuinfo")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(cpu_features, "_variants_folder", lambda: None)
    monkeypatch.setattr(cpu_features, "_compiled_features", lambda: pytest.fail("loaded llama.cpp"))
    line = lines_of(glm("doctor").out)["llama.cpp"]
    assert line.startswith("cannot run: this CPU has no avx2, bmi2, fma, which this build of llama.cpp needs")


def test_a_gguf_file_is_shown_with_the_memory_it_needs(toy_gguf, glm, monkeypatch):
    done = glm("doctor", "--model", toy_gguf)
    facts = lines_of(done.out)
    assert done.code == 0
    assert facts["model"] == f"{toy_gguf}, f16, 4 layers, context length 1024"
    assert re.fullmatch(r"\d+\.\d MB with --slots 1 of 1024 tokens; each .* takes \d+\.\d\d MB", facts["needs"])
    assert re.fullmatch(r"\d+\.\d GB", facts["available"])
    monkeypatch.setattr(engine, "available_memory", lambda: 1_000_000)
    done = glm("doctor", "--model", toy_gguf)
    assert done.code == 1
    assert re.search(
        r"glm: .*toy\.gguf with --slots 1 of 1024 tokens needs \d+\.\d MB of memory, 1\.0 MB are", done.err
    )


def test_serving_is_planned_for_a_gpu_that_this_machine_lacks_and_without_the_weights(glm):
    done = glm("doctor", "--model", "THUDM/chatglm3-6b", "--gpu-memory", "rtx 4090")
    facts = lines_of(done.out)
    assert done.code == 0
    assert facts["model"] == "THUDM/chatglm3-6b, 28 layers, context length 8192"
    assert facts["gpu"] == "RTX 4090, 24.0 GB"
    assert facts["disk"] == "12.5 GB as downloaded, and 12.5 GB converted"
    assert facts["command"] == "glm serve --model DIR --engine vllm --slots 64"
    assert facts["users"] == "245 at 20 tokens/s each"  # as in the table of k8s/README.md
    assert facts["assumes"].startswith("prompts of 800 tokens, answers of 250, a pause of 60 s, --slots 64, 70% load")
    assert "  vllm           16 bits; requests at once: 30 of 8,192 tokens or 60 of 4,096 tokens or 236 of" in done.out


def test_the_users_of_a_gpu_without_a_name_are_not_guessed(glm):
    facts = lines_of(glm("doctor", "--model", "chatglm3-6b", "--gpu-memory", "24").out)
    assert facts["gpu"] == "24.0 GB"
    assert facts["users"].startswith("unknown; calculated for a named card")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpu-memory", "24"], "glm: --gpu-memory needs a model; add --model DIR, or a name such as --model THUDM"),
        (["--gpu-memory", "24", "--model", "m.gguf"], "glm: m.gguf runs on CPUs, not on a GPU; name the model folder"),
        (["--gpu-memory", "4", "--model", "chatglm3-6b"], "glm: no precision of the model fits on a GPU of 4.0 GB"),
        (["--gpu-memory", "x", "--model", "chatglm3-6b"], "glm: --gpu-memory x is neither a known card nor"),
    ],
)
def test_a_plan_that_cannot_be_made_is_an_error_with_the_remedy(flags, message, monkeypatch, glm):
    monkeypatch.delenv("MODEL_PATH", raising=False)
    done = glm("doctor", *flags)
    assert done.code == 1
    assert done.err.startswith(message)


def test_a_model_without_weights_is_planned_for_the_usual_sizes_of_memory(toy_native, tmp_path, glm):
    shutil.copy(toy_native / "config.json", tmp_path)
    facts = lines_of(glm("doctor", "--model", tmp_path).out)
    assert facts["model"] == f"{tmp_path}, 4 layers, context length 1024, without weights"
    assert facts["8 GB memory"].startswith("q8_0 (")


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_the_documentation_shows_the_plan_as_it_is_printed(page, glm):
    text = (Path(doctor.__file__).parents[1] / "doctor" / page).read_text(encoding="utf-8")
    shown = text.split('--gpu-memory "RTX 4090"\n')[1].split("```")[0].splitlines()
    printed = glm("doctor", "--model", "THUDM/chatglm3-6b", "--gpu-memory", "RTX 4090").out.splitlines()
    assert len(shown) > 6
    assert [line for line in shown if line not in printed] == ["  …"]
