"""Several processes learn what one learns, and a run that is cut off goes on. Traps: the list of reported pains."""

import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess

import psutil
import pytest
import torch
from processes import free_port
from safetensors.torch import load_file
from small_disk import with_small_disk

from entrypoints.checkpoint.manifest import check_manifest
from entrypoints.checkpoint.native import open_native
from entrypoints.errors import UserError
from entrypoints.training import checkpoints
from entrypoints.training.export import export

pytestmark = pytest.mark.timeout(900)  # several starts of several processes; on a busy machine each takes a minute
TWO = ("--num-processes", 2, "--per-device-train-batch-size", 2)
TUTORIAL = {
    "train_micro_batch_size_per_gpu": "auto",
    "zero_allow_untested_optimizer": True,
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "initial_scale_power": 16,
        "loss_scale_window": 1000,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "zero_optimization": {
        "stage": 2,
        "allgather_partitions": True,
        "allgather_bucket_size": 5e8,
        "overlap_comm": False,
        "reduce_scatter": True,
        "reduce_bucket_size": 5e8,
        "contiguous_gradients": True,
    },
}


def test_two_processes_have_the_losses_of_one_though_29500_is_taken(alone, run, tmp_path, close):
    """G12: the port that torchrun would take."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):  # taken by somebody else
            taken.bind(("127.0.0.1", 29500))
            taken.listen()
        done = run(tmp_path / "out", *TWO)
    assert (done.code, done.out) == (0, f"{tmp_path / 'out'}\n"), done.err
    assert done.losses() == pytest.approx(alone.losses(), **close)
    assert done.err.count("step 6: loss") == 1  # rank 0 alone prints
    assert check_manifest(tmp_path / "out", hashes=True) >= 7


@pytest.fixture(scope="module", params=["zero2", "zero3", "tutorial"])
def divided(request, run, tmp_path_factory):
    """Two processes with DeepSpeed."""
    folder = tmp_path_factory.mktemp(request.param)
    name = request.param
    if name == "tutorial":
        name = folder / "deepspeed.json"
        name.write_text(json.dumps(TUTORIAL))
    done = run(folder / "out", *TWO, "--deepspeed", name)
    assert done.code == 0, done.err
    return request.param, done


def test_zero_has_the_losses_of_one_process_and_saves_a_whole_model(divided, alone, close):
    """G5: nothing in it is [0]; open_native compares every shape."""
    _, done = divided
    assert done.losses() == pytest.approx(alone.losses(), **close)
    for folder in (done.output, done.output / "checkpoint-3"):
        assert open_native(folder).files.size == open_native(alone.output).files.size


def test_a_zero_checkpoint_is_the_tutorials_tree(divided):
    _, done = divided
    folder = done.output / "checkpoint-6"
    names = {file.name for file in folder.iterdir()}
    assert names >= {"config.json", "global_step6", "latest", "rng_state_0.pth", "rng_state_1.pth", "tokenizer.json"}
    assert names >= {"model.safetensors", "trainer_state.json", "training_args.bin", "zero_to_fp32.py"}
    beside = {file.name for file in done.output.iterdir()}
    assert beside >= {"all_results.json", "train_results.json", "trainer_state.json", "model.safetensors"}


def test_one_process_goes_on_from_what_two_have_saved(divided, alone, run, tmp_path, close):
    """G7: another world size; DeepSpeed's universal form of the checkpoint."""
    name, done = divided
    if name == "tutorial":
        pytest.skip("the same stage as zero2")
    shutil.copytree(done.output / "checkpoint-3", tmp_path / "out" / "checkpoint-3")
    words = ("--per-device-train-batch-size", 4, "--deepspeed", name, "--resume", "auto")
    resumed = run(tmp_path / "out", *words)
    assert resumed.code == 0, resumed.err
    assert resumed.losses() == pytest.approx(alone.losses(), **close)


def test_shards_alone_are_exported_with_the_bases_settings(divided, toy_native, tmp_path):
    """G6: what is left where somebody saved room; a lost shard is told."""
    _, done = divided
    shards = shutil.copytree(done.output / "checkpoint-3", tmp_path / "shards")
    whole = load_file(shards / "model.safetensors")
    for number, file in enumerate(("config.json", "model.safetensors")):  # the settings go, then the weights too
        (shards / file).unlink()
        export(shards, tmp_path / f"plain-{number}", toy_native, "float16")
        plain = load_file(tmp_path / f"plain-{number}" / "model.safetensors")
        assert set(plain) == set(whole)
        assert all(torch.equal(plain[name], whole[name]) for name in whole)
    next(shards.glob("global_step3/*optim_states.pt")).unlink()
    with pytest.raises(UserError, match="do not make a model"):
        export(shards, tmp_path / "again", toy_native)


