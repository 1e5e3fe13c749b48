"""The memory table against published figures and against what autograd really keeps. Trap G10."""

import argparse
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_disk import with_small_disk

from entrypoints.checkpoint.layout import Shape
from entrypoints.checkpoint.native import open_native
from entrypoints.dataset.columns import Columns
from entrypoints.engines.placement import weight_bytes
from entrypoints.errors import UserError
from entrypoints.jobs import train
from entrypoints.training import methods, preflight
from entrypoints.training.arguments import TrainArguments
from entrypoints.training.flags import from_flags
from entrypoints.training.preflight import Plan

CHATGLM3_6B = Shape(28, 4096, 32, 2, 128, 13696, 65024, 8192, 1e-5, 1)


def plan(processes=1, length=256, **fields):
    arguments = TrainArguments(Path("base"), Path("rows"), Path("out"), **fields)
    return Plan(arguments, CHATGLM3_6B, torch.bfloat16, length, processes, processes)


def test_the_shape_is_that_of_the_6b():
    assert weight_bytes(CHATGLM3_6B, 1) == 6_243_584_000


@pytest.mark.parametrize(
    ("preset", "processes", "states"),
    [
        ("zero2", 1, 99.8), ("zero2", 2, 56.2), ("zero2", 4, 34.3), ("zero2", 8, 23.4),
        ("zero3", 1, 99.8), ("zero3", 2, 49.9), ("zero3", 4, 25.0), ("zero3", 8, 12.5),
    ],
)  # fmt: skip
def test_zero_divides_the_states_as_its_paper_says(preset, processes, states):
    """16 bytes a number; anchors.md, section 3.1."""
    assert plan(processes, deepspeed=preset).need().states / 1e9 == pytest.approx(states, abs=0.1)


def test_offload_moves_the_optimizer_to_the_host():
    """75 GB of Adam and float32 for 6.24 billion numbers; the weights stay, or go too."""
    two, three = (plan(8, deepspeed=f"{stage}-offload").need() for stage in ("zero2", "zero3"))
    assert two.states / 1e9 == pytest.approx(12.5, abs=0.1)
    assert three.states / 1e9 < 2
    assert min(two.host, three.host) / 1e9 > 75


def test_a_lora_of_the_6b_fits_where_the_tutorials_did_and_its_full_tuning_does_not():
    """14,082 MiB is what ChatGLM3's README gives for LoRA, with the base in 16 bits."""
    assert preflight.fits(plan(method="lora", per_device_train_batch_size=1).need(), 16e9, 64e9)
    assert not preflight.fits(plan(method="lora", per_device_train_batch_size=1).need(), 12e9, 64e9)
    assert not preflight.fits(plan().need(), 80e9, 512e9)


@pytest.mark.parametrize(
    ("method", "fields", "dtype"),
    [
        ("full", {}, torch.float32),
        ("lora", {}, torch.float32),
        ("lora", {"lora_target": "all-linear"}, torch.float32),
        ("lora", {}, torch.bfloat16),
    ],
)
def test_the_activations_of_a_layer_are_what_autograd_keeps(method, fields, dtype, toy_native):
    """Counted on the toy: the difference between four layers and two, over the tokens. Seen: 2 to 6 % apart."""
    arguments = TrainArguments(toy_native, Path("rows"), Path("out"), method=method, **fields)
    shape = open_native(toy_native).shape
    model = methods.load(arguments, shape, dtype).train()
    ids = torch.randint(300, 2000, (2, 64), generator=torch.Generator().manual_seed(0))
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def kept(layers):
        sizes, alive = {}, []
        model.config.num_hidden_layers = layers

        def note(tensor):
            alive.append(tensor)  # so that no address comes twice
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = 0 if storage.data_ptr() in own else storage.nbytes()
            return tensor

        computes = torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), computes:
            loss = model(input_ids=ids, labels=ids).loss
        assert loss.isfinite()
        return sum(sizes.values())

    counted = (kept(4) - kept(2)) / 2 / ids.numel()
    assert preflight.layer_bytes(shape, dtype.itemsize, arguments) == pytest.approx(counted, rel=0.1)


