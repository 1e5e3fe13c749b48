"""The memory estimate against published figures and against what autograd saves; the table and its flags."""

import argparse
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_disk import with_small_disk

from entrypoints.checkpoint.layout import ModelConfig
from entrypoints.checkpoint.native import open_native
from entrypoints.errors import UserError
from entrypoints.hardware.placement import weight_bytes
from entrypoints.settings import Settings
from entrypoints.training import session
from entrypoints.training.arguments import TrainArguments
from entrypoints.training.flags import add_arguments, parse_train_arguments
from entrypoints.training.launch import ProcessLayout, worker_layout
from entrypoints.training.methods import trainable_model
from entrypoints.training.methods.deepspeed_config import read_config
from entrypoints.training.preflight import memory_check
from entrypoints.training.preflight.memory_estimate import MemoryPlan, layer_activation_bytes
from entrypoints.training.preparation import prepare
from entrypoints.training.run_context import open_run

REPOSITORY = Path(__file__).resolve().parents[3]
CHATGLM3_6B = ModelConfig(28, 4096, 32, 2, 128, 13696, 65024, 8192, 1e-5, 1)


def plan(processes=1, length=256, **fields):
    arguments = TrainArguments(Path("base"), Path("rows"), Path("out"), **fields)
    config = read_config(arguments.deepspeed) if arguments.deepspeed else None
    return MemoryPlan(arguments, CHATGLM3_6B, torch.bfloat16, length, config, processes, processes)


def test_the_model_config_is_that_of_the_6b():
    assert weight_bytes(CHATGLM3_6B, 1) == 6_243_584_000


@pytest.mark.parametrize(
    ("preset", "processes", "states"),
    [
        ("zero2", 1, 99.8), ("zero2", 2, 56.2), ("zero2", 4, 34.3), ("zero2", 8, 23.4),
        ("zero3", 1, 99.8), ("zero3", 2, 49.9), ("zero3", 4, 25.0), ("zero3", 8, 12.5),
    ],
)  # fmt: skip
def test_zero_partitions_the_states_as_its_paper_describes(preset, processes, states):
    """16 bytes per parameter (ZeRO, section 3.1)."""
    assert plan(processes, deepspeed=preset).estimate().states / 1e9 == pytest.approx(states, abs=0.1)


def test_offload_moves_the_optimizer_to_the_host():
    """75 GB of Adam states and float32 copies for 6.24 billion parameters; zero3-offload moves the weights as well."""
    two, three = (plan(8, deepspeed=f"{stage}-offload").estimate() for stage in ("zero2", "zero3"))
    assert two.states / 1e9 == pytest.approx(12.5, abs=0.1)
    assert three.states / 1e9 < 2
    assert min(two.host(has_gpu=True), three.host(has_gpu=True)) / 1e9 > 75


LLAMA_8B = ModelConfig(32, 4096, 32, 8, 128, 14336, 128256, 8192, 1e-5, 1)  # config.json of Llama-3.1-8B
PUBLISHED = [  # GiB of a GPU; settings that a source does not name are those of its default files
    # ChatGLM3, finetune_demo/README.md and configs: batches of 4 of up to 768 tokens
    (14082 / 1024, CHATGLM3_6B, 1, 769, {"method": "lora", "lora_rank": 32, "gradient_checkpointing": True}),
    (18426 / 1024, CHATGLM3_6B, 1, 230, {"method": "ptuning"}),  # AdvertiseGen's rows have at most 230 tokens
    (48346 / 1024, CHATGLM3_6B, 4, 769, {"deepspeed": "zero3"}),
    # one H100, LoRA on every layer, batches of 4 of 1,024 tokens with Liger's loss, which keeps no logits
    (61.8, LLAMA_8B, 1, 1024, {"method": "lora", "lora_target": "all-linear", "max_target_length": 1024}),
    # torchtune's README: one RTX 4090, packed to 2,048, activations recomputed
    (16.2, LLAMA_8B, 1, 2048, {"method": "lora", "packing": True, "gradient_checkpointing": True}),
    (7.4, LLAMA_8B, 1, 2048, {"method": "qlora", "packing": True, "gradient_checkpointing": True}),
]


