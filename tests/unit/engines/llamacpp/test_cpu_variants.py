"""The package with a library for each kind of CPU: every one that runs here, forced by hiding the others."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from entrypoints.chat_format.sampling import Sampling
from entrypoints.engines.llamacpp.cpu_features import VARIANTS_PACKAGE
from entrypoints.hardware.resources import cpu_flags

X86_VARIANTS = {  # from the narrowest to the widest, with the Linux flags that each needs
    "haswell": {"avx2", "bmi2", "f16c", "fma"},
    "alderlake": {"avx2", "avx_vnni"},
    "skylakex": {"avx512f", "avx512vl"},
    "cascadelake": {"avx512f", "avx512_vnni"},
    "sapphirerapids": {"avx512vbmi", "avx512_bf16", "amx_int8"},
}
PROGRAM = """
import json, sys
from pathlib import Path
from entrypoints.chat_format.sampling import Sampling
from entrypoints.engines.llamacpp.cpu_features import loaded_variant
from entrypoints.engines.llamacpp.engine import LlamaCppEngine
from entrypoints.engines.options import EngineOptions
engine = LlamaCppEngine.load(Path(sys.argv[1]), EngineOptions(threads=2))
greedy = Sampling(max_new_tokens=24, temperature=0)
answers = [[int(id_) for id_ in engine.generate(prompt, greedy)] for prompt in json.loads(sys.argv[2])]
print(json.dumps([loaded_variant(), answers]))
engine.close()
"""


@pytest.fixture(scope="module")
def package() -> Path:
    """The installed package."""
    spec = importlib.util.find_spec(VARIANTS_PACKAGE)
    if spec is None or importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("only the published build of llama.cpp is installed; make llamacpp adds the variants")
    return Path(spec.submodule_search_locations[0])


@pytest.fixture
def run_with(package, tmp_path):
    """Runs PROGRAM with only these variants in the package."""
    hiding = tmp_path / VARIANTS_PACKAGE

    def run(names, *arguments):
        shutil.copytree(package, hiding, ignore=shutil.ignore_patterns("libggml-cpu-*", "__pycache__"))
        for name in names:
            shutil.copy(package / f"libggml-cpu-{name}.so", hiding)
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
        command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)

    return run


def test_the_package_has_the_variants_of_this_list(package):
    installed = {file.stem.removeprefix("libggml-cpu-") for file in package.glob("libggml-cpu-*.so")}
    assert installed == set(X86_VARIANTS)


@pytest.mark.parametrize("name", X86_VARIANTS)
def test_each_variant_that_this_cpu_can_run_answers_as_transformers(
    name, run_with, toy_gguf, toy_engine, prompts, same_but_for_ties
):
    if not X86_VARIANTS[name] <= cpu_flags():
        pytest.skip(f"this CPU lacks {', '.join(sorted(X86_VARIANTS[name] - cpu_flags()))}")
    done = run_with([name], toy_gguf, json.dumps(prompts))
    assert done.returncode == 0, done.stderr
    loaded, answers = json.loads(done.stdout)
    assert loaded == name
    greedy = Sampling(max_new_tokens=24, temperature=0)
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = [int(id_) for id_ in toy_engine.generate(prompt, greedy)]
        same_but_for_ties(answer, expected, toy_engine.model, prompt, greedy)


def test_the_widest_variant_that_runs_here_is_loaded(run_with, toy_gguf, prompts):
    runnable = [name for name, flags in X86_VARIANTS.items() if flags <= cpu_flags()]
    done = run_with(X86_VARIANTS, toy_gguf, json.dumps(prompts[:1]))
    assert json.loads(done.stdout)[0] == runnable[-1]


def test_without_a_variant_for_this_cpu_the_code_of_the_library_answers(run_with, toy_gguf, prompts, llama):
    done = run_with([], toy_gguf, json.dumps(prompts[:1]))
    greedy = Sampling(max_new_tokens=24, temperature=0)
    assert json.loads(done.stdout) == [None, [[int(id_) for id_ in llama.generate(prompts[0], greedy)]]]


def test_a_variant_in_the_working_directory_is_not_loaded(run_with, package, toy_gguf, tmp_path):
    """llama.cpp's own search would include it: whoever can write there could run code."""
    shutil.copy(package / "libggml-cpu-haswell.so", tmp_path)
    assert json.loads(run_with([], toy_gguf, "[]").stdout) == [None, []]


def test_variants_of_another_version_are_rejected_with_the_remedy(package, tmp_path, toy_gguf, run_with):
    run_with(["haswell"], toy_gguf, "[]")
    (tmp_path / VARIANTS_PACKAGE / "VERSION").write_text("1.0")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-m", "entrypoints", "chat", "--model", str(toy_gguf), "--prompt", "a"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 1
    assert re.fullmatch(r"glm: .* was compiled for another version than xllamacpp .*; run make llamacpp\n", done.stderr)


def test_nothing_is_printed_when_a_variant_is_loaded(run_with, package, toy_gguf):
    assert run_with(["haswell"], toy_gguf, "[]").stderr == ""