def test_what_cannot_fit_is_refused_with_the_flag_that_helps():
    """G10: one H100 of 80 GB, full tuning; the smallest change that fits is named."""
    with pytest.raises(UserError, match=r"need \d+.\d GB of each GPU, 79.0 GB are free; .*offload.* would fit"):
        preflight.refuse_hopeless(plan(), 79e9, 512e9)
    with pytest.raises(UserError, match="; --method lora would fit"):
        preflight.refuse_hopeless(plan(), 40e9, 30e9)
    with pytest.raises(UserError, match="use more or larger GPUs"):
        preflight.refuse_hopeless(plan(), 1e9, 8e9)
    preflight.refuse_hopeless(plan(8, deepspeed="zero3"), 79e9, 512e9)


def test_an_optimizer_that_is_offloaded_to_a_small_host_is_refused_with_the_host_as_the_reason():
    """The GPU would have room: 75 GB of Adam and float32 have not."""
    offloaded = plan(deepspeed="zero3-offload")
    with pytest.raises(UserError, match=r"need 1\d\d.\d GB of the host, 64.0 GB are free; --method lora would fit"):
        preflight.refuse_hopeless(offloaded, 79e9, 64e9)
    with pytest.raises(UserError, match=r"GB of the host, 4.0 GB are free; use a machine with more memory"):
        preflight.refuse_hopeless(offloaded, 79e9, 4e9)
    preflight.refuse_hopeless(offloaded, 79e9, 256e9)


def test_without_a_gpu_all_of_every_process_counts_against_the_host_and_nothing_twice():
    """In float32 16 bytes a number without DeepSpeed, 20 with it: 99.9 and 124.9 GB, wherever they lie."""

    def host(processes, **fields):
        return replace(plan(processes, length=16, **fields), compute=torch.float32).need().host_memory(None) / 1e9

    assert host(1) == pytest.approx(99.9 + 3, abs=2)
    assert host(2) == pytest.approx(2 * host(1))
    for preset in ("zero2", "zero2-offload", "zero3-offload"):
        assert host(1, deepspeed=preset) == pytest.approx(124.9 + 3, abs=4), preset
    assert host(2, deepspeed="zero3") == pytest.approx(124.9 + 6, abs=4)
    two = replace(plan(2), compute=torch.float32)
    with pytest.raises(UserError, match=r"need 199.8 GB of the host, 150.0 GB are free; --deepspeed zero3 .* fit"):
        preflight.refuse_hopeless(two, None, 150e9)
    assert not preflight.fits(two.need(), None, 200e9)


def test_without_a_gpu_nothing_is_offered_that_needs_one():
    words = [words for words, _ in preflight.candidates(plan(2), None)]
    assert len(words) >= 6 and not [said for said in words if "qlora" in said or "offload" in said]
    with_gpu = [words for words, _ in preflight.candidates(plan(2), 24e9)]
    assert "--method qlora --gradient-checkpointing" in with_gpu


ORIGINAL = ("--model-name-or-path", "base", "--train-file", "rows", "--output-dir", "out")


def told(words):
    """What `glm train` makes of words."""
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    return from_flags(parser.parse_args([*ORIGINAL, *words]), Path("base"), Columns(), "auto")


