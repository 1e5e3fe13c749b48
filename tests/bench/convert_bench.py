"""Cost of `glm convert` on a checkpoint of a model's full size: peak memory, seconds, ratio to a plain copy.

A random 16-bit checkpoint in the original layout (ChatGLM3-6B: 28 layers, 7 pytorch_model-*.bin, 12.5 GB; GLM-4-9B: 40
layers, 10 files, 18.8 GB) is written to a temporary folder. Its files are copied one by one with shutil.copyfile (no
fsync) and timed; the copy is deleted. Then `glm convert` runs in its own process, timed from start to exit, including
the reading of its result for the hashes of the manifest; its peak is measured by the kernel (ru_maxrss: resident
memory, including mapped pages of files). Before both, the source is dropped from the page cache, so both read the disk.
Everything is deleted at the end, also after an error. Exits with 1 if the peak is above 3 GiB.

    python tests/bench/convert_bench.py                            needs 25 GB of disk, minutes
    python tests/bench/convert_bench.py --model glm-4-9b-chat      needs 38 GB
    python tests/bench/convert_bench.py --layers 2                 needs 4 GB
"""

import argparse
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from entrypoints.families import Family

REPOSITORY = Path(__file__).resolve().parents[2]
GOLDEN = Path(os.environ.get("GOLDEN_DIR", REPOSITORY.parent / "shared" / "golden"))
MODELS = {  # family, files of the original checkpoint, its dtype, folder of a vocabulary
    "chatglm3-6b": ("chatglm3", 7, "float16", GOLDEN / "original-tiny"),
    "glm-4-9b-chat": ("glm4", 10, "bfloat16", GOLDEN.with_name("golden-family") / "glm4-tiny"),
}
LIMIT = 3 << 30  # bytes of resident memory


def main(argv: list[str] | None = None) -> int:
    """Write, copy, convert, report; returns 1 if the conversion fails or takes more than LIMIT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="chatglm3-6b", help="model whose shape is written")
    parser.add_argument("--layers", type=int, help="layers of the model (default: all)")
    parser.add_argument("--work-dir", type=Path, help="folder on the disk to measure (default: the temporary one)")
    parser.add_argument(
        "--vocabulary", type=Path, help="tokenizer.model (default: the golden one, otherwise that of the demo model)"
    )
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the folder is removed
    with tempfile.TemporaryDirectory(dir=args.work_dir, prefix="convert-bench-") as folder:
        return _bench(Path(folder), args.model, args.layers, args.vocabulary)


def _bench(folder: Path, model: str, layers: int | None, vocabulary: Path | None) -> int:
    source = folder / "original"
    # spawned, so that this process stays small: the peak of a child includes the size of its parent at the start
    writer = multiprocessing.get_context("spawn").Process(
        target=_write_checkpoint, args=(source, model, layers, vocabulary)
    )
    writer.start()
    writer.join()
    if writer.exitcode:
        return 1
    size = sum(file.stat().st_size for file in source.iterdir())
    weights = len(list(source.glob("*.bin")))
    print(f"{model}, {size / 1e9:.2f} GB in {weights} files, on {folder}; cold: the source left the page cache")
    _drop_from_page_cache(source)
    copying = _copy(source, folder / "copy")
    shutil.rmtree(folder / "copy")
    _drop_from_page_cache(source)
    code, converting, peak = _convert(source, folder / "native")
    print(f"{'':10} {'seconds':>8} {'GB/s':>6} {'ratio':>6} {'peak GiB':>9}")
    print(f"{'copy':10} {copying:8.1f} {size / 1e9 / copying:6.2f} {1:6.2f}")
    print(
        f"{'convert':10} {converting:8.1f} {size / 1e9 / converting:6.2f} {converting / copying:6.2f} "
        f"{peak / (1 << 30):9.2f} (limit {LIMIT / (1 << 30):.0f})"
    )
    return 1 if code or peak > LIMIT else 0


def _copy(source: Path, target: Path) -> float:
    target.mkdir()
    start = time.perf_counter()
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, target / file.name)
    return time.perf_counter() - start


def _convert(source: Path, target: Path) -> tuple[int, float, int]:
    """Exit code, seconds and peak bytes of `glm convert`."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "entrypoints", "convert", source, target], cwd=REPOSITORY)
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        process.kill()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, time.perf_counter() - start, usage.ru_maxrss * 1024


def _drop_from_page_cache(folder: Path) -> None:
    """Write the files of a folder to disk and drop them from the page cache."""
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _write_checkpoint(folder: Path, model: str, layers: int | None, vocabulary: Path | None) -> None:
    """Random weights of the model's shape under the original names, tensor after tensor in its number of files."""
    sys.path.insert(0, str(REPOSITORY))
    import torch

    from entrypoints.checkpoint.atomic_files import require_disk_space
    from entrypoints.checkpoint.layout import tensor_mappings
    from entrypoints.checkpoint.original_config import original_config
    from entrypoints.errors import UserError
    from entrypoints.families import FAMILIES
    from entrypoints.hub.model_dimensions import PUBLISHED

    family, files, dtype, example = MODELS[model]
    model_config = PUBLISHED[f"THUDM/{model}"]
    model_config = replace(model_config, num_layers=layers or model_config.num_layers)
    entries = tensor_mappings(model_config)
    total = 2 * sum(torch.Size(entry.shape).numel() for entry in entries)
    try:
        require_disk_space(folder, int(2.05 * total))  # the source, and beside it the copy or the result
    except UserError as error:
        sys.exit(f"convert_bench: {error}")
    folder.mkdir()
    block = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(getattr(torch, dtype))
    weight_map, part, written = {}, {}, 0
    for number, entry in enumerate(entries):
        part[entry.original] = _filled(entry.shape, block)
        written += part[entry.original].nbytes
        file = len(set(weight_map.values())) + 1
        if written >= total * file / files or number == len(entries) - 1:
            name = f"pytorch_model-{file:05}-of-{files:05}.bin"
            torch.save(part, folder / name)
            weight_map |= dict.fromkeys(part, name)
            part = {}
    index = {"metadata": {"total_size": written}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(original_config(model_config, dtype, FAMILIES[family])))
    _write_vocabulary(folder, vocabulary or example / "tokenizer.model", FAMILIES[family])


def _filled(shape: tuple[int, ...], block: "torch.Tensor") -> "torch.Tensor":
    """A tensor that repeats the block: random enough, and created at the speed of a copy."""
    flat = block.new_empty(math.prod(shape))
    for start in range(0, flat.numel(), block.numel()):
        flat[start : start + block.numel()] = block[: flat.numel() - start]
    return flat.view(shape)


def _write_vocabulary(folder: Path, vocabulary: Path, family: "Family") -> None:
    from entrypoints.demo.model import write_demo_model

    if vocabulary.is_file():
        shutil.copyfile(vocabulary, folder / "tokenizer.model")
        return
    sample = REPOSITORY / "entrypoints" / "demo" / "ad_copy.jsonl"
    with tempfile.TemporaryDirectory() as demo:
        write_demo_model(Path(demo), sample.read_text(encoding="utf-8").splitlines(), family=family)
        shutil.copyfile(Path(demo, "tokenizer.model"), folder / "tokenizer.model")


if __name__ == "__main__":
    sys.exit(main())
