import platform

import pytest

from entrypoints.engines.llamacpp import cpu_features
from entrypoints.errors import UserError
from entrypoints.hardware import resources

PLAIN = "sse2 avx avx2 bmi2 f16c fma"


@pytest.fixture
def cpu(tmp_path, monkeypatch):
    """Sets the reported CPU, and the features that the build of llama.cpp reports."""
    pytest.importorskip("xllamacpp")
    import xllamacpp

    def set_to(line, machine="x86_64", build="CPU : AVX2 = 1 | F16C = 1 | REPACK = 1 | "):
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n")
        monkeypatch.setattr(resources, "CPUINFO_FILE", tmp_path / "cpuinfo")
        monkeypatch.setattr(platform, "machine", lambda: machine)
        monkeypatch.setattr(xllamacpp, "get_system_info", lambda: build)
        monkeypatch.setattr(cpu_features, "_variants_folder", lambda: None)

    return set_to


@pytest.mark.parametrize(
    ("line", "machine"),
    [
        (f"flags\t: {PLAIN}", "x86_64"),
        ("Features\t: asimd fphp bf16", "aarch64"),
        ("model name\t: says nothing", "x86_64"),
    ],
)
def test_the_published_build_runs_on_cpus_that_have_its_flags_or_report_none(line, machine, cpu):
    cpu(line, machine)
    cpu_features.load_cpu_code()


def test_a_cpu_without_the_flags_of_the_published_build_is_rejected_with_their_names(cpu):
    cpu("flags\t: sse2 avx f16c")
    with pytest.raises(UserError, match=r"no avx2, bmi2, fma, which this build of llama\.cpp needs"):
        cpu_features.load_cpu_code()


def test_a_build_for_a_newer_cpu_is_rejected_on_an_older_one(cpu):
    cpu(f"flags\t: {PLAIN} avx512f", build="CPU : AVX2 = 1 | AVX512 = 1 | AVX512_VNNI = 1 | AMX_INT8 = 1 | ")
    with pytest.raises(UserError, match=r"no avx512_vnni, amx_int8.*for another CPU: install the published xllamacpp"):
        cpu_features.load_cpu_code()


def test_features_that_a_build_does_not_use_are_named(cpu):
    cpu(f"flags\t: {PLAIN} avx512f avx512_vnni amx_int8", build="CPU : AVX2 = 1 | AVX512 = 1 | AVX512_VNNI = 0 | ")
    assert cpu_features.unused_cpu_features() == ["AVX512_VNNI", "AMX_INT8"]
    cpu("Features\t: asimd avx512f", "aarch64")
    assert cpu_features.unused_cpu_features() == []


def test_the_installed_build_runs_here_and_reports_its_features():
    pytest.importorskip("xllamacpp")
    import xllamacpp

    cpu_features.load_cpu_code()
    assert {word.partition("=")[2].strip() for word in xllamacpp.get_system_info().split("|")} >= {"1"}