@pytest.mark.parametrize("gpu", [None, 24e9])
@pytest.mark.parametrize(
    "words",
    [
        (), ("--gradient-checkpointing", "--per-device-train-batch-size", "1"), ("--deepspeed", "zero3-offload"),
        ("--method", "ptuning"), ("--method", "ptuning", "--per-device-train-batch-size", "1", "--deepspeed", "zero2"),
        ("--method", "lora", "--quantization-bit", "8", "--packing"), ("--method", "lora"), ("--method", "qlora"),
        ("--method", "freeze", "--deepspeed", "zero2", "--fp16"), ("--pre-seq-len", "64"),
        ("--method", "freeze", "--freeze-layers", "2", "--deepspeed", "zero2"),
    ],
)  # fmt: skip
def test_the_words_of_every_candidate_are_flags_that_make_it_of_the_run_as_told(words, gpu):
    """Also those that are added to the flags told before: none is refused, none is missing, none is too many."""
    found = preflight.candidates(replace(plan(2), arguments=told(words)), gpu)
    assert len(found) >= 2
    for said, candidate in found[1:]:
        added, _, left_out = said.partition("without ")
        kept = list(words)
        for flag in left_out.split(" and ") if left_out else []:
            del kept[kept.index(flag) : kept.index(flag) + 2]
        assert told([*kept, *added.split()]) == candidate.arguments, said
        assert set(added.split()).isdisjoint({"--gradient-checkpointing"} & set(words)), said


def test_the_first_process_of_a_launcher_judges_the_machine_and_the_others_wait(toy_native, monkeypatch):
    arguments = TrainArguments(toy_native, Path("rows"), Path("out"), device="cpu")
    env = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "1"}
    preflight.check_joined(arguments, env)
    monkeypatch.setattr(preflight, "available_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"of the host, 0.0 GB are free"):
        preflight.check_joined(arguments, env)
    preflight.check_joined(arguments, env | {"LOCAL_RANK": "1"})


def test_the_table_has_the_run_as_told_first_and_says_of_each_row_whether_it_fits():
    lines = preflight.table(plan(8, deepspeed="zero2"), 24e9, 512e9).splitlines()
    assert "GB for each of 8 processes; 24.0 GB free on each GPU, 512.0 GB on the host" in lines[0]
    assert lines[1].split() == ["weights", "gradients", "optimizer", "activations", "GPU", "host", "fits"]
    assert lines[2].strip().startswith("as told") and lines[2].endswith("no")
    assert any("zero3" in line and line.endswith("yes") for line in lines[3:])
    assert len(lines) >= 8
    alone = preflight.table(plan(), None, 64e9).splitlines()
    assert "no GPU: all of it is host memory" in alone[0] and alone[2].split()[-3] == "-"


def test_dry_run_prints_the_table_and_the_launch_line_and_writes_nothing(toy_native, sample_file, tmp_path, capsys):
    from entrypoints.__main__ import main

    words = ["--model-name-or-path", toy_native, "--train-file", sample_file, "--output-dir", tmp_path / "out"]
    assert main([str(word) for word in ["train", *words, "--dry-run", "--num-processes", 2, "--device", "cpu"]]) == 0
    out = capsys.readouterr().out
    assert "as told" in out
    line = out.splitlines()[-1]
    assert re.match(r"torchrun --nnodes 1 .*--nproc-per-node 2 .*-m entrypoints train --model-name-or-path", line)
    assert "--dry-run" not in line
    assert not (tmp_path / "out").exists()


SMALL_MEMORY = """
import sys
from pathlib import Path
from entrypoints.training.preflight import refuse_small_shared_memory

refuse_small_shared_memory(1, Path(sys.argv[1]))
print("enough for one", flush=True)
refuse_small_shared_memory(8, Path(sys.argv[1]))
"""


def test_a_containers_default_shared_memory_is_refused_with_several_processes(tmp_path):
    """A real one of 64 MB where this may be mounted, else only what is not refused."""
    preflight.refuse_small_shared_memory(8, tmp_path)  # a disk: far more
    preflight.refuse_small_shared_memory(8, tmp_path / "nowhere")
    words = [*with_small_disk(tmp_path, 64), sys.executable, "-c", SMALL_MEMORY, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "enough for one\n"), done.stderr
    assert re.search(r"UserError: .*has 64 MB, and 8 processes .*--shm-size", done.stderr)