@pytest.mark.parametrize(
    ("gib", "shape", "processes", "length", "fields"),
    PUBLISHED,
    ids=["ChatGLM3 LoRA", "ChatGLM3 P-Tuning", "ChatGLM3 full, 4 GPUs", "8B LoRA", "8B LoRA packed", "8B QLoRA packed"],
)
def test_the_estimate_is_near_the_memory_of_known_public_runs(gib, shape, processes, length, fields):
    """Other programs with other kernels. Seen: 8 % less to 12 % less, 15 % more for the small ones."""
    batch = 2 if fields.get("packing") else 4
    run = replace(plan(processes, length, per_device_train_batch_size=batch, **fields), model_config=shape)
    assert run.estimate().gpu / 2**30 == pytest.approx(gib, rel=0.25)


def test_zero2_counts_the_flat_gradients_of_its_step_and_the_buckets_of_its_file():
    """6 bytes a parameter over the processes: a 16-bit copy and a float32 one (stage_1_and_2.py, `step`)."""
    eight = plan(8, deepspeed="zero2").estimate()
    assert eight.step == pytest.approx(6 * 6_243_584_000 / 8)
    assert eight.gpu == pytest.approx(eight.states + max(eight.step, eight.activations + eight.buffers) + 1e9)
    assert eight.buffers == 2 * 2 * 4096**2  # "auto": the square of the hidden size
    assert plan(8, deepspeed="zero2-offload").estimate().step == 0


def test_zero3_counts_the_weights_that_it_may_hold_gathered():
    """stage3_max_live_parameters is 1e9 by default: 2 GB in 16 bits; alone there is nothing to gather."""
    assert plan(8, deepspeed="zero3").estimate().buffers / 1e9 == pytest.approx(2.03, abs=0.01)
    assert plan(1, deepspeed="zero3").estimate().buffers / 1e9 == pytest.approx(0.03, abs=0.01)
    assert plan(8, deepspeed="zero3").estimate().step == pytest.approx(6 * 6_243_584_000 / 8)
    assert plan(2, deepspeed="zero3").estimate().step == 6e9  # sub_group_size is 1e9


def test_gpus_are_loaded_one_tensor_at_a_time_and_only_zero3_holds_the_whole_model_on_a_host():
    """Four processes with a copy each would need 50 GB, more than the 32 GB of the container of Compose."""
    four = plan(4, method="lora").estimate().host(has_gpu=True)
    assert four < 24e9
    assert plan(4, deepspeed="zero2").estimate().host(has_gpu=True) == four
    assert plan(4, deepspeed="zero3").estimate().host(has_gpu=True) == pytest.approx(4 * 3e9 + 12.5e9, rel=0.01)
    memory_check.check_states_fit(plan(4, method="lora"), 24e9, 32e9)
    with pytest.raises(UserError, match=r"need \d+\.\d GB of the host, 16\.0 GB are free"):
        memory_check.check_states_fit(plan(4, method="lora"), 24e9, 16e9)


def test_a_lora_of_the_6b_fits_into_the_memory_its_readme_gives_and_full_fine_tuning_does_not():
    """14,082 MiB is what ChatGLM3's README gives for LoRA, with the base in 16 bits."""
    assert plan(method="lora", per_device_train_batch_size=1).estimate().fits(16e9, 64e9)
    assert not plan(method="lora", per_device_train_batch_size=1).estimate().fits(12e9, 64e9)
    assert not plan().estimate().fits(80e9, 512e9)


@pytest.mark.parametrize(
    ("gigabytes", "method", "batch", "checkpointing"),
    [(6, "qlora", 1, True), (16, "lora", 1, True), (24, "lora", 4, True), (24, "ptuning", 1, False)],
)
def test_the_first_page_names_methods_that_fit_each_gpu_with_the_longest_default_rows(
    gigabytes, method, batch, checkpointing
):
    chosen = plan(length=1025, method=method, per_device_train_batch_size=batch, gradient_checkpointing=checkpointing)
    assert chosen.estimate().fits(gigabytes * 1e9, 64e9)


def test_the_first_page_names_a_method_that_fits_32_gb_without_a_gpu():
    chosen = plan(length=1025, method="lora", per_device_train_batch_size=1, gradient_checkpointing=True)
    assert replace(chosen, compute_dtype=torch.float32).estimate().fits(None, 32e9)


