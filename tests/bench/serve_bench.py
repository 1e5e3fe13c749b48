"""Overhead of the API over its engine: tokens per second, server CPU per token, time to the first token.

A random checkpoint with the architecture of the 6B (by default 24 layers of width 1024, 0.25 billion parameters) is
written to a temporary folder. The raw engine runs in its own process and is called there, without HTTP; `glm serve`
runs in another and is queried over loopback, all on the same cores. With --one-core the model processes share one core
and this script uses the others, which gives steadier results on a busy machine. Rounds alternate; medians are printed.

    llamacpp       raw is the server object of xllamacpp, called with token ids; same file, threads, slots
    transformers   raw is the engine object of this product, which adds a queue to transformers; also 8 answers at
                   once compared with 8 one after another, both through the API

    python tests/bench/serve_bench.py                          both engines, minutes
    python tests/bench/serve_bench.py --engine llamacpp --rounds 5
    python tests/bench/serve_bench.py --model chatglm3-6b-q4_0.gguf    an existing file or folder instead
"""

import argparse
import dataclasses
import http.client
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from serving_process import GLM, Server, pin_to_one_cpu, serving

from entrypoints.engines.loading import select_engine

STREAMS = (1, 4)
SLOTS = 8
QUESTION = "类型#裙*版型#显瘦*风格#复古*图案#复古"


@dataclasses.dataclass
class Run:
    """One round: tokens of all streams, wall seconds, CPU seconds of the serving process, first token's seconds."""

    tokens: int
    seconds: float
    cpu: float
    first: float

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def main(argv: list[str] | None = None) -> int:
    """Create the models, measure, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("llamacpp", "transformers", "both"), default="both")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each kind, alternating")
    parser.add_argument("--tokens", type=int, default=96, help="tokens of each answer")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024, help="a multiple of 256")
    parser.add_argument("--model", type=Path, help="measure this GGUF file or converted folder on its engine")
    parser.add_argument("--one-core", action="store_true", help="run all model processes on one core")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="serve-bench-") as folder:
        if args.model:
            models = {select_engine(args.model): args.model}
        else:
            models = _models(Path(folder), args.layers, args.width)
            megabytes = models["llamacpp"].stat().st_size / 1e6
            print(f"{args.layers} layers of width {args.width}, {megabytes:.0f} MB as q8_0")
        cores = 1 if args.one_core else os.cpu_count()
        print(f"{args.tokens} tokens per answer; {cores} cores per model; medians of {args.rounds}")
        for engine, model in models.items():
            if args.engine in (engine, "both"):
                _measure(engine, model, Path(folder), args)
    return 0


def _models(folder: Path, layers: int, width: int) -> dict[str, Path]:
    """One random model for each engine."""
    from entrypoints.chat_format.prompt import PromptFormat
    from entrypoints.checkpoint.conversion import convert_to_native
    from entrypoints.demo import model
    from entrypoints.quantization.gguf_writer import write_gguf

    model.MODEL_CONFIG = dataclasses.replace(
        model.MODEL_CONFIG,
        num_layers=layers,
        hidden_size=width,
        num_heads=width // 128,
        num_kv_heads=2,
        head_dim=128,
        intermediate_size=width * 5 // 2,
    )
    words = Path(model.__file__).with_name("ad_copy.jsonl").read_text(encoding="utf-8").splitlines()
    model.write_demo_model(folder / "original", words)
    convert_to_native(folder / "original", folder / "native", PromptFormat())
    write_gguf(folder / "native", folder / "model.gguf", "q8_0")
    return {"llamacpp": folder / "model.gguf", "transformers": folder / "native"}


def _measure(engine: str, model: Path, folder: Path, args: argparse.Namespace) -> None:
    ours, theirs = multiprocessing.Pipe()
    spawn = multiprocessing.get_context("spawn")
    raw = spawn.Process(target=_raw, args=(engine, model, theirs, args.one_core), daemon=True)
    raw.start()
    theirs.close()  # so that the end of the process is noticed
    flags = ["--model", model, "--engine", engine, "--slots", SLOTS, "--served-model-name", "bench"]
    try:
        with serving([*GLM, "serve", *map(str, flags)], folder / f"{engine}.log", None, args.one_core) as server:
            server.wait_ready(300)
            _hear(ours, raw)
            found: dict[tuple[str, int], list[Run]] = {}
            for number in range(args.rounds + 1):
                for streams in STREAMS:
                    for kind, ask in (("raw", _ask_raw(ours, raw)), ("api", _ask_api(server))):
                        run = ask(streams, args.tokens)
                        if number:  # the first round warms up
                            found.setdefault((kind, streams), []).append(run)
            _print(engine, found)
            if engine == "transformers":
                _print_gain(_ask_api(server), args.rounds, args.tokens)
    finally:
        raw.kill()


def _print(engine: str, found: dict[tuple[str, int], list[Run]]) -> None:
    print(f"\n{engine:12} {'streams':>8} {'tokens/s':>10} {'ratio':>7} {'CPU ms/token':>13} {'first token ms':>15}")
    for streams in STREAMS:
        raw_rate = statistics.median(run.rate for run in found["raw", streams])
        for kind in ("raw", "api"):
            runs = found[kind, streams]
            rate = statistics.median(run.rate for run in runs)
            cpu = statistics.median(run.cpu / run.tokens * 1000 for run in runs)
            first = statistics.median(run.first * 1000 for run in runs)
            print(f"{kind:12} {streams:8} {rate:10.1f} {rate / raw_rate:7.3f} {cpu:13.2f} {first:15.1f}", flush=True)


def _print_gain(ask: Callable[[int, int], Run], rounds: int, tokens: int) -> None:
    at_once = statistics.median(ask(8, tokens).seconds for _ in range(rounds))
    in_a_row = statistics.median(sum(ask(1, tokens).seconds for _ in range(8)) for _ in range(rounds))
    print(
        f"8 answers in parallel {at_once:.1f} s, one after another {in_a_row:.1f} s: "
        f"{in_a_row / at_once:.2f} times as fast",
        flush=True,
    )


def _together(streams: int, one: Callable[[], tuple[int, float]], cpu: Callable[[], float]) -> Run:
    """Run `one` in parallel; it returns its token count and the time of its first token."""
    results: list[tuple[int, float]] = []
    threads = [threading.Thread(target=lambda: results.append(one())) for _ in range(streams)]
    start, used = time.monotonic(), cpu()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - start
    assert len(results) == streams, "an answer failed"
    return Run(sum(n for n, _ in results), seconds, cpu() - used, statistics.median(at for _, at in results) - start)


def _ask_api(server: Server) -> Callable[[int, int], Run]:
    process = psutil.Process(server.process.pid)

    def cpu() -> float:
        times = process.cpu_times()
        return times.user + times.system

    def ask(streams: int, tokens: int) -> Run:
        # a random model may stop at any token, so tokens are counted, not text
        body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": tokens, "temperature": 0}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        return _together(streams, lambda: _stream(server.port, json.dumps(body).encode()), cpu)

    return ask


def _stream(port: int, body: bytes) -> tuple[int, float]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
    response, first, last = connection.getresponse(), None, b""
    while line := response.readline():
        if line.startswith(b"data: {"):
            last = line
            if first is None and b'"content": ""' not in line:
                first = time.monotonic()
    connection.close()
    tokens = json.loads(last.removeprefix(b"data: "))["usage"]["completion_tokens"]
    return tokens, first or time.monotonic()  # a random model may generate tokens without text


def _ask_raw(pipe: Connection, process: BaseProcess) -> Callable[[int, int], Run]:
    def ask(streams: int, tokens: int) -> Run:
        pipe.send((streams, tokens))
        return _hear(pipe, process)

    return ask


def _hear(pipe: Connection, process: BaseProcess) -> object:
    """The next message of the raw engine's process. Raises RuntimeError: the process ended."""
    try:
        return pipe.recv()
    except (EOFError, ConnectionError) as error:
        process.join()
        raise RuntimeError(f"the process of the raw engine exited with {process.exitcode}") from error


