"""Several processes have the losses of one, and an interrupted run can be resumed."""

import contextlib
import json
import shutil
import socket
import subprocess

import pytest
import torch
from canary import write_canary
from processes import free_port
from safetensors.torch import load_file

from entrypoints.checkpoint.manifest import check_manifest
from entrypoints.checkpoint.native import open_native
from entrypoints.errors import UserError
from entrypoints.training.result.export import ExportOptions, export

# several starts of several processes; on a busy machine each takes a minute
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
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


def test_two_processes_have_the_losses_of_one_while_port_29500_is_in_use(alone, run, tmp_path, close):
    """The default port of torchrun."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):  # already in use
            taken.bind(("127.0.0.1", 29500))
            taken.listen()
        done = run(tmp_path / "out", *TWO)
    assert (done.code, done.out) == (0, f"{tmp_path / 'out'}\n"), done.err
    assert done.losses() == pytest.approx(alone.losses(), **close)
    assert done.err.count("step 6: loss") == 1  # only rank 0 logs
    assert check_manifest(tmp_path / "out", hashes=True) >= 7


@pytest.fixture(scope="module", params=["zero2-offload", "zero3"])
def divided(request, run, rows, tmp_path_factory):
    """Two processes with DeepSpeed: zero2-offload, and zero3 under torchrun with scores of test rows."""
    folder = tmp_path_factory.mktemp(request.param)
    name, flags, launcher = request.param, TWO, ()
    if name == "zero3":
        lines = rows.read_text(encoding="utf-8").splitlines(keepends=True)[:5]
        (folder / "test.jsonl").write_text("".join(lines), encoding="utf-8")
        flags = ("--predict-with-generate", "--test-file", folder / "test.jsonl", "--max-target-length", 64)
        flags = (*flags, "--per-device-train-batch-size", 2, "--per-device-eval-batch-size", 2)
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    done = run(folder / "out", *flags, "--deepspeed", name, launcher=launcher)
    assert (done.code, done.out) == (0, f"{folder / 'out'}\n"), done.err
    return request.param, done


def test_zero_has_the_losses_of_one_process_and_saves_a_complete_model(divided, alone, close):
    """No tensor is empty: open_native compares every shape."""
    _, done = divided
    assert done.losses() == pytest.approx(alone.losses(), **close)
    for folder in (done.output, done.output / "checkpoint-3"):
        assert open_native(folder).files.nbytes == open_native(alone.output).files.nbytes


def test_a_zero_checkpoint_has_the_files_of_the_public_script(divided):
    _, done = divided
    names = {file.name for file in (done.output / "checkpoint-6").iterdir()}
    assert names >= {"config.json", "global_step6", "latest", "rng_state_0.pth", "rng_state_1.pth", "tokenizer.json"}
    assert names >= {"model.safetensors", "trainer_state.json", "training_args.bin", "zero_to_fp32.py"}
    output = {file.name for file in done.output.iterdir()}
    assert output >= {"all_results.json", "train_results.json", "trainer_state.json", "model.safetensors"}


def test_under_torchrun_rank_0_answers_all_test_rows_although_they_do_not_divide(divided):
    """No other process waits for the answers, which have any length: rank 0 generates after the others have ended."""
    name, done = divided
    if name != "zero3":
        pytest.skip("only this run has test rows")
    assert done.err.index("the answers can be scored") < done.err.index("step 1: loss")  # two rows, by the base model
    answers = (done.output / "generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert sorted(json.loads(answer)["index"] for answer in answers) == list(range(5))


def test_one_process_resumes_from_a_checkpoint_of_two(divided, alone, run, tmp_path, close):
    """Through DeepSpeed's universal checkpoint format."""
    name, done = divided
    shutil.copytree(done.output / "checkpoint-3", tmp_path / "out" / "checkpoint-3")
    flags = ("--per-device-train-batch-size", 4, "--deepspeed", name, "--resume", "auto")
    resumed = run(tmp_path / "out", *flags)
    assert resumed.code == 0, resumed.err
    assert resumed.losses() == pytest.approx(alone.losses(), **close)


def test_resumed_processes_have_the_same_losses(divided, run, tmp_path):
    """Bitwise: DeepSpeed's own states load completely although torch.load accepts only tensors and listed classes."""
    name, done = divided
    shutil.copytree(done.output / "checkpoint-3", tmp_path / "out" / "checkpoint-3")
    resumed = run(tmp_path / "out", *TWO, "--deepspeed", name, "--resume", "auto")
    assert resumed.code == 0, resumed.err
    assert resumed.losses() == done.losses()


