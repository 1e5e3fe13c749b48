"""Errors of `make` before anything starts, and the diagnosis of GPUs in containers."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from containers import REPOSITORY

RUNTIMES = {"without": '{"runc":{}}', "with": '{"nvidia":{},"runc":{}}', "cdi": '{"runc":{}} ["/etc/cdi"]'}


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    outer = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")  # set if make runs these tests
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    return subprocess.run(
        ["make", *arguments], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def machine(tmp_path: Path):
    """Run gpu-ready with a PATH of fake programs, each of which prints a text, or exits with 1 for None."""

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
    ("programs", "message"),
    [
        ({}, "the NVIDIA driver does not respond"),
        ({"nvidia_smi": None}, "the NVIDIA driver does not respond"),
        (
            {"nvidia_smi": "H100"},
            "the NVIDIA Container Toolkit is not installed; install the package nvidia-container-toolkit",
        ),
        ({"nvidia_smi": "H100", "nvidia_ctk": ""}, "the Docker engine does not respond"),
        ({"nvidia_smi": "H100", "nvidia_ctk": "", "docker": None}, "the Docker engine does not respond"),
        (
            {"nvidia_smi": "H100", "nvidia_ctk": "", "docker": RUNTIMES["without"]},
            "not configured for the toolkit; run: sudo nvidia-ctk runtime configure --runtime=docker",
        ),
    ],
)
def test_the_missing_requirement_for_gpus_in_containers_is_reported(machine, programs, message):
    if Path("/etc/cdi/nvidia.yaml").exists():
        pytest.skip("this machine provides its GPUs through CDI")
    done = machine(**programs)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_machine_with_working_gpus_is_reported_as_ready(machine):
    done = machine(nvidia_smi="H100", nvidia_ctk="", docker=RUNTIMES["with"])
    assert (done.returncode, done.stdout) == (0, "GPUs in containers: driver, toolkit and engine are ready\n")


@pytest.mark.parametrize(("ids", "runtimes", "code"), [("0,2", "with", 0), ("0", "cdi", 0), ("0,2", "cdi", 1)])
def test_several_gpu_ids_need_the_runtime_of_the_toolkit(tmp_path: Path, ids, runtimes, code):
    """Compose passes `0,2` as one name; the runtime divides it, CDI knows no such device."""
    for name, text in {"nvidia-smi": "H100", "nvidia-ctk": "", "docker": RUNTIMES[runtimes]}.items():
        (tmp_path / name).write_text(f"#!/usr/bin/bash\necho '{text}'\n")
        (tmp_path / name).chmod(0o755)
    script = (REPOSITORY / "compose" / "gpu-ready").read_text().replace("/etc/cdi", str(tmp_path))
    (tmp_path / "nvidia.yaml").touch()
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "GPU_IDS": ids}
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert ("set NUM_GPUS instead" in done.stderr) is bool(code)


def test_num_gpus_0_trains_on_cpus_and_needs_no_gpu_to_be_ready():
    done = make("--dry-run", "train", "MODEL=demo", "TRAIN_FILE=rows.jsonl", "NUM_GPUS=0")
    assert "--num-gpus 0" in done.stdout
    done = make("--dry-run", "train", "MODEL=demo", "TRAIN_FILE=rows.jsonl", "NUM_GPUS=0", "WITH=compose")
    assert "NUM_GPUS=0 RUN=tuned" in done.stdout
    assert "gpu-ready" not in done.stdout
    done = make("--dry-run", "train", "MODEL=demo", "TRAIN_FILE=rows.jsonl", "NUM_GPUS=2", "WITH=compose")
    assert "NUM_GPUS=2 RUN=tuned" in done.stdout
    assert "gpu-ready" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve"], "MODEL is not set: make serve MODEL=..."),
        (["train", "MODEL=x"], "TRAIN_FILE is not set: make train MODEL=... TRAIN_FILE=..."),
        (["evaluate", "MODEL=x", "WITH=compose"], "TEST_FILE is not set: make evaluate MODEL=... TEST_FILE=..."),
        (["chat"], "MODEL is not set: make chat MODEL=..."),
        (["quantize"], "MODEL is not set: make quantize MODEL=..."),
        (["export"], "CKPT is not set: make export CKPT=..."),
        (["switch"], "MODEL is not set: make switch MODEL=..."),
        (["restore"], "BACKUP is not set: make restore BACKUP=..."),
    ],
)
def test_a_missing_variable_of_a_target_is_reported_first(arguments, message):
    done = make(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("goal", "name"),
    [
        ("train", "TRAIN_FILE"),
        ("train", "MODEL"),
        ("evaluate", "TEST_FILE"),
        ("export", "CKPT"),
        ("export", "MODEL"),
        ("restore", "BACKUP"),
        ("quantize", "OUTPUT"),
    ],
)
@pytest.mark.parametrize("where", ["local", "compose"])
def test_a_path_with_a_blank_is_reported_first(goal, name, where):
    given = dict.fromkeys(("MODEL", "TRAIN_FILE", "TEST_FILE", "CKPT", "BACKUP"), "x") | {name: "my files/x"}
    done = make(goal, f"WITH={where}", *(f"{each}={value}" for each, value in given.items()))
    assert (done.returncode, done.stdout) == (2, "")
    expected = f"{name} has a blank, which make cannot pass on: rename my files/x, or use the glm command"
    assert expected in done.stderr


def test_a_variable_that_a_target_does_not_use_may_have_a_blank():
    """MODEL may be in the environment of a developer."""
    assert make("--dry-run", "lint", "MODEL=Model T").returncode == 0


def test_a_local_folder_and_a_local_file_become_a_mount_and_a_name(toy_native, tmp_path):
    rows = tmp_path / "rows.jsonl"
    done = make("--dry-run", "train", "WITH=compose", f"MODEL={toy_native}", f"TRAIN_FILE={rows}", "RUN=mine")
    assert f"FOLDERS_DIR={toy_native.parent} MODEL={toy_native.name}" in done.stdout.replace("/ MODEL", " MODEL")
    assert f"DATA_DIR={tmp_path}/ TRAIN_FILE=rows.jsonl" in done.stdout
    assert "RUN=mine" in done.stdout
    assert "--profile train run --rm train" in done.stdout


def test_a_local_lora_becomes_a_mount_and_a_name(tmp_path):
    """A folder of PEFT has no config.json; `glm prepare` merges it."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "adapter_config.json").write_text("{}")
    done = make("--dry-run", "serve", "WITH=compose", f"MODEL={tmp_path}/mine")
    assert f"FOLDERS_DIR={tmp_path} MODEL=mine" in done.stdout.replace("/ MODEL", " MODEL")


