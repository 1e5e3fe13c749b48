"""Runs of several processes that end early: signals, killed processes, full disks."""

import re
import signal

import psutil
import pytest
from small_disk import with_small_disk

from entrypoints.training.checkpoints import store

# several starts of several processes; on a busy machine each takes a minute
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TWO = ("--num-processes", 2, "--per-device-train-batch-size", 2)


def test_sigterm_saves_a_checkpoint_exits_with_143_and_the_run_resumes(alone, start, run, tmp_path, wait_for, close):
    """Two processes are stopped; one process resumes."""
    output = tmp_path / "out"
    process = start(output, *TWO, "--save-steps", 1)
    wait_for(output / "checkpoint-1" / "checkpoint.json", process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 143, err
    assert "received SIGTERM: saving step" in err
    assert not (output / "model.safetensors").exists()
    resumed = run(output, "--per-device-train-batch-size", 4, "--resume", "auto")
    assert resumed.code == 0, resumed.err
    assert resumed.losses() == pytest.approx(alone.losses(), **close)


def test_ctrl_c_saves_a_checkpoint_and_exits_with_130(start, tmp_path, wait_for):
    process = start(tmp_path / "out", "--max-steps", 2000, "--save-steps", 2000)
    wait_for(tmp_path / "out" / "runs", process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 130, err
    assert len(list((tmp_path / "out").glob("checkpoint-*/checkpoint.json"))) == 1


def test_if_a_worker_is_killed_the_run_stops_with_an_error_message_and_loses_no_checkpoint(
    alone, start, run, tmp_path, wait_for, close
):
    """The kernel sends SIGKILL when the host runs out of memory."""
    output = tmp_path / "out"
    process = start(output, *TWO, "--save-steps", 1)
    wait_for(output / "checkpoint-2" / "checkpoint.json", process)
    workers = psutil.Process(process.pid).children(recursive=True)
    victim = next(worker for worker in workers if worker.environ().get("RANK") == "1")
    victim.kill()
    _, err = process.communicate(timeout=200)
    assert process.returncode == 1, err
    assert "glm: process 1 was killed (SIGKILL): most likely the host ran out of memory" in err
    resumed = run(output, *TWO, "--resume", "auto")
    assert resumed.code == 0, resumed.err
    assert resumed.losses() == pytest.approx(alone.losses(), **close)


def test_if_the_launcher_is_killed_its_workers_save_a_checkpoint_and_end(start, tmp_path, wait_for):
    """SIGKILL cannot be forwarded: the kernel sends SIGTERM to the workers, which would otherwise run on."""
    output = tmp_path / "out"
    flags = ("--max-steps", 2000, "--save-steps", 1, "--save-total-limit", 50, "--lr-scheduler-type", "constant")
    process = start(output, *TWO, *flags)
    wait_for(output / "checkpoint-1" / "checkpoint.json", process)
    workers = [one for one in psutil.Process(process.pid).children(recursive=True) if "RANK" in one.environ()]
    assert len(workers) == 2
    process.kill()
    _, err = process.communicate(timeout=200)  # a worker that is still running would keep the pipe open
    assert not psutil.wait_procs(workers, timeout=200)[1]
    assert "received SIGTERM: saving step" in err
    saved = store.find_checkpoint("auto", output).step
    assert saved == int(re.findall(r"saving step (\d+)", err)[-1])


def test_a_full_disk_costs_neither_the_result_nor_earlier_checkpoints(start, tmp_path):
    """Another program takes 155 of 250 MB at once after the first checkpoint: only the result still fits."""
    fill = '{ until [ -e "$0/out/checkpoint-10" ]; do sleep 0.02; done; fallocate -l 155M "$0/other"; } & '
    script = f'{fill} "$@"; code=$?; cd "$0/out" && echo checkpoint-* model*.safetensors; exit $code'
    inside = (*with_small_disk(tmp_path, 250), "sh", "-c", script, tmp_path)
    steps = ("--max-steps", 20, "--save-steps", 10)  # seconds between the two checkpoints, the file takes none
    process = start(tmp_path / "out", *TWO, *steps, "--deepspeed", "zero2", inside=inside)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert "saving checkpoint-20 failed" in err
    assert out == f"{tmp_path / 'out'}\ncheckpoint-10 model.safetensors\n"


def test_an_error_in_all_workers_is_reported_once(run, tmp_path):
    """A learning rate at which the loss is not finite."""
    done = run(tmp_path / "out", *TWO, "--learning-rate", 1e30)
    assert (done.code, done.out) == (1, "")
    assert done.err.count("glm: ") == 1
    assert "lower --learning-rate" in done.err
    assert "Traceback" not in done.err
