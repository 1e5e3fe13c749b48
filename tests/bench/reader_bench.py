"""Rows per second of the reader, from files to examples: what `glm train` does before it encodes token ids.

    pairs          prompt and response columns, about as long as AdvertiseGen's, one JSON object per line
    conversations  messages with a system turn, a tool call and its result

CPU time of one process, the best of several rounds. To compare with another version of the package, run the same
script with PYTHONPATH set to its folder, alternately.

    python tests/bench/reader_bench.py
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":  # the package may be that of another folder
    sys.path.append(str(Path(__file__).resolve().parents[2]))

from entrypoints.dataset.columns import Columns
from entrypoints.dataset.reader import Example, stream_examples, stream_rows

PAIR = {
    "content": "类型#裙*版型#显瘦*材质#棉*风格#简约*裙长#半身裙" * 2,
    "summary": "简约的半身裙，线条干净，上身显瘦。" * 8,
}
CALL = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city": "上海"}'}}
CONVERSATION = {
    "messages": [
        {"role": "system", "content": "简短回答。"},
        {"role": "user", "content": "上海天气怎么样？"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c", "content": "多云，21度"},
        {"role": "assistant", "content": "上海今天多云，21度。"},
    ]
}
SHAPES = {"pairs": (PAIR, Columns()), "conversations": (CONVERSATION, Columns(conversations="messages"))}


def main(argv: list[str] | None = None) -> int:
    """Write rows, read them, print rows per second."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="reader-bench-") as folder:
        for name, (row, columns) in SHAPES.items():
            file = Path(folder) / f"{name}.jsonl"
            line = json.dumps(row, ensure_ascii=False) + "\n"
            file.write_text(line * args.rows, encoding="utf-8")
            best = min(
                _seconds(lambda file=file, columns=columns: _read(file, columns, args.rows)) for _ in range(args.rounds)
            )
            print(f"{name}: {args.rows / best:,.0f} rows/s", flush=True)
    return 0


def _read(file: Path, columns: Columns, rows: int) -> None:
    found = sum(isinstance(row, Example) for row in stream_examples(stream_rows(file, "utf-8"), columns))
    if found != rows:
        raise RuntimeError(f"{found} of {rows} rows were read")


def _seconds(run: Callable[[], None]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


if __name__ == "__main__":
    raise SystemExit(main())
