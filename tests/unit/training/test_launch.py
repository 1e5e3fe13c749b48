"""How many processes, where, and who says so; whole runs are in tests/train. Trap G12 of the list of reported pains."""

import socket
from pathlib import Path

import pytest

from entrypoints.errors import UserError
from entrypoints.training import launch
from entrypoints.training.arguments import TrainArguments

POD = {"MASTER_ADDR": "train-0.train", "MASTER_PORT": "23456"}


def arguments(**fields):
    return TrainArguments(Path("base"), Path("rows"), Path("out"), **fields)


def test_nothing_said_is_one_process():
    assert launch.layout(arguments(), {}, 8).processes == 1


def test_one_machine_takes_a_free_port_whatever_the_environment_says():
    """G12."""
    place = launch.layout(arguments(num_processes=2), {"MASTER_PORT": "29500"}, 0)
    assert (place.processes, place.address) == (2, "127.0.0.1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", int(place.port)))


@pytest.mark.parametrize(
    ("told", "rank"),
    [
        ({"NNODES": "2", "NODE_RANK": "1"}, 1),
        ({"NNODES": "2", "JOB_COMPLETION_INDEX": "1"}, 1),
        ({"PET_NNODES": "2", "PET_NODE_RANK": "1"}, 1),
        ({"WORLD_SIZE": "2", "RANK": "1"}, 1),  # a PyTorchJob counts pods
        ({"NNODES": "2"}, 0),
    ],
)
def test_machines_find_each_other_by_what_kubernetes_sets(told, rank):
    place = launch.layout(arguments(num_gpus=8), POD | told, 8)
    assert (place.processes, place.nodes, place.node_rank) == (16, 2, rank)
    assert (place.address, place.port) == ("train-0.train", "23456")
    words = place.torchrun_words()
    assert words[words.index("--node-rank") + 1] == f"{rank}"


def test_machines_without_a_place_to_meet_or_with_a_wrong_number_are_refused():
    with pytest.raises(UserError, match="set MASTER_ADDR"):
        launch.layout(arguments(), {"NNODES": "2"}, 0)
    with pytest.raises(UserError, match="number is 2, of 2"):
        launch.layout(arguments(), POD | {"NNODES": "2", "NODE_RANK": "2"}, 0)
    with pytest.raises(UserError, match="NNODES=two is no number"):
        launch.layout(arguments(), POD | {"NNODES": "two"}, 0)


def test_more_gpus_than_there_are_is_refused_with_the_other_way():
    with pytest.raises(UserError, match=r"this machine has 0 GPUs .*--num-processes"):
        launch.layout(arguments(num_gpus=2), {}, 0)
    with pytest.raises(UserError, match="exclude each other"):
        arguments(num_gpus=2, num_processes=2)


def test_a_process_of_a_launcher_is_known_by_its_local_rank():
    assert launch.is_worker({"LOCAL_RANK": "0", "RANK": "8"}) and not launch.is_main({"LOCAL_RANK": "0", "RANK": "8"})
    assert not launch.is_worker({"RANK": "1", "WORLD_SIZE": "2"}) and launch.is_main({"RANK": "1"})


@pytest.mark.parametrize("name", ["NODE_RANK", "PET_NODE_RANK", "JOB_COMPLETION_INDEX", "RANK"])
def test_a_machine_with_a_number_above_0_but_not_of_how_many_does_not_train_alone(name):
    """Each would write into the same folder. 0 is also the only pod of a Job: it may."""
    with pytest.raises(UserError, match="number is 1, and nothing says of how many; set NNODES"):
        launch.layout(arguments(), POD | {name: "1"}, 0)
    assert launch.layout(arguments(), POD | {name: "0"}, 0).processes == 1
    assert launch.layout(arguments(), POD | {name: "1", "NNODES": "1"}, 0).processes == 1


@pytest.mark.parametrize(
    ("env", "per_node", "nodes"),
    [
        ({"LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "16"}, 8, 2),
        ({"LOCAL_SIZE": "2", "WORLD_SIZE": "2"}, 2, 1),  # the deepspeed launcher's word
        ({}, 1, 1),
    ],
)
def test_a_process_of_a_launcher_knows_how_many_there_are(env, per_node, nodes):
    place = launch.joined({"LOCAL_RANK": "0", "RANK": "0"} | env)
    assert (place.per_node, place.nodes, place.processes) == (per_node, nodes, per_node * nodes)