@pytest.mark.parametrize(
    ("method", "fields", "dtype"),
    [
        ("full", {}, torch.float32),
        ("lora", {}, torch.float32),
        ("lora", {"lora_target": "all-linear"}, torch.float32),
        ("lora", {"lora_target": "all-linear"}, torch.bfloat16),
        ("lora", {}, torch.bfloat16),
        ("lora", {"lora_dropout": 0.0}, torch.bfloat16),
    ],
)
def test_the_activations_of_a_layer_are_what_autograd_saves(method, fields, dtype, toy_native):
    """Measured on the tiny model: four layers minus two, per token. Observed difference: 1 to 6 %."""
    arguments = TrainArguments(toy_native, Path("rows"), Path("out"), method=method, **fields)
    shape = open_native(toy_native).model_config
    model = trainable_model.load(arguments, shape, dtype).train()
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
    if arguments.saves_adapter:  # a CPU keeps the masks of dropout in the dtype of the states, CUDA in bytes
        masked = {"attention": 3 * shape.hidden_size, "all-linear": 5 * shape.hidden_size + shape.intermediate_size}
        counted -= (dtype.itemsize - 1) * masked[arguments.lora_target] if arguments.lora_dropout else 0
    assert layer_activation_bytes(shape, dtype.itemsize, arguments) == pytest.approx(counted, rel=0.1)


def test_a_run_that_cannot_fit_is_rejected_with_the_smallest_change_that_would_fit():
    """Full fine-tuning on one H100 of 80 GB."""
    with pytest.raises(UserError, match=r"need \d+.\d GB of each GPU, 79.0 GB are free; .*offload.* would fit"):
        memory_check.check_states_fit(plan(), 79e9, 512e9)
    with pytest.raises(UserError, match="; --method lora would fit"):
        memory_check.check_states_fit(plan(), 40e9, 30e9)
    with pytest.raises(UserError, match="use more or larger GPUs"):
        memory_check.check_states_fit(plan(), 1e9, 8e9)
    memory_check.check_states_fit(plan(8, deepspeed="zero3"), 79e9, 512e9)


def test_an_optimizer_offloaded_to_a_small_host_is_rejected_with_the_host_as_the_reason():
    """The GPU has enough memory; the host does not, for 75 GB of Adam states and float32 copies."""
    offloaded = plan(deepspeed="zero3-offload")
    with pytest.raises(UserError, match=r"need 1\d\d.\d GB of the host, 64.0 GB are free; --method lora would fit"):
        memory_check.check_states_fit(offloaded, 79e9, 64e9)
    with pytest.raises(
        UserError, match=r"GB of the host, 4.0 GB are free; use more memory \(with Compose: TRAIN_MEMORY"
    ):
        memory_check.check_states_fit(offloaded, 79e9, 4e9)
    memory_check.check_states_fit(offloaded, 79e9, 256e9)


def test_activations_are_recomputed_only_where_memory_asks_for_it(caplog):
    """The states of a LoRA fit 24 GB, four rows of the longest length do not: the log names the flag."""
    longest = plan(length=1025, method="lora")
    memory_check.warn_of_long_batches(longest, 80e9)
    memory_check.warn_of_long_batches(longest, None)
    assert not caplog.records
    memory_check.warn_of_long_batches(longest, 24e9)
    assert "rows of 1025 tokens" in caplog.text
    assert caplog.text.strip().endswith("use --gradient-checkpointing")
    memory_check.warn_of_long_batches(plan(length=1025, method="lora", gradient_checkpointing=True), 24e9)
    assert len(caplog.records) == 1


def test_checkpointing_is_needed_only_where_the_longest_batch_fits_with_it_alone():
    longest = plan(length=1025, method="lora")
    needs = memory_check.needs_checkpointing
    assert [needs(longest, free) for free in (12e9, 24e9, 80e9, None)] == [False, True, False, False]
    assert not needs(replace(longest, length=64), 24e9)
    assert not needs(plan(length=1025, method="lora", gradient_checkpointing=True), 24e9)
    assert not needs(plan(length=1025, method="ptuning"), 24e9)


def test_a_run_whose_longest_rows_fit_only_so_is_checkpointed_in_every_worker_of_the_node(
    toy_native, sample_file, tmp_path, monkeypatch, caplog
):
    run = open_run(TrainArguments(toy_native, sample_file, tmp_path / "out", method="lora", device="cpu"), None)
    longest = max(prepare(run, 2).dataset["length"])
    chosen = replace(MemoryPlan.of_run(run, ProcessLayout(2)), length=longest)
    checkpointed = chosen.with_arguments(replace(run.arguments, gradient_checkpointing=True))
    free = (chosen.estimate().gpu + checkpointed.estimate().gpu) / 2
    monkeypatch.setattr(memory_check, "min_free_gpu_memory", lambda count: free)
    started = []
    monkeypatch.setattr(session.launch, "start_workers", lambda layout, command: started.append(command))
    monkeypatch.setattr(session, "_complete", lambda run, train: train())
    with caplog.at_level("INFO", "entrypoints.training.session"):
        session._train_on_node(run, ProcessLayout(2), ["--flags"])
        session._train_on_node(run, ProcessLayout(2, nnodes=2), ["--flags"])
    assert [command[1:-1] for command in started] == [["--gradient-checkpointing"], []]
    lines = [record.message for record in caplog.records if record.name == "entrypoints.training.session"]
    assert lines == [f"the longest batch, of rows of {longest} tokens, fits with gradient checkpointing, which is on"]


