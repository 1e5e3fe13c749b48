"""How many processes a run has and where, from flags and environment; whole runs are in tests/train."""

from pathlib import Path

import pytest

from entrypoints.__main__ import parse_arguments
from entrypoints.errors import UserError
from entrypoints.settings import Settings
from entrypoints.training import launch
from entrypoints.training.arguments import TrainArguments
from entrypoints.training.flags import parse_train_arguments

POD = {"MASTER_ADDR": "train-0.train", "MASTER_PORT": "23456"}


def arguments(**fields):
    return TrainArguments(Path("base"), Path("rows"), Path("out"), **fields)


def test_without_flags_and_variables_a_run_has_one_process():
    assert launch.plan_layout(arguments(), {}, 8).world_size == 1


def test_on_one_node_torchrun_binds_a_free_port_itself_whatever_the_environment_says():
    """A port chosen by glm could be taken by another process before torchrun binds it."""
    layout = launch.plan_layout(arguments(num_processes=2), {"MASTER_PORT": "29500"}, 0)
    torchrun_args = layout.torchrun_args()
    assert layout.world_size == 2
    assert "--standalone" in torchrun_args
    assert "--master-port" not in torchrun_args
    assert torchrun_args[torchrun_args.index("--local-addr") + 1] == "127.0.0.1"


@pytest.mark.parametrize(
    ("variables", "rank"),
    [
        ({"NNODES": "2", "NODE_RANK": "1"}, 1),
        ({"NNODES": "2", "JOB_COMPLETION_INDEX": "1"}, 1),
        ({"PET_NNODES": "2", "PET_NODE_RANK": "1"}, 1),
        ({"WORLD_SIZE": "2", "RANK": "1"}, 1),  # a PyTorchJob counts pods
        ({"NNODES": "2"}, 0),
    ],
)
def test_nodes_find_each_other_by_the_variables_that_kubernetes_sets(variables, rank):
    layout = launch.plan_layout(arguments(num_gpus=8), POD | variables, 8)
    assert (layout.world_size, layout.nnodes, layout.node_rank) == (16, 2, rank)
    assert (layout.master_addr, layout.master_port) == ("train-0.train", "23456")
    torchrun_args = layout.torchrun_args()
    assert torchrun_args[torchrun_args.index("--node-rank") + 1] == f"{rank}"


def test_nodes_without_master_addr_or_with_an_invalid_rank_are_rejected():
    with pytest.raises(UserError, match="MASTER_ADDR is not set for 2 nodes"):
        launch.plan_layout(arguments(), {"NNODES": "2"}, 0)
    with pytest.raises(UserError, match="rank of this node is 2, but there are 2 nodes"):
        launch.plan_layout(arguments(), POD | {"NNODES": "2", "NODE_RANK": "2"}, 0)
    with pytest.raises(UserError, match="NNODES=two is not a number"):
        launch.plan_layout(arguments(), POD | {"NNODES": "two"}, 0)


def test_more_gpus_than_the_node_has_are_rejected_and_the_error_names_num_processes():
    with pytest.raises(UserError, match=r"this node has 0 usable GPUs; .*--num-processes"):
        launch.plan_layout(arguments(num_gpus=2), {}, 0)
    with pytest.raises(UserError, match="exclude each other"):
        arguments(num_gpus=2, num_processes=2)


@pytest.mark.parametrize(
    ("env", "worker", "writes"),
    [
        ({"LOCAL_RANK": "0", "RANK": "0"}, True, True),
        ({"LOCAL_RANK": "0", "RANK": "8"}, True, False),
        ({"RANK": "1", "WORLD_SIZE": "2"}, False, False),  # the second pod of a PyTorchJob
        ({"RANK": "0", "WORLD_SIZE": "2"}, False, True),
        ({"NODE_RANK": "1", "NNODES": "1"}, False, True),  # trains alone, into its own folder
        ({}, False, True),
    ],
)
def test_local_rank_marks_a_worker_and_only_rank_0_or_the_first_node_writes_the_output(env, worker, writes):
    assert (launch.is_worker(env), launch.writes_output(env)) == (worker, writes)


@pytest.mark.parametrize("name", ["NODE_RANK", "PET_NODE_RANK", "JOB_COMPLETION_INDEX", "RANK"])
def test_a_node_with_a_rank_above_0_but_no_number_of_nodes_does_not_train_alone(name):
    """All nodes would write into the same folder. Rank 0 is also the only pod of a Job, which may train."""
    with pytest.raises(UserError, match="rank of this node is 1, but the number of nodes is not set; set NNODES"):
        launch.plan_layout(arguments(), POD | {name: "1"}, 0)
    assert launch.plan_layout(arguments(), POD | {name: "0"}, 0).world_size == 1
    assert launch.plan_layout(arguments(), POD | {name: "1", "NNODES": "1"}, 0).world_size == 1


@pytest.mark.parametrize(
    ("env", "nproc_per_node", "nnodes"),
    [
        ({"LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "16"}, 8, 2),
        ({"LOCAL_SIZE": "2", "WORLD_SIZE": "2"}, 2, 1),  # set by the deepspeed launcher
        ({}, 1, 1),
    ],
)
def test_a_worker_knows_the_number_of_processes_from_the_variables_of_its_launcher(env, nproc_per_node, nnodes):
    layout = launch.worker_layout({"LOCAL_RANK": "0", "RANK": "0"} | env)
    assert (layout.nproc_per_node, layout.nnodes) == (nproc_per_node, nnodes)
    assert layout.world_size == nproc_per_node * nnodes


def parsed(*flags: str, device: str = "auto") -> TrainArguments:
    command = ["train", "--model-name-or-path", "base", "--train-file", "rows.jsonl", "--output-dir", "out", *flags]
    return parse_train_arguments(parse_arguments(command)[1], Settings(device=device))


def test_num_gpus_0_trains_on_cpus_whatever_device_the_environment_sets():
    assert parsed("--num-gpus=0", device="cuda").device == "cpu"
    assert parsed("--num-gpus=0", "--device=cpu").device == parsed("--num-gpus=0", "--device=auto").device == "cpu"
    assert parsed("--num-gpus=1", device="cuda").device == "cuda"
    layout = launch.plan_layout(parsed("--num-gpus=0", "--num-processes=2"), {}, 8)
    assert layout.world_size == 2


def test_num_gpus_0_is_rejected_with_a_gpu_to_use_or_to_plan_for_and_a_negative_number_always():
    with pytest.raises(UserError, match="--num-gpus 0 trains on CPUs, but --device is cuda; omit --num-gpus or"):
        parsed("--num-gpus=0", "--device=cuda")
    with pytest.raises(UserError, match="--num-gpus 0 trains on CPUs, but --gpu-memory is 24; omit"):
        parsed("--num-gpus=0", "--dry-run", "--gpu-memory=24")
    with pytest.raises(UserError, match="--num-gpus -1 is below 0"):
        parsed("--num-gpus=-1")
