"""How fast llama.cpp reads a prompt, beside what else it could be set to and what the cores can compute.

Four layers of ChatGLM3-6B's width with random weights; 28 take 8.6 times as long: in the last layer
llama.cpp computes gate, up and down for the last token only. One prompt at a time in a new process for each setting, in
two rounds of different order. The rates are those of the product's own settings, each then with one setting changed:

    batch        tokens that are computed at a time (the product: BATCH_TOKENS in engines/llamacpp/server.py)
    attention    llama.cpp's flash attention on and off (the product: llama.cpp decides)
    threads      one less and twice as many (the product: one for each CPU)
    matrices     floating-point operations of the matrices, as a share of torch's float32 matrix product on the same
                 threads; kernels for integers can exceed it

With --cpu-codes what is changed is the CPU code of llama.cpp instead: each one that this CPU runs, the wider ones
hidden, with the rate of generating beside that of reading.

    python tests/bench/prefill_bench.py                needs 3 GB of memory, 45 minutes on two cores
    python tests/bench/prefill_bench.py --types q4_0 --tokens 512
    python tests/bench/prefill_bench.py --cpu-codes --tokens 512
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import random_model

from entrypoints.engines.llamacpp import cpu_features
from entrypoints.engines.llamacpp.server import BATCH_TOKENS
from entrypoints.hardware.resources import available_cpus, cpu_flags

LAYERS = 4
NEW_TOKENS = 32  # generated after each prompt with --cpu-codes
# columns and rows of a layer's matrices: queries, keys and values; attention output; gate and up; down
MATRICES = ((4096, 4608), (4096, 4096), (4096, 27392), (13696, 4096))
TYPES = ("q4_0", "q4_k_m", "q8_0")
BATCHES = tuple(size for size in (128, 256, 512, 1024, 2048) if size != BATCH_TOKENS)


def main(argv: list[str] | None = None) -> int:
    """Write and quantize the model, read prompts, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=TYPES, help=f"as in glm quantize (default: {' '.join(TYPES)})")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048], help="lengths of the prompts")
    changed = parser.add_mutually_exclusive_group()
    changed.add_argument("--defaults", action="store_true", help="measure the product's own settings only")
    changed.add_argument("--cpu-codes", action="store_true", help="measure each CPU code, not each setting")
    args = parser.parse_args(argv)
    cpus = available_cpus()
    settings = [{}] if args.defaults else _cpu_codes() if args.cpu_codes else _settings(cpus)
    new_tokens = NEW_TOKENS if args.cpu_codes else 1
    limit = _matrix_rate(cpus)
    print(
        f"CPU code {cpu_features.load_cpu_code()}; torch multiplies float32 at {limit:.0f} GFLOP/s on {cpus} threads",
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix="prefill-bench-") as name:
        folder = Path(name)
        random_model.in_a_process(random_model.write, folder / "native", LAYERS)
        for type_ in args.types:
            file = folder / f"{type_}.gguf"
            random_model.quantize(folder / "native", file, type_)
            _report(_measure(file, args.tokens, settings, new_tokens), type_, settings, limit)
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


def _cpu_codes() -> list[dict[str, object]]:
    """The widest one, which is loaded by default, then the narrower ones."""
    *narrower, _ = [None, *(name for name, needed in cpu_features.VARIANTS.items() if needed <= cpu_flags())]
    return [{}, *({"cpu_code": name} for name in reversed(narrower))]


def _measure(file: Path, lengths: list[int], settings: list[dict], new_tokens: int) -> dict[tuple[int, int], list]:
    """llama.cpp's timings of both rounds for each number of a setting and length of a prompt."""
    found: dict[tuple[int, int], list[dict[str, float]]] = {}
    numbered = list(enumerate(settings))
    half = len(numbered) // 2
    random_model.in_a_process(read_prompts, file, {}, lengths)  # the first after writing the file is slower
    for order in (numbered, [*numbered[half::-1], *numbered[:half:-1]]):
        for number, setting in order:
            rounds = random_model.in_a_process(read_prompts, file, setting, lengths, new_tokens)
            for length, timings in zip(lengths, rounds, strict=True):
                found.setdefault((number, length), []).append(timings)
    return found


def _report(found: dict[tuple[int, int], list], type_: str, settings: list[dict], limit: float) -> None:
    attention, layer = (sum(columns * rows for columns, rows in part) for part in (MATRICES[:2], MATRICES))
    operations = 2 * ((LAYERS - 1) * layer + attention)
    for length in dict.fromkeys(length for _, length in found):
        (own, *rest), (writing, *others) = (
            [statistics.mean(each[name] for each in found[number, length]) for number in range(len(settings))]
            for name in ("prompt_per_second", "predicted_per_second")
        )
        share = own * operations / 1e9 / limit
        generated = found[0, length][0]["predicted_n"] > 1
        print(f"{type_}, {length} tokens: {own:.1f} tokens/s, matrices at {share:.2f} of torch's float32", end="")
        print(f"; generates {writing:.1f} tokens/s" if generated else "", flush=True)
        for setting, rate, other in zip(settings[1:], rest, others, strict=True):
            named = ", ".join(f"{key}={value or 'published'}" for key, value in setting.items())
            print(f"    {named}: {rate / own:.2f}" + (f", generating {other / writing:.2f}" if generated else ""))


def read_prompts(
    file: Path, setting: dict[str, object], lengths: Sequence[int], new_tokens: int = 1
) -> list[dict[str, float]]:
    """llama.cpp's timings of one prompt of each length and the tokens generated after it; a short one comes first."""
    import xllamacpp

    from entrypoints.checkpoint.gguf_reader import open_gguf
    from entrypoints.engines.llamacpp import server as llama_server
    from entrypoints.engines.options import EngineOptions

    threads = setting.pop("threads", None)
    if "cpu_code" in setting:
        name = setting.pop("cpu_code")
        cpu_features.VARIANTS = {name: cpu_features.VARIANTS[name]} if name else {}
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