def test_without_a_gpu_all_states_of_every_process_count_once_against_the_host():
    """In float32 16 bytes per parameter without DeepSpeed, 20 with it: 99.9 and 124.9 GB, offloaded or not."""

    def host(processes, **fields):
        return (
            replace(plan(processes, length=16, **fields), compute_dtype=torch.float32).estimate().host(has_gpu=False)
            / 1e9
        )

    assert host(1) == pytest.approx(99.9 + 3, abs=4)
    assert host(2) == pytest.approx(2 * (host(1) + 4 * 6.24), abs=0.1)  # DistributedDataParallel copies all gradients
    for preset, step in (("zero2", 25), ("zero2-offload", 0), ("zero3-offload", 4)):
        assert host(1, deepspeed=preset) == pytest.approx(124.9 + 3 + step, abs=4), preset
    assert host(2, deepspeed="zero3") == pytest.approx(124.9 + 6 + 2 * 4, abs=6)
    two = replace(plan(2), compute_dtype=torch.float32)
    with pytest.raises(UserError, match=r"need 199.8 GB of the host, 150.0 GB are free; --deepspeed zero3 .* fit"):
        memory_check.check_states_fit(two, None, 150e9)
    assert not two.estimate().fits(None, 200e9)


def test_without_a_gpu_no_alternative_needs_one():
    without_gpu = [flags for flags, _ in memory_check.list_alternatives(plan(2), None)]
    assert len(without_gpu) >= 5
    assert not [flags for flags in without_gpu if "qlora" in flags or "offload" in flags]
    with_gpu = [flags for flags, _ in memory_check.list_alternatives(plan(2), 24e9)]
    assert "--method qlora --gradient-checkpointing" in with_gpu


REQUIRED = ("--model-name-or-path", "base", "--train-file", "rows", "--output-dir", "out")


