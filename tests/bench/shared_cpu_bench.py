"""Work on CPUs that other processes use too: seconds alone, beside busy processes, and under a quota of 1.5 CPUs.

Each kind of work runs in a process of its own, once with OpenMP's default and once with the spinning that every command
of `glm` sets (`hardware.resources.limit_openmp_spinning`), in turn. Two CPUs with four busy processes and two threads
give each thread a third, so three times slower than alone is the best that can be expected.

    llamacpp      tokens of a GGUF file, 2 layers of the 6B's width in q4_0
    transformers  forward passes of one token, 2 layers of the same width in bfloat16
    training      steps of a small model

    python tests/bench/shared_cpu_bench.py                needs 4 GB of memory, 6 minutes on two cores
    python tests/bench/shared_cpu_bench.py --work llamacpp --gguf model.gguf
"""

import argparse
import contextlib
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import random_model

from entrypoints.hardware.resources import available_cpus, limit_openmp_spinning

WORK = ("llamacpp", "transformers", "training")
CGROUP_V1, CGROUP_V2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
QUOTA, PERIOD = 150_000, 100_000
NO_QUOTA = "a quota needs root and a cgroup file system that is writable"


def main(argv: list[str] | None = None) -> int:
    """Measure each work in each place, alternating the two settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=WORK, nargs="+", default=WORK)
    parser.add_argument("--busy", type=int, default=4, help="other processes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gguf", type=Path, help="file for llamacpp (default: one is created)")
    parser.add_argument("--child", choices=WORK, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        print(globals()[f"_{args.child}"](args.gguf))
        return 0
    with tempfile.TemporaryDirectory(prefix="shared-cpu-bench-") as folder:
        file = args.gguf or _create(Path(folder), args.work)
        for work in args.work:
            _measure(work, file, args)
    return 0


def _measure(work: str, file: Path | None, args: argparse.Namespace) -> None:
    limited: dict[str, str] = {}
    limit_openmp_spinning(limited, ["model.gguf"] if work == "llamacpp" else [])
    ((name, value),) = limited.items()
    alone: dict[str, float] = {}
    for place, context in (("alone", contextlib.nullcontext), ("beside", _busy), ("quota", _quota)):
        with context(args.busy) if place == "beside" else context() as prefix:
            if place == "quota" and prefix is None:
                print(f"{work:13} {NO_QUOTA}")
                continue
            seconds: dict[str, list[float]] = {"default": [], value: []}
            for _ in range(args.rounds):
                for setting, env in (("default", {}), (value, limited)):
                    seconds[setting].append(_run(work, file, env, prefix or []))
        for setting, times in seconds.items():
            median = statistics.median(times)
            alone.setdefault(setting, median)
            print(
                f"{work:13} {place:7} {name} {setting:8} {median:6.2f} s, {median / alone[setting]:5.2f} times",
                flush=True,
            )
        print(
            f"{work:13} {place:7} ratio {statistics.median(b / a for a, b in zip(*seconds.values(), strict=True)):.3f}"
        )


def _run(work: str, file: Path | None, env: dict[str, str], prefix: list[str]) -> float:
    kept = {name: text for name, text in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [*prefix, sys.executable, __file__, "--child", work, *(["--gguf", str(file)] if file else [])]
    return float(subprocess.run(command, env=kept | env, check=True, capture_output=True, text=True).stdout)


@contextlib.contextmanager
def _busy(count: int) -> Iterator[None]:
    """Other processes that compute without a pause."""
    spawn = multiprocessing.get_context("spawn")
    others = [spawn.Process(target=_spin, daemon=True) for _ in range(count)]
    for other in others:
        other.start()
    time.sleep(2)
    yield
    for other in others:
        other.kill()
        other.join()


def _spin() -> None:
    while True:
        pass


@contextlib.contextmanager
def _quota() -> Iterator[list[str] | None]:
    """A command in front of others that limits them to a CPU and a half; None if that is not permitted."""
    first = CGROUP_V1 if CGROUP_V1.is_dir() else CGROUP_V2
    folder = first / f"glm-bench-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError:
        yield None
        return
    try:
        if first == CGROUP_V1:
            (folder / "cpu.cfs_period_us").write_text(f"{PERIOD}")
            (folder / "cpu.cfs_quota_us").write_text(f"{QUOTA}")
        else:
            (folder / "cpu.max").write_text(f"{QUOTA} {PERIOD}")
        yield ["sh", "-c", f'echo $$ > {folder}/cgroup.procs && exec "$@"', "sh"]
    except OSError:
        yield None
    finally:
        folder.rmdir()


def _create(folder: Path, work: list[str]) -> Path | None:
    """Two layers of the 6B's width as a GGUF file."""
    if "llamacpp" not in work:
        return None
    from entrypoints.quantization.gguf_writer import write_gguf

    random_model.write(folder / "native", 2)
    write_gguf(folder / "native", folder / "model.gguf", "q4_0")
    return folder / "model.gguf"


def _llamacpp(file: Path) -> float:
    from entrypoints.chat_format.sampling import Sampling
    from entrypoints.engines.llamacpp.engine import LlamaCppEngine
    from entrypoints.engines.options import EngineOptions

    engine = LlamaCppEngine.load(file, EngineOptions(context_length=512))
    start = time.monotonic()
    list(engine.generate(range(100, 164), Sampling(max_new_tokens=48, temperature=0)))
    seconds = time.monotonic() - start
    engine.close()
    return seconds


def _transformers(_: Path | None) -> float:
    import torch
    from transformers import GlmConfig, GlmForCausalLM

    from entrypoints.checkpoint.layout import ModelConfig

    torch.set_num_threads(available_cpus())
    config = GlmConfig(
        **ModelConfig(2, 4096, 32, 2, 128, 13696, 2048, 8192, 1e-5, 1).native_config("bfloat16", (2,), 0)
    )
    model = GlmForCausalLM(config).to(torch.bfloat16).eval()
    ids = torch.arange(100, 116)[None]
    with torch.inference_mode():
        cache = model(ids, use_cache=True).past_key_values
        start = time.monotonic()
        for _ in range(12):
            model(ids[:, -1:], past_key_values=cache, use_cache=True)
    return time.monotonic() - start


def _training(_: Path | None) -> float:
    import torch
    from transformers import GlmConfig, GlmForCausalLM

    from entrypoints.checkpoint.layout import ModelConfig

    torch.set_num_threads(available_cpus())
    config = GlmConfig(**ModelConfig(4, 256, 4, 2, 64, 768, 2048, 512, 1e-5, 1).native_config("float32", (2,), 0))
    model = GlmForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    ids = torch.arange(512).reshape(8, 64)
    start = time.monotonic()
    for _ in range(12):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.monotonic() - start


if __name__ == "__main__":
    sys.exit(main())
