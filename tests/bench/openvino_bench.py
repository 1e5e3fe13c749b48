"""Reading a prompt and generating on a CPU: llama.cpp as the product runs it, and OpenVINO with 4 bits.

Eight layers of ChatGLM3-6B's width with random weights. Both run in turn, each time in a new process, with one thread
for each CPU. OpenVINO gets the weights that `optimum-intel` quantizes (INT4_SYM; embedding and output layer in 8 bits)
and is called directly, without the library's generate(). It has packages of its own, in an environment of its own:

    python -m venv .venv-openvino
    .venv-openvino/bin/pip install 'optimum-intel[openvino]==2.2.0' 'transformers<5'
    python tests/bench/openvino_bench.py --python .venv-openvino/bin/python      needs 12 GB of memory, 10 minutes
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

LAYERS = 8
NEW_TOKENS = 32
LENGTHS = (128, 512, 2048)


def main(argv: list[str] | None = None) -> int:
    """Write the model for both, measure in turn, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="interpreter that has optimum-intel")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--types", nargs="+", default=["q4_0", "q4_k_m"], help="as in glm quantize")
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[32, 128], help="of OpenVINO's 4 bits")
    parser.add_argument("--export", nargs=3, metavar=("NATIVE", "FOLDER", "GROUP"), help=argparse.SUPPRESS)
    parser.add_argument("--measure", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.export:
        _export(Path(args.export[0]), Path(args.export[1]), int(args.export[2]))
    elif args.measure:
        print(json.dumps(_measure_openvino(args.measure)))
    else:
        _compare(args)
    return 0


def _compare(args: argparse.Namespace) -> None:
    import random_model

    measures: dict[str, Callable[[], list[float]]] = {}
    with tempfile.TemporaryDirectory(prefix="openvino-bench-") as name:
        native = Path(name) / "native"
        random_model.in_a_process(random_model.write, native, args.layers)
        for type_ in args.types:
            file = Path(name) / f"{type_}.gguf"
            random_model.quantize(native, file, type_)
            measures[f"llama.cpp {type_}"] = partial(_measure_llama, file)
        for size in args.group_sizes:
            folder = Path(name) / f"openvino-{size}"
            subprocess.run([args.python, __file__, "--export", native, folder, str(size)], check=True)
            measures[f"OpenVINO int4, groups of {size}"] = partial(_measure_with, args.python, folder)
        rates: dict[str, list[list[float]]] = {way: [] for way in measures}
        for _ in range(args.rounds):
            for way, measure in measures.items():
                rates[way].append(measure())
        _report(rates)


def _report(rates: dict[str, list[list[float]]]) -> None:
    medians = {name: [statistics.median(column) for column in zip(*runs, strict=True)] for name, runs in rates.items()}
    first = next(iter(medians.values()))
    titles = [f"{length} tokens read" for length in LENGTHS] + ["generated"]
    print(f"tokens/s, and as a share of {next(iter(medians))}: {', '.join(titles)}")
    for name, columns in medians.items():
        shares = (f"{rate:.1f} ({rate / base:.2f})" for rate, base in zip(columns, first, strict=True))
        print(f"{name}: {', '.join(shares)}", flush=True)


def _measure_llama(file: Path) -> list[float]:
    """Tokens per second of reading each prompt and of generating after the last one."""
    import prefill_bench
    import random_model

    timings = random_model.in_a_process(prefill_bench.read_prompts, file, {}, LENGTHS, NEW_TOKENS)
    return [*(each["prompt_per_second"] for each in timings), timings[-1]["predicted_per_second"]]


def _measure_with(python: str, folder: Path) -> list[float]:
    """`_measure_openvino` in a process of this interpreter."""
    command = [python, __file__, "--measure", str(folder)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(printed.splitlines()[-1])


def _export(native: Path, folder: Path, group_size: int) -> None:
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    bits = OVWeightQuantizationConfig(bits=4, sym=True, group_size=group_size, ratio=1.0)
    model = OVModelForCausalLM.from_pretrained(native, export=True, compile=False, quantization_config=bits)
    model.save_pretrained(folder)


def _measure_openvino(folder: Path) -> list[float]:
    """As `_measure_llama`."""
    import numpy as np
    import openvino

    compiled = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", {"PERFORMANCE_HINT": "LATENCY"})
    request = compiled.create_infer_request()

    def step(ids: list[int], past: int) -> int:
        """The most probable token after `ids`, which follow `past` tokens in the model's state."""
        total = past + len(ids)
        inputs = {
            "input_ids": np.array([ids]),
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(past, total)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        return int(request.infer(inputs)["logits"][0, -1].argmax())

    rates, generated = [], 0.0
    for length in (32, *LENGTHS):
        request.reset_state()
        start = time.monotonic()
        token = step(list(range(1000, 1000 + length)), 0)
        middle = time.monotonic()
        for place in range(length, length + NEW_TOKENS - 1):
            token = step([token], place)
        generated = (NEW_TOKENS - 1) / (time.monotonic() - middle)
        rates.append(length / (middle - start))
    return [*rates[1:], generated]


if __name__ == "__main__":
    sys.exit(main())
