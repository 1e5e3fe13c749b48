import importlib.metadata
import itertools
import platform

import pytest

from entrypoints.engines.llamacpp import cpu_features, server
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
        monkeypatch.setattr(cpu_features, "VARIANTS", cpu_features.ALL_VARIANTS[machine])
        monkeypatch.setattr(xllamacpp, "get_system_info", lambda: build)
        monkeypatch.setattr(cpu_features, "_variants_folder", lambda: None)

    return set_to


@pytest.fixture
def variants(tmp_path, monkeypatch):
    """A folder with an empty file for each variant; loading one only records its name."""
    loaded = []
    for name in itertools.chain(*cpu_features.ALL_VARIANTS.values()):
        (tmp_path / f"libggml-cpu-{name}.so").touch()
    monkeypatch.setattr(cpu_features, "_variants_folder", lambda: tmp_path)
    monkeypatch.setattr(cpu_features, "_replace_cpu_code", loaded.append)
    return loaded


# /proc/cpuinfo of Arm servers, as Linux prints it there
KUNPENG_920 = (
    "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma dcpop asimddp asimdfhm"
)
GRAVITON_3 = f"{KUNPENG_920} lrcpc sha3 sha512 sve i8mm bf16 rng"
GRAVITON_4 = f"{GRAVITON_3} sve2 sveaes svebitperm svei8mm svebf16"


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
    cpu(f"Features\t: {KUNPENG_920}", "aarch64", build="CPU : NEON = 1 | ARM_FMA = 1 | LLAMAFILE = 1 | ")
    assert cpu_features.unused_cpu_features() == ["DOTPROD", "FP16_VA"]


def test_an_arm_build_for_a_newer_cpu_is_rejected_on_an_older_one(cpu):
    cpu("Features\t: fp asimd crc32", "aarch64", build="CPU : NEON = 1 | ARM_FMA = 1 | DOTPROD = 1 | ")
    with pytest.raises(UserError, match=r"no asimddp.*for another CPU: install the published xllamacpp"):
        cpu_features.load_cpu_code()


AVX512 = f"{PLAIN} avx512f avx512cd avx512bw avx512dq avx512vl"
SKYLAKE, ALDER_LAKE, CASCADE_LAKE = AVX512, f"{PLAIN} avx_vnni", f"{AVX512} avx512_vnni"
ZEN4 = f"{AVX512} avx512ifma avx512vbmi avx512_vnni avx512_bf16"
SAPPHIRE_RAPIDS = f"{ZEN4} avx_vnni avx512_fp16 amx_bf16 amx_tile amx_int8"


X86 = {
    "haswell": (PLAIN, None),
    "knights-landing": (f"{PLAIN} avx512f", None),  # the first CPUs with AVX-512 had only this part of it
    "alderlake": (ALDER_LAKE, "alderlake"),
    "skylakex": (SKYLAKE, "skylakex"),
    "cascadelake": (CASCADE_LAKE, "cascadelake"),
    "zen4": (ZEN4, "cascadelake"),
    "sapphirerapids": (SAPPHIRE_RAPIDS, "sapphirerapids"),
    "no-amx": (SAPPHIRE_RAPIDS.replace("amx_tile", ""), "cascadelake"),  # a kernel without AMX
}
ARM = {
    "cortex-a72": ("fp asimd evtstrm aes pmull sha1 sha2 crc32", None),
    "kunpeng-920": (KUNPENG_920, "armv8.2_2"),
    "apple-m2": (f"{KUNPENG_920} i8mm bf16", "armv8.2_2"),  # in a virtual machine: no SVE
    "graviton-3": (GRAVITON_3, "armv8.6_1"),
    "graviton-4": (GRAVITON_4, "armv8.6_2"),
}
CPUS = [("x86_64", "flags", *X86[cpu]) for cpu in X86] + [("aarch64", "Features", *ARM[cpu]) for cpu in ARM]


@pytest.mark.parametrize(("machine", "field", "flags", "name"), CPUS, ids=[*X86, *ARM])
def test_the_widest_variant_that_the_cpu_runs_is_loaded(
    machine, field, flags, name, cpu, variants, tmp_path, monkeypatch
):
    cpu(f"{field}\t: {flags}", machine, build="CPU : LLAMAFILE = 1 | ")
    monkeypatch.setattr(cpu_features, "_variants_folder", lambda: tmp_path)
    assert cpu_features.load_cpu_code() == name
    assert [file.name for file in variants] == ([f"libggml-cpu-{name}.so"] if name else [])
    assert cpu_features.unused_cpu_features() == []


def test_a_cpu_below_the_narrowest_code_is_rejected_although_variants_are_installed(cpu, variants):
    cpu("flags\t: sse2 avx f16c")
    with pytest.raises(
        UserError, match=r"no avx2, bmi2, fma, which this build of llama\.cpp needs; use another machine"
    ):
        cpu_features.load_cpu_code()
    assert variants == []


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("1.0", r"belongs to xllamacpp 1\.0, not [\d.]+; run make llamacpp"),
        (None, "cannot load .*; run make llamacpp, or"),
    ],
    ids=["another-version", "damaged"],
)
def test_a_variant_that_does_not_fit_the_library_is_rejected_with_the_remedy(version, message, tmp_path):
    pytest.importorskip("xllamacpp")
    (tmp_path / "VERSION").write_text(version or importlib.metadata.version("xllamacpp"))
    (tmp_path / "libggml-cpu-skylakex.so").write_bytes(b"no library")
    with pytest.raises(UserError, match=message):
        cpu_features._replace_cpu_code(tmp_path / "libggml-cpu-skylakex.so")


def test_every_server_of_llama_cpp_loads_the_cpu_code_first(tmp_path, monkeypatch):
    """Also one that is started without an engine, as benchmarks do."""
    pytest.importorskip("xllamacpp")
    loaded = []
    monkeypatch.setattr(server, "load_cpu_code", lambda: loaded.append(True))
    server.common_parameters(tmp_path / "model.gguf", use_mmap=False, threads=1)
    assert loaded


def test_the_installed_build_runs_here_and_reports_its_features():
    pytest.importorskip("xllamacpp")
    import xllamacpp

    cpu_features.load_cpu_code()
    assert {word.partition("=")[2].strip() for word in xllamacpp.get_system_info().split("|")} >= {"1"}
