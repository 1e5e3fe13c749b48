"""The cost of the 6B model without a GPU: quantization, memory, start, and tokens per second of each engine.

A random checkpoint of ChatGLM3-6B's full size (28 layers, 12.5 GB of float16) is written to a temporary folder,
quantized with `glm quantize` in a process of its own, and served. Everything is deleted at the end.

    quantize     seconds from start to exit, validation included; peak of anonymous memory (RssAnon): the system can
                 evict the pages of mapped files, so they do not count
    start        seconds from process start to ready, with the file in the page cache and without; a plain read of it
    decode       tokens per second of llama.cpp called directly and of `glm serve` over HTTP, alternately; the weight
                 bytes that they read, as a share of this machine's measured memory bandwidth
    drafts       tokens per second without and with `--speculative ngram` if every draft is accepted, and the number of
                 accepted tokens per draft from which it is faster
    first token  after 800 tokens: computed, after a restart, and with --warm (first_token_bench.py)
    transformers 8 and 4 layers of the same size in float32 and bfloat16, from which 28 are extrapolated; each also
                 with a static cache, and with that and torch.compile (which needs g++)

The published build of llama.cpp uses AVX2 and nothing newer; `make llamacpp` adds the code for newer CPUs.

    python tests/bench/lowcost_bench.py                 needs 17 GB of disk, 12 GB of memory, 20 minutes
    python tests/bench/lowcost_bench.py --layers 4 --type q4_k_m
"""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import first_token_bench
import random_model
import serve_bench
from serving_process import GLM, serving

from entrypoints.engines.llamacpp.cpu_features import load_cpu_code, unused_cpu_features


def main(argv: list[str] | None = None) -> int:
    """Write, quantize, serve, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28, help="28: as the 6B")
    parser.add_argument("--type", default="q4_0", help="as in glm quantize")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32, help="per answer")
    parser.add_argument("--skip-transformers", action="store_true", help="measure llama.cpp alone")
    parser.add_argument("--work-dir", type=Path, help="folder on a disk with free space (default: the temporary one)")
    args = parser.parse_args(argv)
    print(f"llama.cpp: CPU code {load_cpu_code()}, not used: {', '.join(unused_cpu_features()) or 'nothing'}")
    with tempfile.TemporaryDirectory(dir=args.work_dir, prefix="lowcost-bench-") as name:
        folder = Path(name)
        start = time.monotonic()
        random_model.in_a_process(random_model.write, folder / "native", args.layers)
        print(f"{args.layers} layers written in {time.monotonic() - start:.0f} s", flush=True)
        file = folder / "model.gguf"
        random_model.quantize(folder / "native", file, args.type)
        _start(file, folder)
        _cold_start(file, folder)
        _decode(file, folder, args)
        _drafts(file)
        first_token_bench.measure(file, folder)
    for dtype in () if args.skip_transformers else ("float32", "bfloat16"):
        for way in ("default", "static cache", "torch.compile"):
            _transformers(dtype, way, args.layers)
    return 0


def _bandwidth() -> float:
    """Bytes per second that all CPUs together read from more memory than their caches hold."""
    import numpy as np

    parts = np.array_split(np.ones(1 << 29, np.float32), os.cpu_count())

    def once() -> float:
        threads = [threading.Thread(target=part.max) for part in parts]
        start = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return (4 << 29) / (time.monotonic() - start)

    return max(once() for _ in range(8))


def _cold_start(file: Path, folder: Path) -> None:
    _forget(file)
    start = time.monotonic()
    with file.open("rb", buffering=0) as stream:
        while stream.read(16 << 20):
            pass
    print(f"plain read of the file, cold: {time.monotonic() - start:.1f} s; cold", end=" ")
    _forget(file)
    _start(file, folder)


def _forget(file: Path) -> None:
    """Have the system drop the file from its page cache."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _start(file: Path, folder: Path) -> None:
    command = [*GLM, "serve", "--model", str(file), "--slots", "1", "--served-model-name", "bench"]
    start = time.monotonic()
    with serving(command, folder / "start.log", one_cpu=False) as server:
        server.wait_ready(600)
        ready = time.monotonic() - start
        body = (
            b'{"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "temperature": 0, "stream": true,'
        )
        serve_bench._stream(server.port, body + b'"stream_options": {"include_usage": true}}')
        memory = [random_model.memory_of(server.process.pid, field) / 1e9 for field in ("VmRSS", "RssAnon")]
        sizes = f"resident {memory[0]:.2f} GB, anonymous {memory[1]:.2f} GB"
        print(f"serve     ready in {ready:.1f} s; {sizes}", flush=True)


