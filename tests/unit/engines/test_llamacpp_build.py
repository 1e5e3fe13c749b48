import platform

import pytest

from entrypoints.engines import llamacpp_build, machine
from entrypoints.errors import UserError

PLAIN = "sse2 avx avx2 bmi2 f16c fma"


@pytest.fixture
def processor(tmp_path, monkeypatch):
    """Sets what the processor is said to be, and what llama.cpp says of its build."""
    pytest.importorskip("xllamacpp")
    import xllamacpp

    def set_to(line, kind="x86_64", build="CPU : AVX2 = 1 | F16C = 1 | REPACK = 1 | "):
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n")
        monkeypatch.setattr(machine, "PROCESSOR", tmp_path / "cpuinfo")
        monkeypatch.setattr(platform, "machine", lambda: kind)
        monkeypatch.setattr(xllamacpp, "get_system_info", lambda: build)

    return set_to


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (f"flags\t: {PLAIN}", "x86_64"),
        ("Features\t: asimd fphp bf16", "aarch64"),
        ("model name\t: says nothing", "x86_64"),
    ],
)
def test_the_published_build_of_llama_cpp_runs_on_what_has_its_flags_or_tells_none(line, kind, processor):
    processor(line, kind)
    llamacpp_build.require_processor()


def test_a_processor_without_the_published_builds_flags_is_refused_by_their_names(processor):
    processor("flags\t: sse2 avx f16c")
    with pytest.raises(UserError, match=r"no avx2, bmi2, fma, which llama\.cpp's build needs"):
        llamacpp_build.require_processor()


def test_a_build_for_a_newer_processor_is_refused_on_an_older_one(processor):
    processor(f"flags\t: {PLAIN} avx512f", build="CPU : AVX2 = 1 | AVX512 = 1 | AVX512_VNNI = 1 | AMX_INT8 = 1 | ")
    with pytest.raises(UserError, match=r"no avx512_vnni, amx_int8.*compiled for another kind: `make llamacpp`"):
        llamacpp_build.require_processor()


def test_what_a_build_leaves_of_the_processor_is_named(processor):
    processor(
        f"flags\t: {PLAIN} avx512f avx512_vnni amx_int8", build="CPU : AVX2 = 1 | AVX512 = 1 | AVX512_VNNI = 0 | "
    )
    assert llamacpp_build.unused() == ["AVX512_VNNI", "AMX_INT8"]
    processor("Features\t: asimd avx512f", "aarch64")
    assert llamacpp_build.unused() == []


def test_the_build_at_hand_runs_here_and_says_what_it_was_compiled_for():
    pytest.importorskip("xllamacpp")
    import xllamacpp

    llamacpp_build.require_processor()
    assert {word.partition("=")[2].strip() for word in xllamacpp.get_system_info().split("|")} >= {"1"}