def test_a_shard_that_would_run_code_ends_the_command_with_its_name(divided, run, tmp_path):
    name, done = divided
    if name != "zero3":
        pytest.skip("the check is the same for every stage")
    checkpoint = shutil.copytree(done.output / "checkpoint-3", tmp_path / "out" / "checkpoint-3")
    shard = min(checkpoint.glob("global_step3/*model_states.pt"))
    write_canary(shard, tmp_path / "executed")
    record = json.loads((checkpoint / "checkpoint.json").read_text())
    record["files"][shard.relative_to(checkpoint).as_posix()] = shard.stat().st_size
    (checkpoint / "checkpoint.json").write_text(json.dumps(record))
    resumed = run(tmp_path / "out", "--deepspeed", "zero2", "--resume", "auto")
    assert (resumed.code, resumed.out) == (1, "")
    assert f"{shard.name} could run code when loaded (contains posix.mkdir); use another checkpoint" in resumed.err
    assert "Traceback" not in resumed.err
    assert not (tmp_path / "executed").exists()


def test_zero_shards_alone_are_exported_with_the_configuration_of_the_base_model(divided, toy_native, tmp_path):
    """Some users delete the other files to save disk space. A missing shard is reported."""
    _, done = divided
    shards = shutil.copytree(done.output / "checkpoint-3", tmp_path / "shards")
    saved = load_file(shards / "model.safetensors")
    for number, file in enumerate(("config.json", "model.safetensors")):  # without configuration, then without weights
        (shards / file).unlink()
        export(shards, tmp_path / f"plain-{number}", ExportOptions(toy_native, "float16"))
        plain = load_file(tmp_path / f"plain-{number}" / "model.safetensors")
        assert set(plain) == set(saved)
        assert all(torch.equal(plain[name], saved[name]) for name in saved)
    next(shards.glob("global_step3/*optim_states.pt")).unlink()
    with pytest.raises(UserError, match="incomplete or damaged"):
        export(shards, tmp_path / "again", ExportOptions(toy_native))


def test_adapters_train_under_zero3_with_offload_and_answer_test_rows(run, rows, tmp_path):
    """Prefix and LoRA are saved completely and frozen weights are not; all test rows are answered."""
    scored = ("--predict-with-generate", "--test-file", rows, "--max-target-length", 40)
    for method, file in (("ptuning", "prefix.safetensors"), ("lora", "adapter_model.safetensors")):
        flags = ("--pre-seq-len", 8, *scored) if method == "ptuning" else ()
        zero3 = ("--max-steps", 2, "--deepspeed", "zero3-offload")
        done = run(tmp_path / method, *TWO, "--method", method, *flags, *zero3)
        assert done.code == 0, done.err
        trained = load_file(tmp_path / method / file)
        assert all(tensor.abs().max() > 0 for tensor in trained.values()), method  # the second LoRA matrix starts at 0
        assert not list((tmp_path / method).glob("model*.safetensors"))
    answers = (tmp_path / "ptuning" / "generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(answers) == len(rows.read_text(encoding="utf-8").splitlines()) == 32


def test_zero3_with_offload_has_the_losses_of_one_process(alone, run, tmp_path, close):
    done = run(tmp_path / "out", *TWO, "--deepspeed", "zero3-offload")
    assert done.code == 0, done.err
    assert done.losses() == pytest.approx(alone.losses(), **close)


def test_two_nodes_of_an_indexed_job_train_together_with_the_file_of_the_tutorial(alone, start, tmp_path, close):
    """Two launchers with one process each; the second node neither checks nor prints the result."""
    (tmp_path / "deepspeed.json").write_text(json.dumps(TUTORIAL))
    variables = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{free_port()}"}
    flags = ("--per-device-train-batch-size", 2, "--deepspeed", tmp_path / "deepspeed.json")
    nodes = [
        start(tmp_path / "out", *flags, extra=variables | {"JOB_COMPLETION_INDEX": f"{number}"}) for number in range(2)
    ]
    ends = [node.communicate(timeout=280) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], ends
    assert [out for out, _ in ends] == [f"{tmp_path / 'out'}\n", ""]
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert {entry["step"]: entry["loss"] for entry in history if "loss" in entry} == pytest.approx(
        alone.losses(), **close
    )


@pytest.mark.parametrize(
    "launcher", [(), ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)], ids=["glm", "torchrun"]
)
def test_the_default_shared_memory_of_a_container_is_rejected_whatever_starts_the_processes(launcher, run, tmp_path):
    """64 MB, mounted as /dev/shm in a mount namespace."""
    mounted = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"', "sh")
    if not shutil.which("unshare") or subprocess.run([*mounted, "true"], capture_output=True).returncode:
        pytest.skip("only root can mount its own /dev/shm")
    flags = () if launcher else TWO
    done = run(tmp_path / "out", *flags, launcher=launcher, inside=mounted)
    assert (done.code, done.out) == (1, "")
    assert "/dev/shm has 64 MB, and 2 processes exchange data through it" in done.err
    assert "--shm-size 8g" in done.err
    assert not (tmp_path / "out").exists()
