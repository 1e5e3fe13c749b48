"""What `make` says before it starts anything, and what keeps containers from a machine's GPUs."""

import os
import subprocess
from pathlib import Path

import pytest
from containers import REPOSITORY

RUNTIMES = {"without": '{"runc":{}}', "with": '{"nvidia":{},"runc":{}}'}


def make(*words: str) -> subprocess.CompletedProcess:
    outer = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")  # of the make that may run these tests
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    return subprocess.run(
        ["make", *words], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def machine(tmp_path: Path):
    """A PATH on which only the given programs answer, each with its text or with exit code 1; runs gpu-ready there."""

    def run(**programs: str | None) -> subprocess.CompletedProcess:
        for name in ("bash", "env"):
            (tmp_path / name).symlink_to(f"/usr/bin/{name}")
        for name, text in programs.items():
            file = tmp_path / name.replace("_", "-")
            file.write_text(
                "#!/usr/bin/bash\n" + ("exit 1\n" if text is None else f"echo '{text}'\n"), encoding="utf-8"
            )
            file.chmod(0o755)
        command = [str(REPOSITORY / "compose" / "gpu-ready")]
        return subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)

    return run


@pytest.mark.parametrize(
    ("programs", "lacks"),
    [
        ({}, "no NVIDIA driver answers"),
        ({"nvidia_smi": None}, "no NVIDIA driver answers"),
        ({"nvidia_smi": "H100"}, "the NVIDIA Container Toolkit is not; install the package nvidia-container-toolkit"),
        ({"nvidia_smi": "H100", "nvidia_ctk": ""}, "no Docker engine answers"),
        ({"nvidia_smi": "H100", "nvidia_ctk": "", "docker": None}, "no Docker engine answers"),
        (
            {"nvidia_smi": "H100", "nvidia_ctk": "", "docker": RUNTIMES["without"]},
            "the Docker engine does not know the toolkit; run: sudo nvidia-ctk runtime configure --runtime=docker",
        ),
    ],
)
def test_what_a_container_lacks_to_use_a_gpu_is_named(machine, programs, lacks):
    if Path("/etc/cdi/nvidia.yaml").exists():
        pytest.skip("this machine hands out its GPUs by CDI")
    done = machine(**programs)
    assert done.returncode == 1
    assert lacks in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_machine_whose_gpus_are_ready_is_told_so(machine):
    done = machine(nvidia_smi="H100", nvidia_ctk="", docker=RUNTIMES["with"])
    assert (done.returncode, done.stdout) == (0, "GPUs in containers: driver, toolkit and engine are ready\n")


@pytest.mark.parametrize(
    ("words", "lacks"),
    [
        (["serve"], "MODEL is not set: make serve MODEL=..."),
        (["train", "MODEL=x"], "TRAIN_FILE is not set: make train MODEL=... TRAIN_FILE=..."),
        (["evaluate", "MODEL=x", "WITH=compose"], "TEST_FILE is not set: make evaluate MODEL=... TEST_FILE=..."),
        (["chat"], "MODEL is not set: make chat MODEL=..."),
        (["quantize"], "MODEL is not set: make quantize MODEL=..."),
        (["export"], "CKPT is not set: make export CKPT=..."),
    ],
)
def test_what_a_target_needs_is_asked_for_first(words, lacks):
    done = make(*words)
    assert done.returncode == 2
    assert lacks in done.stderr
    assert done.stdout == ""


def test_a_folder_and_a_file_of_this_machine_become_a_mount_and_a_name(toy_native, tmp_path):
    rows = tmp_path / "rows.jsonl"
    done = make("--dry-run", "train", "WITH=compose", f"MODEL={toy_native}", f"TRAIN_FILE={rows}", "RUN=mine")
    assert f"FOLDERS_DIR={toy_native.parent} MODEL={toy_native.name}" in done.stdout.replace("/ MODEL", " MODEL")
    assert f"DATA_DIR={tmp_path}/ TRAIN_FILE=rows.jsonl" in done.stdout
    assert "RUN=mine" in done.stdout
    assert "--profile train run --rm train" in done.stdout


def test_the_first_job_quantises_into_the_asked_type():
    done = make("--dry-run", "quantize", "WITH=compose", "MODEL=demo", "TYPE=q8_0")
    assert done.stdout == "MODEL=demo  RUN=tuned QUANTIZE=q8_0 docker compose run --rm model-init\n"


@pytest.mark.parametrize(
    ("type_", "target"), [("q8_0", "output/demo-q8_0.gguf"), ("int8", "output/demo-int8"), ("nf4", "output/demo-nf4")]
)
def test_a_type_that_makes_a_folder_gets_the_name_of_one(type_, target):
    done = make("--dry-run", "quantize", "MODEL=models/demo", f"TYPE={type_}")
    assert f" quantize models/demo {target} --type {type_}" in done.stdout


def test_a_checkpoint_is_exported_beside_itself(tmp_path):
    done = make("--dry-run", "export", f"CKPT={tmp_path}/checkpoint-3", "MODEL=models/demo")
    assert f" export {tmp_path}/checkpoint-3 {tmp_path}/checkpoint-3-export --base models/demo" in done.stdout


@pytest.mark.parametrize(("engine", "profile"), [("auto", "cpu"), ("vllm", "gpu"), ("transformers", "gpu-int4")])
def test_an_engine_has_its_profile(engine, profile):
    done = make("--dry-run", "serve", "WITH=compose", "MODEL=demo", f"ENGINE={engine}")
    assert f"--profile {profile} up" in done.stdout