def parsed(flags):
    """TrainArguments of a command line with these flags."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parse_train_arguments(parser.parse_args([*REQUIRED, *flags]), Settings())


def test_on_a_gpu_without_bfloat16_fp16_is_offered_and_makes_a_lora_fit_16_gb():
    """A T4: the run would compute in float32. The counted weights and activations of the remedy are half as large."""
    t4 = replace(
        plan(length=1025, method="lora", gradient_checkpointing=True, per_device_train_batch_size=1),
        compute_dtype=torch.float32,
    )
    with pytest.raises(UserError, match=r"need 25\.\d GB of each GPU, 15\.6 GB are free; --fp16 would fit"):
        memory_check.check_states_fit(t4, 15.6e9, 64e9)
    (remedy,) = (changed for flags, changed in memory_check.list_alternatives(t4, 15.6e9) if flags == "--fp16")
    memory_check.check_states_fit(remedy, 15.6e9, 64e9)
    assert remedy.estimate().weights == pytest.approx(12.5e9, rel=0.01)
    assert "--fp16" not in dict(memory_check.list_alternatives(replace(t4, compute_dtype=torch.bfloat16), 15.6e9))
    assert not [flags for flags, _ in memory_check.list_alternatives(t4, None) if "--fp16" in flags]


def test_a_lora_that_does_not_fit_a_small_gpu_is_offered_as_qlora():
    small = plan(method="lora", gradient_checkpointing=True, per_device_train_batch_size=1)
    with pytest.raises(UserError, match="--method qlora would fit"):
        memory_check.check_states_fit(small, 7e9, 8e9)


def test_eight_gpus_of_one_machine_are_loaded_within_the_memory_limit_of_compose():
    limit = re.search(r"TRAIN_MEMORY:-(\d+)g", (REPOSITORY / "compose" / "common.yaml").read_text())
    for fields in ({"method": "lora"}, {"deepspeed": "zero2"}, {"deepspeed": "zero3"}):
        assert plan(8, **fields).estimate().host(has_gpu=True) < int(limit[1]) << 30


@pytest.mark.parametrize("gpu", [None, 24e9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "flags",
    [
        (), ("--gradient-checkpointing", "--per-device-train-batch-size", "1"), ("--deepspeed", "zero3-offload"),
        ("--method", "ptuning"), ("--method", "ptuning", "--per-device-train-batch-size", "1", "--deepspeed", "zero2"),
        ("--method", "lora", "--quantization-bit", "8", "--packing"), ("--method", "lora"), ("--method", "qlora"),
        ("--method", "freeze", "--deepspeed", "zero2", "--fp16"), ("--pre-seq-len", "64"),
        ("--method", "freeze", "--freeze-layers", "2", "--deepspeed", "zero2"),
    ],
)  # fmt: skip
def test_the_flags_of_every_alternative_turn_the_given_run_into_it(flags, dtype, gpu):
    """Added to the given flags and without the omitted ones: none is rejected, missing or repeated."""
    found = memory_check.list_alternatives(replace(plan(2), compute_dtype=dtype).with_arguments(parsed(flags)), gpu)
    assert found
    for text, alternative in found:
        added, _, omitted = text.partition("without ")
        kept = list(flags)
        for flag in omitted.split(" and ") if omitted else []:
            del kept[kept.index(flag) : kept.index(flag) + 2]
        assert parsed([*kept, *added.split()]) == alternative.arguments, text
        assert set(added.split()).isdisjoint({"--gradient-checkpointing"} & set(flags)), text


def test_of_several_workers_only_the_first_checks_the_memory_of_its_node(toy_native, monkeypatch):
    run = open_run(TrainArguments(toy_native, Path("rows"), Path("out"), device="cpu"), None)
    env = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "1"}
    of_run = MemoryPlan.of_run(run, worker_layout(env))
    memory_check.check_node(of_run, env)
    monkeypatch.setattr(memory_check, "available_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"of the host, .* are free"):
        memory_check.check_node(of_run, env)
    memory_check.check_node(of_run, env | {"LOCAL_RANK": "1"})


def test_the_table_starts_with_the_given_run_and_shows_for_each_row_whether_it_fits():
    lines = memory_check.format_table(plan(8, deepspeed="zero2"), 24e9, 512e9).splitlines()
    assert "each of 8 processes; 24.0 GB free on each GPU, 512.0 GB free on the host" in lines[0]
    assert lines[1].split() == ["weights", "gradients", "optimizer", "activations", "GPU", "host", "fits"]
    assert lines[2].strip().startswith("as given")
    assert lines[2].endswith("no")
    assert any("zero3" in line and line.endswith("yes") for line in lines[3:])
    assert len(lines) >= 8
    alone = memory_check.format_table(plan(), None, 64e9).splitlines()
    assert "no GPU: host memory only" in alone[0]
    assert re.split(" {2,}", alone[2])[-3] == "-"


def test_dry_run_prints_the_table_and_the_torchrun_command_and_writes_nothing(
    toy_native, sample_file, tmp_path, capsys
):
    from entrypoints.__main__ import main

    flags = ["--model-name-or-path", toy_native, "--train-file", sample_file, "--output-dir", tmp_path / "out"]
    assert main([str(flag) for flag in ["train", *flags, "--dry-run", "--num-processes", 2, "--device", "cpu"]]) == 0
    out = capsys.readouterr().out
    assert "as given" in out
    line = out.splitlines()[-1]
    assert re.match(r"torchrun --standalone .*--nproc-per-node 2 .*-m entrypoints train --model-name-or-path", line)
    assert "--dry-run" not in line
    assert not (tmp_path / "out").exists()


SMALL_MEMORY = """
import sys
from pathlib import Path
from entrypoints.training.preflight.memory_check import check_shared_memory

check_shared_memory(1, Path(sys.argv[1]))
print("enough for one", flush=True)
check_shared_memory(8, Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_the_default_shared_memory_of_a_container_is_rejected_for_several_processes(tmp_path):
    """A real mount of 64 MB where this is allowed."""
    memory_check.check_shared_memory(8, tmp_path)  # a disk is larger
    memory_check.check_shared_memory(8, tmp_path / "nowhere")
    command = [*with_small_disk(tmp_path, 64), sys.executable, "-c", SMALL_MEMORY, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "enough for one\n"), done.stderr
    assert re.search(r"UserError: .*has 64 MB, and 8 processes .*--shm-size", done.stderr)