def test_adapters_learn_under_zero3_with_offload_and_answer_test_rows(run, rows, tmp_path):
    """The prefix and the LoRA are whole, what was frozen is not saved; G9: no process waits for another's answers."""
    scored = ("--predict-with-generate", "--test-file", rows, "--max-target-length", 40)
    for method, file in (("ptuning", "prefix.safetensors"), ("lora", "adapter_model.safetensors")):
        words = ("--pre-seq-len", 8, *scored) if method == "ptuning" else ()
        zero3 = ("--max-steps", 2, "--deepspeed", "zero3-offload")
        done = run(tmp_path / method, *TWO, "--method", method, *words, *zero3)
        assert done.code == 0, done.err
        learnt = load_file(tmp_path / method / file)
        assert all(tensor.abs().max() > 0 for tensor in learnt.values()), method  # a LoRA's second matrix begins at 0
        assert not list((tmp_path / method).glob("model*.safetensors"))
    answers = (tmp_path / "ptuning" / "generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(answers) == len(rows.read_text(encoding="utf-8").splitlines()) == 32  # all of them


@pytest.mark.parametrize("preset", ["zero2-offload", "zero3-offload"])
def test_what_lies_in_the_hosts_memory_gives_the_losses_of_one_process(preset, alone, run, tmp_path, close):
    done = run(tmp_path / "out", *TWO, "--deepspeed", preset)
    assert done.code == 0, done.err
    assert done.losses() == pytest.approx(alone.losses(), **close)


def test_two_machines_meet_at_an_address_as_an_indexed_job_names_it(alone, start, tmp_path, close):
    """Two launchers with a process each; the second one neither proves nor prints."""
    place = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{free_port()}"}
    words = ("--per-device-train-batch-size", 2)
    machines = [
        start(tmp_path / "out", *words, extra=place | {"JOB_COMPLETION_INDEX": f"{number}"}) for number in range(2)
    ]
    ends = [machine.communicate(timeout=280) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], ends
    assert [out for out, _ in ends] == [f"{tmp_path / 'out'}\n", ""]
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert {entry["step"]: entry["loss"] for entry in history if "loss" in entry} == pytest.approx(
        alone.losses(), **close
    )


def test_under_torchrun_the_same_command_joins(alone, run, tmp_path, close):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    done = run(tmp_path / "out", "--per-device-train-batch-size", 2, launcher=torchrun)
    assert (done.code, done.out) == (0, f"{tmp_path / 'out'}\n"), done.err
    assert done.losses() == pytest.approx(alone.losses(), **close)


def test_rows_that_do_not_divide_are_all_answered_after_zero3_under_torchrun(run, rows, tmp_path):
    """G9: rank 0 answers alone, once the others are gone, with answers of any length."""
    lines = rows.read_text(encoding="utf-8").splitlines(keepends=True)[:5]
    (tmp_path / "test.jsonl").write_text("".join(lines), encoding="utf-8")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    scored = ("--predict-with-generate", "--test-file", tmp_path / "test.jsonl", "--max-target-length", 40)
    zero3 = ("--deepspeed", "zero3", "--max-steps", 2, "--per-device-eval-batch-size", 2)
    done = run(tmp_path / "out", *scored, *zero3, launcher=torchrun)
    assert (done.code, done.out) == (0, f"{tmp_path / 'out'}\n"), done.err
    assert done.err.index("its answers are scored") < done.err.index("step 1: loss")  # two rows, by the base
    answers = (tmp_path / "out" / "generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert sorted(json.loads(answer)["index"] for answer in answers) == list(range(5))


@pytest.mark.parametrize(
    "launcher", [(), ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)], ids=["glm", "torchrun"]
)
def test_a_containers_shared_memory_is_refused_whoever_starts_the_processes(launcher, run, tmp_path):
    """J3: 64 MB, in a namespace of mounts where they are the real /dev/shm."""
    own = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"', "sh")
    if not shutil.which("unshare") or subprocess.run([*own, "true"], capture_output=True).returncode:
        pytest.skip("only root can mount a /dev/shm of its own")
    words = () if launcher else TWO
    done = run(tmp_path / "out", *words, launcher=launcher, inside=own)
    assert (done.code, done.out) == (1, "")
    assert "/dev/shm has 64 MB, and 2 processes pass their numbers through it" in done.err
    assert "--shm-size 8g" in done.err
    assert not (tmp_path / "out").exists()


class TestCutOff:
    """Runs that do not come to their end."""

    def test_sigterm_saves_ends_with_143_and_the_run_goes_on(self, alone, start, run, tmp_path, wait_for, close):
        """Two processes, far more steps than there is time for; then one process takes the place of both."""
        output = tmp_path / "out"
        process = start(output, *TWO, "--save-steps", 1)
        wait_for(output / "checkpoint-1" / "checkpoint.json", process)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=200)
        assert process.returncode == 143, err
        assert "told to stop (SIGTERM): saving step" in err
        assert not (output / "model.safetensors").exists()
        resumed = run(output, "--per-device-train-batch-size", 4, "--resume", "auto")
        assert resumed.code == 0, resumed.err
        assert resumed.losses() == pytest.approx(alone.losses(), **close)

    def test_ctrl_c_saves_and_ends_with_130(self, start, tmp_path, wait_for):
        process = start(tmp_path / "out", "--max-steps", 2000, "--save-steps", 2000)
        wait_for(tmp_path / "out" / "runs", process)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=200)
        assert process.returncode == 130, err
        assert len(list((tmp_path / "out").glob("checkpoint-*/checkpoint.json"))) == 1

    def test_a_killed_process_ends_the_run_in_words_and_loses_no_checkpoint(
        self, alone, start, run, tmp_path, wait_for, close
    ):
        """G10: -9 is what the kernel does where memory is short."""
        output = tmp_path / "out"
        process = start(output, *TWO, "--save-steps", 1)
        wait_for(output / "checkpoint-2" / "checkpoint.json", process)
        workers = psutil.Process(process.pid).children(recursive=True)
        victim = next(worker for worker in workers if worker.environ().get("RANK") == "1")
        victim.kill()
        _, err = process.communicate(timeout=200)
        assert process.returncode == 1, err
        assert "glm: process 1 was killed (SIGKILL): the machine ran out of memory, most likely" in err
        resumed = run(output, *TWO, "--resume", "auto")
        assert resumed.code == 0, resumed.err
        assert resumed.losses() == pytest.approx(alone.losses(), **close)

    def test_a_killed_launcher_takes_its_processes_with_it_and_they_save_first(self, start, run, tmp_path, wait_for):
        """SIGKILL cannot be passed on: the kernel tells the processes, which would go on for days otherwise."""
        output = tmp_path / "out"
        process = start(output, *TWO, "--max-steps", 2000, "--save-steps", 1, "--lr-scheduler-type", "constant")
        wait_for(output / "checkpoint-1" / "checkpoint.json", process)
        workers = [one for one in psutil.Process(process.pid).children(recursive=True) if "RANK" in one.environ()]
        assert len(workers) == 2
        process.kill()
        _, err = process.communicate(timeout=200)  # a process that lived on would hold its end of the pipe
        assert not psutil.wait_procs(workers, timeout=200)[1]
        assert "told to stop (SIGTERM): saving step" in err
        saved = checkpoints.to_resume("auto", output).step
        assert saved == int(re.findall(r"saving step (\d+)", err)[-1])
        words = ("--max-steps", saved + 1, "--lr-scheduler-type", "constant", "--resume", "auto")
        assert run(output, *TWO, *words).code == 0

    def test_a_full_disk_keeps_what_was_saved(self, start, tmp_path):
        """A disk of 70 MB: one checkpoint of the toy (53 MB) fits and the next does not."""
        listed = ("sh", "-c", '"$@"; code=$?; cd "$0/out" && echo checkpoint-*; exit $code', tmp_path)
        process = start(tmp_path / "out", inside=(*with_small_disk(tmp_path, 70), *listed))
        out, err = process.communicate(timeout=200)
        assert process.returncode == 1, err
        assert "glm: saving checkpoint-6 failed" in err
        assert out == "checkpoint-3\n"

    def test_a_mistake_of_a_worker_is_told_once(self, run, tmp_path):
        """G4, in two processes: a rate at which the loss is no number any more."""
        done = run(tmp_path / "out", *TWO, "--learning-rate", 1e30)
        assert (done.code, done.out) == (1, "")
        assert done.err.count("glm: ") == 1
        assert "lower --learning-rate" in done.err
        assert "Traceback" not in done.err
