"""How fast llama.cpp reads a prompt, beside what else it could be set to and what the cores can compute.

Four layers of ChatGLM3-6B's width with random weights; 28 take 8.6 times as long: in the last layer
llama.cpp computes gate, up and down for the last token only. One prompt at a time in a new process for each setting, in
two rounds of different order. The rates are those of the product's own settings, each then with one setting changed:

    batch        tokens that are computed at a time (the product: BATCH_TOKENS in engines/llamacpp/server.py)
    attention    llama.cpp's flash attention on and off (the product: llama.cpp decides)
    threads      one less and twice as many (the product: one for each CPU)
    matrices     floating-point operations of the matrices, as a share of torch's float32 matrix product on the same
                 threads; kernels for integers can exceed it

    python tests/bench/prefill_bench.py                needs 3 GB of memory, 45 minutes on two cores
    python tests/bench/prefill_bench.py --types q4_0 --tokens 512
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import lowcost_bench

from entrypoints.engines.llamacpp.cpu_features import load_cpu_code
from entrypoints.engines.llamacpp.server import BATCH_TOKENS
from entrypoints.hardware.resources import available_cpus

LAYERS = 4
# columns and rows of a layer's matrices: queries, keys and values; attention output; gate and up; down
MATRICES = ((4096, 4608), (4096, 4096), (4096, 27392), (13696, 4096))
TYPES = ("q4_0", "q4_k_m", "q8_0")
BATCHES = tuple(size for size in (128, 256, 512, 1024, 2048) if size != BATCH_TOKENS)


def main(argv: list[str] | None = None) -> int:
    """Write and quantize the model, read prompts, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=TYPES, help=f"as in glm quantize (default: {' '.join(TYPES)})")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048], help="lengths of the prompts")
    parser.add_argument("--defaults", action="store_true", help="measure the product's own settings only")
    args = parser.parse_args(argv)
    cpus = available_cpus()
    settings = [{}] if args.defaults else _settings(cpus)
    limit = _matrix_rate(cpus)
    print(f"CPU code {load_cpu_code()}; torch multiplies float32 at {limit:.0f} GFLOP/s on {cpus} threads", flush=True)
    with tempfile.TemporaryDirectory(prefix="prefill-bench-") as name:
        folder = Path(name)
        lowcost_bench.in_a_process(lowcost_bench.write_random_model, folder / "native", LAYERS)
        for type_ in args.types:
            file = folder / f"{type_}.gguf"
            lowcost_bench.quantize(folder / "native", file, type_)
            _report(file, type_, args.tokens, settings, limit)
            file.unlink()
    return 0


def _settings(cpus: int) -> list[dict[str, object]]:
    return [
        {},
        *({"n_batch": size, "n_ubatch": size} for size in BATCHES),
        {"flash_attn_type": "ENABLED"},
        {"flash_attn_type": "DISABLED"},
        *({"threads": count} for count in (cpus - 1, 2 * cpus) if count),
    ]


def _report(file: Path, type_: str, lengths: list[int], settings: list[dict], limit: float) -> None:
    rates: dict[tuple[int, int], list[float]] = {}
    numbered = list(enumerate(settings))
    half = len(numbered) // 2
    lowcost_bench.in_a_process(read_prompts, file, {}, lengths)  # the first after writing the file is slower
    for order in (numbered, [*numbered[half::-1], *numbered[:half:-1]]):
        for number, setting in order:
            found = lowcost_bench.in_a_process(read_prompts, file, setting, lengths)
            for length, timings in zip(lengths, found, strict=True):
                rates.setdefault((number, length), []).append(timings["prompt_per_second"])
    attention, layer = (sum(columns * rows for columns, rows in part) for part in (MATRICES[:2], MATRICES))
    operations = 2 * ((LAYERS - 1) * layer + attention)
    for length in lengths:
        own = statistics.mean(rates[0, length])
        share = own * operations / 1e9 / limit
        print(f"{type_}, {length} tokens: {own:.1f} tokens/s, matrices at {share:.2f} of torch's float32", flush=True)
        for number, setting in numbered[1:]:
            rate = statistics.mean(rates[number, length])
            named = ", ".join(f"{key}={value}" for key, value in setting.items())
            print(f"    {named}: {rate / own:.2f}", flush=True)


def read_prompts(
    file: Path, setting: dict[str, object], lengths: Sequence[int], new_tokens: int = 1
) -> list[dict[str, float]]:
    """llama.cpp's timings of one prompt of each length and the tokens generated after it; a short one comes first."""
    import xllamacpp

    from entrypoints.checkpoint.gguf_reader import open_gguf
    from entrypoints.engines.llamacpp import server as llama_server
    from entrypoints.engines.options import EngineOptions

    threads = setting.pop("threads", None)
    launch = llama_server.launch

    def changed(params: object, *rest: object) -> object:
        for name, value in setting.items():
            if name == "flash_attn_type":
                value = getattr(xllamacpp.llama_flash_attn_type, f"LLAMA_FLASH_ATTN_TYPE_{value}")
            setattr(params, name, value)
        return launch(params, *rest)

    llama_server.launch = changed
    options = EngineOptions(context_length=max(lengths) + 64, threads=threads)
    server = llama_server.start_server(options.limited(open_gguf(file)), options)
    timings = []
    for number, length in enumerate((32, *lengths)):
        prompt = [100 + number, *(1000 + (place * 7919) % 2000 for place in range(length - 1))]
        request = {"prompt": prompt, "n_predict": new_tokens, "cache_prompt": False, "ignore_eos": True}
        last: dict = {}
        server.handle_completions(request, last.update)
        assert (last["timings"]["prompt_n"], last["timings"]["predicted_n"]) == (length, new_tokens)
        timings.append(last["timings"])
    return timings[1:]


def _matrix_rate(threads: int) -> float:
    """10^9 floating-point operations per second of torch's float32 product of the widest matrix, best of 5."""
    import torch

    torch.set_num_threads(threads)
    left, right = torch.rand(512, 4096), torch.rand(4096, 13696)
    seconds = []
    for _ in range(5):
        start = time.monotonic()
        torch.mm(left, right)
        seconds.append(time.monotonic() - start)
    return 2 * 512 * right.numel() / min(seconds) / 1e9


if __name__ == "__main__":
    sys.exit(main())