def test_model_init_quantizes_to_the_requested_type():
    done = make("--dry-run", "quantize", "WITH=compose", "MODEL=demo", "TYPE=q8_0")
    assert done.stdout == "MODEL=demo  RUN=tuned QUANTIZE=q8_0 docker compose run --rm model-init\n"


@pytest.mark.parametrize(
    ("type_", "target"), [("q8_0", "output/demo-q8_0.gguf"), ("int8", "output/demo-int8"), ("nf4", "output/demo-nf4")]
)
def test_the_output_is_a_folder_or_a_gguf_file_depending_on_the_type(type_, target):
    done = make("--dry-run", "quantize", "MODEL=models/demo", f"TYPE={type_}")
    assert f" quantize models/demo {target} --type {type_}" in done.stdout


def test_a_checkpoint_is_exported_next_to_itself(tmp_path):
    done = make("--dry-run", "export", f"CKPT={tmp_path}/checkpoint-3", "MODEL=models/demo")
    assert f" export {tmp_path}/checkpoint-3 {tmp_path}/checkpoint-3-export --base models/demo" in done.stdout


@pytest.mark.parametrize(("engine", "profile"), [("auto", "cpu"), ("vllm", "gpu"), ("transformers", "gpu-int4")])
def test_an_engine_selects_its_profile(engine, profile):
    done = make("--dry-run", "serve", "WITH=compose", "MODEL=demo", f"ENGINE={engine}")
    assert f"--profile {profile} up" in done.stdout


@pytest.mark.parametrize(
    ("target", "answer", "code", "flags"),
    [
        ("down", "", 0, ["down --remove-orphans"]),
        ("remove", "yes\n", 0, ["down --remove-orphans --volumes"]),
        ("remove", "y\n", 2, []),
        ("remove", "", 2, []),
    ],
)
def test_volumes_are_deleted_only_after_the_word_yes(target, answer, code, flags, tmp_path):
    """A program in place of docker records what it is called with."""
    (tmp_path / "docker").write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\n')
    (tmp_path / "docker").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["make", target]
    options = {"cwd": REPOSITORY, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run(command, input=answer, check=False, **options)
    calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    assert done.returncode == code, done.stderr
    assert calls == [f"compose --profile * {words}" for words in flags]
    assert ("Nothing was removed." in done.stdout) == (code == 2)


def test_only_the_quick_run_leaves_out_slow_tests():
    quick, everything = (make("-n", target) for target in ("test", "test-all"))
    assert (quick.returncode, everything.returncode) == (0, 0), quick.stderr + everything.stderr
    assert '-m "not slow"' in quick.stdout
    assert "slow" not in everything.stdout
    omitted = set(re.findall(r"--ignore (\S+)", everything.stdout))
    later = " ".join(line for line in everything.stdout.splitlines() if "--ignore" not in line)
    assert {folder for folder in omitted if re.search(rf"pytest .*{folder}\b", later)} == omitted
    assert len(omitted) == 5