def _raw(engine: str, model: Path, pipe: Connection, one_core: bool) -> None:
    """In a separate process: load the raw engine, report it, and run the requested answers."""
    if one_core:
        pin_to_one_cpu()
    start = _raw_llamacpp(model) if engine == "llamacpp" else _raw_transformers(model)
    pipe.send("loaded")
    while True:
        streams, tokens = pipe.recv()
        pipe.send(_together(streams, lambda most=tokens: start(most), time.process_time))


def _raw_llamacpp(model: Path) -> Callable[[int], tuple[int, float]]:
    from entrypoints.checkpoint.gguf_reader import open_gguf
    from entrypoints.engines.llamacpp.server import start_server
    from entrypoints.engines.options import EngineOptions

    checkpoint = open_gguf(model)
    server = start_server(checkpoint, EngineOptions(slots=SLOTS))  # as `glm serve` starts it
    prompt = checkpoint.prompt_format.encode([{"role": "user", "content": QUESTION}], checkpoint.tokenizer)

    def one(most: int) -> tuple[int, float]:
        seen: list[float] = []

        def take(chunk: dict) -> bool:
            if chunk["choices"] and chunk["choices"][0]["logprobs"]:
                seen.append(time.monotonic())
            return False

        request = {"prompt": prompt, "stream": True, "n_predict": most, "temperature": 0.0, "n_probs": 1}
        server.handle_completions(request, take)
        return most, seen[0]

    return one


def _raw_transformers(model: Path) -> Callable[[int], tuple[int, float]]:
    from entrypoints.chat_format.sampling import Sampling
    from entrypoints.engines.options import EngineOptions
    from entrypoints.engines.transformers.engine import TransformersEngine

    engine = TransformersEngine.load(model, EngineOptions(device="cpu", dtype="auto", slots=SLOTS))
    prompt = engine.prompt_format.encode([{"role": "user", "content": QUESTION}], engine.tokenizer)

    def one(most: int) -> tuple[int, float]:
        seen = [time.monotonic() for _ in engine.generate(prompt, Sampling(max_new_tokens=most, temperature=0))]
        return len(seen), seen[0]

    return one


if __name__ == "__main__":
    sys.exit(main())
