"""The processes of vLLM: what is rejected before they start, what they print, how they end."""

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from reference import greedy, reference_answers
from safetensors.torch import load_file
from transformers import GlmConfig, GlmForCausalLM

from entrypoints.chat_format.answer_parser import decode
from entrypoints.checkpoint.tokenizer import TOKENIZER_FILE
from entrypoints.engines.base import Engine
from entrypoints.engines.options import EngineOptions
from entrypoints.engines.vllm.child_watchdog import INTERVAL_SECONDS
from entrypoints.engines.vllm.engine import VllmEngine
from entrypoints.errors import UserError

LONG = 900  # tokens of an answer that is interrupted


def processes() -> list[psutil.Process]:
    """The processes of vLLM, without Python's resource tracker."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if child.status() != "zombie" and "VLLM" in "".join(child.cmdline())]


def blocks(process: psutil.Process, number: signal.Signals) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    (mask,) = [line.split()[1] for line in status.splitlines() if line.startswith("SigBlk")]
    return bool(int(mask, 16) >> (number - 1) & 1)


def in_background(call: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            call()
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, errors


def start(model: Path, **other: object) -> Engine:
    return VllmEngine.load(model, EngineOptions(slots=2, **({"dtype": "float32"} | other)))


@pytest.fixture
def wide_golden(golden_native: Path, tmp_path: Path) -> Path:
    """The real vocabulary with random weights; vLLM's CPU kernels do not support the reference's head_dim of 16."""
    folder = tmp_path / "model"
    torch.manual_seed(1)
    config = GlmConfig.from_pretrained(golden_native, head_dim=32, num_hidden_layers=1)
    GlmForCausalLM(config).save_pretrained(folder)
    for name in (TOKENIZER_FILE, "tokenizer_config.json"):
        shutil.copy(golden_native / name, folder / name)
    return folder


def test_the_real_vocabulary_gives_the_same_ids_and_json(golden: Path, wide_golden: Path):
    expected = load_file(golden / "original-tiny.expected.safetensors")
    prompts = [expected[f"{name}.input_ids"][0].tolist() for name in ("short", "multi", "tools")]
    schema = {
        "type": "object",
        "properties": {"颜色": {"enum": ["红色", "blue"]}, "fits": {"type": "boolean"}},
        "required": ["颜色", "fits"],
        "additionalProperties": False,
    }
    engine = start(wide_golden)
    try:
        assert engine.generate_batch(prompts, greedy()) == reference_answers(wide_golden, prompts)
        answer = json.loads(decode(engine.generate(prompts[1], greedy(60, json_schema=schema)), engine.tokenizer))
    finally:
        engine.close()
    assert answer["颜色"] in ("红色", "blue")
    assert answer["fits"] in (True, False)
    assert not processes()


def test_layers_split_over_two_processes_give_the_same_answers(
    toy: Path, lora: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
):
    """Tensor parallelism over two processes on the CPU, in place of two GPUs."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # otherwise it needs a NUMA node per process
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    engine = VllmEngine.load(
        toy, EngineOptions(adapters={"tuned": lora}, slots=4, dtype="float32", tensor_parallel_size=2)
    )
    few, short = prompts[2:18:4], 8  # the processes synchronize at every layer, which is slow on a busy machine
    try:
        assert len(processes()) == 3
        plain = [answer[:short] for answer in reference_answers(toy, few)]
        assert engine.generate_batch(few, greedy(short)) == plain
        tuned = [list(engine.generate(prompt, greedy(short), "tuned")) for prompt in few]
        assert tuned == [answer[:short] for answer in reference_answers(toy, few, lora)]
    finally:
        engine.close()


def test_prefix_adapters_are_rejected_before_vllm_starts(toy: Path, prefix: Path, lora: Path):
    started = time.monotonic()
    with pytest.raises(UserError, match=r"P-Tuning v2.*: soft; .*--engine transformers"):
        VllmEngine.load(toy, EngineOptions(adapters={"tuned": lora, "soft": prefix}, slots=2))
    assert time.monotonic() - started < 2
    assert not processes()


def test_a_device_that_vllm_was_not_built_for_is_rejected(toy: Path):
    with pytest.raises(UserError, match="built for cpu, not for --device cuda"):
        start(toy, device="cuda")


def test_slots_that_exceed_the_memory_are_rejected_before_vllm_starts(toy: Path):
    with pytest.raises(UserError, match=r"--slots 1000000 of 1024 tokens needs .* GB"):
        VllmEngine.load(toy, EngineOptions(slots=10**6))


def test_a_failed_start_raises_an_error_and_leaves_no_process_behind(toy: Path):
    with pytest.raises(RuntimeError, match="vLLM cannot load"):
        start(toy, dtype="float8_e4m3fn")
    assert not processes()
    assert "vllm" not in {thread.name for thread in threading.enumerate()}


def test_closing_ends_running_answers_with_an_error(toy: Path, capfd: pytest.CaptureFixture):
    """It also prints nothing to stdout, and its processes block Ctrl-C."""
    engine = start(toy)
    assert len(processes()) == 2
    assert all(blocks(process, signal.SIGINT) and not blocks(process, signal.SIGTERM) for process in processes())
    tokens = engine.generate([700, 701], greedy(LONG))
    next(tokens)
    thread, errors = in_background(lambda: list(tokens))
    time.sleep(0.1)
    engine.close()
    thread.join(timeout=5)
    assert [str(error) for error in errors] == ["the engine was closed"]
    with pytest.raises(RuntimeError, match="the engine was closed"):
        next(engine.generate([700, 701], greedy()))
    engine.close()
    assert engine.fatal_error is None
    assert not processes()
    assert capfd.readouterr().out == ""


def test_a_dead_engine_is_reported_and_ends_its_answers_with_an_error(toy: Path):
    engine = start(toy)
    assert engine.fatal_error is None
    tokens = engine.generate([700, 701], greedy(LONG))
    next(tokens)
    thread, errors = in_background(lambda: list(tokens))
    for process in processes():
        process.kill()
    thread.join(timeout=10)
    assert [type(error) for error in errors] == [RuntimeError]
    assert engine.fatal_error == "vLLM's engine died"
    with pytest.raises(RuntimeError, match="vLLM"):
        list(engine.generate([700, 701], greedy()))
    engine.close()


SERVER = """
import sys, time
from pathlib import Path
from entrypoints.engines.options import EngineOptions
from entrypoints.engines.vllm.engine import VllmEngine
if __name__ == "__main__":
    VllmEngine.load(Path(sys.argv[1]), EngineOptions(slots=2, dtype="float32"))
    print("ready", flush=True)
    time.sleep(600)
"""


def test_a_server_that_is_killed_takes_its_engine_with_it(toy: Path, tmp_path: Path):
    """Without the watchdog the processes of vLLM would run on and keep their memory."""
    program = tmp_path / "server.py"
    program.write_text(SERVER)
    with subprocess.Popen([sys.executable, program, toy], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout.readline() == "ready\n"
        started = processes()
        assert len(started) == 2
        time.sleep(2 * INTERVAL_SECONDS)
        server.kill()
    _, alive = psutil.wait_procs(started, timeout=20)
    assert not alive