def _decode(file: Path, folder: Path, args: argparse.Namespace) -> None:
    from gguf import GGUFReader

    # a token reads only one row of the embedding
    read = sum(int(tensor.n_bytes) for tensor in GGUFReader(file).tensors if tensor.name != "token_embd.weight")
    before = _bandwidth()
    serve_bench.SLOTS = max(serve_bench.STREAMS)
    serve_bench._measure(
        "llamacpp", file, folder, SimpleNamespace(rounds=args.rounds, tokens=args.tokens, one_core=False)
    )
    bandwidth = max(before, _bandwidth())
    size = file.stat().st_size
    print(f"{size / 1e9:.2f} GB, {read / 1e9:.2f} read for a token; memory read at {bandwidth / 1e9:.1f} GB/s")
    print(f"the bandwidth allows one stream {bandwidth / read:.2f} tokens/s", flush=True)


def _drafts(file: Path) -> None:
    from entrypoints.engines.llamacpp.server import DRAFT_TOKENS

    plain, drafting = (statistics.median(random_model.in_a_process(_drafted, file, accept)) for accept in (False, True))
    steps = (DRAFT_TOKENS + 1) * plain / drafting
    print(
        f"drafts    {plain:.2f} tokens/s without, {drafting:.2f} if all are accepted; a step with {DRAFT_TOKENS} "
        f"drafted tokens takes {steps:.1f} times as long: faster from {int(steps)} accepted tokens on",
        flush=True,
    )


def _drafted(file: Path, accept: bool) -> list[float]:
    """Tokens per second of three answers; with `accept` llama.cpp accepts every draft.

    The prompt consists of runs of DRAFT_TOKENS tokens, each preceded by the same token; a logit bias makes the model
    generate that token, so that a draft can follow.
    """
    import xllamacpp

    import entrypoints.engines.llamacpp.server as llama_server
    from entrypoints.checkpoint.gguf_reader import open_gguf
    from entrypoints.engines.options import EngineOptions

    if accept:
        create = xllamacpp.CommonParams

        def accepting() -> object:
            params = create()
            params.speculative.synth_rates = [1.0] * llama_server.DRAFT_TOKENS
            return params

        xllamacpp.CommonParams = accepting
    options = EngineOptions(context_length=1024, speculative=accept)
    server = llama_server.start_server(options.limited(open_gguf(file)), options)
    length = llama_server.DRAFT_TOKENS
    runs = [[777, *range(1000 + n * length, 1000 + (n + 1) * length)] for n in range(10)]
    prompt = [*itertools.chain(*runs), *runs[0][-3:]]
    request = {"prompt": prompt, "stream": True, "n_predict": 64, "temperature": 0.0, "logit_bias": [[777, 100]]}
    rates = []
    for _ in range(4):  # the first reads the prompt
        last = {}
        server.handle_completions(request, last.update)
        rates.append(last["timings"]["predicted_per_second"])
        assert last["timings"].get("draft_n_accepted", 0) == last["timings"].get("draft_n", 0)
        assert bool(last["timings"].get("draft_n")) == accept
    return rates[1:]


def _transformers(dtype: str, way: str, layers: int) -> None:
    """Extrapolate to `layers` from the seconds per token at 4 and at 8 layers."""
    seconds, gigabytes = {}, 0.0
    for count in (4, 8):
        seconds[count], gigabytes = _token_of_transformers(dtype, way, count)
    rate = 1 / (seconds[8] + (layers - 8) * (seconds[8] - seconds[4]) / 4)
    eight = f"8 layers {1 / seconds[8]:.2f} tokens/s in {gigabytes:.1f} GB"
    print(f"transformers {dtype}, {way}: {eight}; {layers} layers {rate:.2f} tokens/s", flush=True)


def _token_of_transformers(dtype: str, way: str, layers: int) -> tuple[float, float]:
    """Seconds per token after 16 others, and the gigabytes of the weights."""
    import torch
    from transformers import DynamicCache, GlmConfig, GlmForCausalLM, StaticCache

    from entrypoints.checkpoint.layout import ModelConfig

    model_config = ModelConfig(layers, 4096, 32, 2, 128, 13696, 65024, 8192, 1e-5, 1)
    config = GlmConfig(**model_config.native_config(dtype, (2,), 0))
    with torch.device("meta"):
        model = GlmForCausalLM(config).to(getattr(torch, dtype))
    model = model.to_empty(device="cpu").eval()
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    ids, times = torch.arange(100, 116)[None], []
    step = torch.compile(model) if way == "torch.compile" else model
    with torch.inference_mode():
        cache = DynamicCache(config=config) if way == "default" else StaticCache(config, max_cache_len=64)
        model(ids, cache=cache, use_cache=True)
        for _ in range(12):
            start = time.monotonic()
            step(ids[:, -1:], cache=cache, use_cache=True)
            times.append(time.monotonic() - start)
    return statistics.median(times[4:]), sum(p.nbytes for p in model.parameters()) / 1e9


if __name__ == "__main__":
    sys.exit(main())
