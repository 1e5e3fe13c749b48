"""How many processes, where, and who says so; whole runs are in tests/train. Trap G12 of the list of reported pains."""

import json
import socket
from pathlib import Path

import pytest

from entrypoints.errors import UserError
from entrypoints.training import launch, zero
from entrypoints.training.arguments import PRESETS, TrainArguments

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


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_leaves_every_number_of_a_batch_to_the_flags(name):
    """G12: DeepSpeed's arithmetic assertion has nothing to find."""
    config = zero.configuration(name)
    assert [config[field] for field in zero.BATCH_FIELDS] == ["auto"] * 3
    assert zero.stage(config) == int(name[4])
    assert zero.offloads(config, "optimizer") == ("offload" in name)
    assert zero.offloads(config, "param") == (name == "zero3-offload")
    assert config["bf16"]["enabled"] == config["fp16"]["enabled"] == "auto"


def test_a_file_with_other_numbers_is_made_to_agree_and_gathers_what_it_saves(tmp_path, caplog):
    """G5, G12."""
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"train_batch_size": 64, "zero_optimization": {"stage": 3}}))
    config = zero.configuration(str(file))
    assert config["train_batch_size"] == "auto"
    assert "train_batch_size is 64; the flags decide" in caplog.text
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True


@pytest.mark.parametrize(("text", "told"), [("{", "is no JSON"), ("[1]", "is no DeepSpeed configuration")])
def test_a_file_that_is_no_configuration_is_named(text, told, tmp_path):
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(UserError, match=told):
        zero.configuration(str(tmp_path / "ds.json"))


def test_neither_file_nor_preset_is_told_with_the_presets():
    with pytest.raises(UserError, match=r"zero4 is no file and no preset; .*zero3-offload"):
        zero.configuration("zero4")
