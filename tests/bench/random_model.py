"""A random model of ChatGLM3-6B's width for the benchmarks, and processes that measure it."""

import multiprocessing
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from serving_process import GLM

SHARD_LAYERS = 4
GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).resolve().parents[3] / "shared" / "golden"))
POLL_SECONDS = 0.05


def write(folder: Path, layers: int) -> None:
    """A converted folder: random matrices, norms 1, biases 0; the golden vocabulary, else that of the demo model."""
    import json

    import torch
    from safetensors.torch import save_file

    from entrypoints.chat_format.prompt import PromptFormat
    from entrypoints.checkpoint.conversion import convert_to_native
    from entrypoints.checkpoint.layout import ModelConfig, tensor_mappings
    from entrypoints.checkpoint.native import copy_vocabulary, write_config_files
    from entrypoints.checkpoint.tokenizer import load_tokenizer
    from entrypoints.demo import model

    original = GOLDEN / "original-tiny"
    if not original.is_dir():
        original = folder.parent / "demo"
        words = Path(model.__file__).with_name("ad_copy.jsonl").read_text(encoding="utf-8").splitlines()
        model.write_demo_model(original, words)
    convert_to_native(original, folder.parent / "tiny", PromptFormat())
    folder.mkdir()
    copy_vocabulary(folder.parent / "tiny", folder)
    model_config = ModelConfig(layers, 4096, 32, 2, 128, 13696, 65024, 8192, 1e-5, 1)
    write_config_files(folder, model_config, "float16", load_tokenizer(folder), PromptFormat())
    noise = (torch.randn(1 << 26, generator=torch.Generator().manual_seed(0)) * 0.02).half()

    def tensor(name: str, size: tuple[int, ...]) -> torch.Tensor:
        if len(size) == 1:
            return torch.zeros(size).half() if name.endswith("bias") else torch.ones(size).half()
        count, first = torch.Size(size).numel(), zlib.crc32(name.encode()) % 100_003
        return noise[first:].repeat(-(-count // (len(noise) - first)))[:count].reshape(size).contiguous()

    sizes = [item for entry in tensor_mappings(model_config) for item in entry.native_shapes().items()]
    step, weight_map = -(-len(sizes) // (layers // SHARD_LAYERS + 1)), {}
    for number in range(0, len(sizes), step):
        file = f"model-{number // step:05}.safetensors"
        part = {name: tensor(name, size) for name, size in sizes[number : number + step]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def quantize(folder: Path, file: Path, type_: str) -> None:
    """Run `glm quantize`, and print its seconds and its peak of anonymous memory."""
    start = time.monotonic()
    process = subprocess.Popen([*GLM, "quantize", str(folder), str(file), "--type", type_])
    most = 0
    while process.poll() is None:
        most = max(most, memory_of(process.pid))
        time.sleep(POLL_SECONDS)
    assert process.returncode == 0
    print(
        f"quantize  {time.monotonic() - start:.1f} s, peak of anonymous memory {most / (1 << 30):.2f} GiB", flush=True
    )


def memory_of(pid: int, field: str = "RssAnon") -> int:
    """Bytes of a field of /proc/PID/status; 0 if the process ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it ended
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(field)), 0)


def in_a_process(work: Callable, *args: object) -> object:
    """What `work` returns in a new process, which has loaded nothing yet."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *args).result()
