"""How long a question after 800 tokens waits for its first token: computed, after a restart, and with --warm.

A random model of ChatGLM3-6B's width is served, and answers questions after the same system prompt with one token each.

    computed     a server that has seen nothing
    again        the next question to the same server
    restarted    another process with the folder of --prefix-cache that the first one wrote when it stopped
    warm         a new process with the system prompt in the file of --warm

    python tests/bench/first_token_bench.py                8 layers; needs 5 GB of memory, 5 minutes
    python tests/bench/first_token_bench.py --layers 28
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import random_model
from serving_process import GLM, Server, serving

from entrypoints.checkpoint.gguf_reader import open_gguf
from entrypoints.demo import model as demo_model

TOKENS = 800


def main(argv: list[str] | None = None) -> int:
    """Write, quantize, serve, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--type", default="q4_0", help="as in glm quantize")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="first-token-bench-") as name:
        folder = Path(name)
        random_model.in_a_process(random_model.write, folder / "native", args.layers)
        random_model.quantize(folder / "native", folder / "model.gguf", args.type)
        measure(folder / "model.gguf", folder)
    return 0


def measure(file: Path, folder: Path) -> None:
    """Serve `file` three times and print the seconds; states and logs are written to `folder`."""
    system = random_model.in_a_process(_system_prompt, file)
    assert isinstance(system, str)
    (folder / "warm.jsonl").write_text(json.dumps({"messages": [_message("system", system)]}), encoding="utf-8")
    command = [*GLM, "serve", "--model", file, "--slots", "1"]
    keeping = [*command, "--prefix-cache", folder / "states"]
    with serving(keeping, folder / "first.log", one_cpu=False) as server:
        computed, again = (_seconds(server.wait_ready(600), system, question) for question in ("1", "2"))
        server.signal()
        assert server.wait() == 0, server.log
    with serving(keeping, folder / "second.log", one_cpu=False) as server:
        restarted = _seconds(server.wait_ready(600), system, "3")
    size = sum(each.stat().st_size for each in (folder / "states").rglob("*") if each.is_file())
    start = time.monotonic()
    with serving([*command, "--warm", folder / "warm.jsonl"], folder / "warm.log", one_cpu=False) as server:
        server.wait_ready(600)
        ready = time.monotonic() - start
        warm = _seconds(server, system, "4")
    print(f"first token after {TOKENS} tokens: computed {computed:.2f} s, again {again:.2f} s", end=", ")
    print(f"restarted {restarted:.2f} s ({size / 1e6:.0f} MB of states)", end=", ")
    print(f"warm {warm:.2f} s (ready {ready:.1f} s after the start)", flush=True)


def _system_prompt(file: Path) -> str:
    """The beginning of the demo data that encodes to TOKENS tokens."""
    checkpoint = open_gguf(file)
    text = Path(demo_model.__file__).with_name("ad_copy.jsonl").read_text(encoding="utf-8")

    def tokens(end: int) -> int:
        messages = [_message("system", text[:end]), _message("user", "")]
        return len(checkpoint.prompt_format.encode(messages, checkpoint.tokenizer))

    return text[: next(end for end in range(0, len(text), 8) if tokens(end) >= TOKENS)]


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _seconds(server: Server, system: str, question: str) -> float:
    body = {"messages": [_message("system", system), _message("user", question)], "max_tokens": 1, "temperature": 0}
    start = time.monotonic()
    answer = server.request("POST", "/v1/chat/completions", body, seconds=600)
    assert answer[0] == 200, answer
    return time.monotonic() - start


if __name__ == "__main__":
    sys.exit(main())
