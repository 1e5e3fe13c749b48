"""Soak test of a server, a third of whose clients disconnect early: lost slots, memory growth, differing answers.

The demo model runs under `glm serve` with four slots. Each of a set of questions is first sent alone, at temperature 0;
these are the reference answers. They end before the first token whose probability is within CLOSE of the second: which
of the two wins may depend on the other requests in the batch. Then 16 clients send the questions at random, streaming
and not, and every answer that is not aborted must equal its reference. Clients disconnect before the first byte, after
some events, or in the queue.
Exits with 1 if a slot is lost, an answer differs, a request fails, or memory grows by more than LIMIT.

    python tests/bench/serve_soak.py                                   10 minutes, transformers
    python tests/bench/serve_soak.py --engine llamacpp --seconds 90
"""

import argparse
import collections
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from serving_process import GLM, Server, serving

CHAT = "/v1/chat/completions"
SLOTS = 4
CLOSE = 0.03  # difference of log probabilities
SHORTEST = 16  # tokens of a reference answer at least
LIMIT = 64 << 20  # bytes of resident memory between the first and the last fifth
WORDS = ("裙子", "上衣材质牛仔布", "显瘦", "夏天", "介绍一下", "hello", "类型#裤", "图案#复古", "x", "颜色")


class Crowd:
    """The clients and their results."""

    def __init__(self, server: Server, questions: list[dict], seed: int) -> None:
        self.server = server
        self.questions = questions
        self.references = [self._text(body) for body in questions]
        self.chance = random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()
        self.problems: list[str] = []
        self._guard = threading.Lock()

    def run(self, clients: int, seconds: float) -> list[int]:
        """Send requests until the time is over; returns the resident bytes of the server, once a second."""
        end = time.monotonic() + seconds
        threads = [threading.Thread(target=self._client, args=(self.chance.random(), end)) for _ in range(clients)]
        for thread in threads:
            thread.start()
        process, memory = psutil.Process(self.server.process.pid), []
        while time.monotonic() < end and len(self.problems) < 20:
            memory.append(process.memory_info().rss)
            time.sleep(1)
        for thread in threads:
            thread.join()
        return memory

    def _client(self, seed: float, end: float) -> None:
        chance = random.Random(seed)
        while time.monotonic() < end and len(self.problems) < 20:
            number, stream = chance.randrange(len(self.questions)), chance.random() < 0.6
            body = {**self.questions[number], "stream": stream}
            try:
                if chance.random() < 1 / 3:
                    self._leave(body, chance)
                    self._count("disconnected")
                elif (text := self._text(body)) == self.references[number]:
                    self._count("equal")
                else:
                    self._problem(f"differs: {body}: {text!r} instead of {self.references[number]!r}")
            except Exception as error:  # noqa: BLE001 - whatever it is, it is reported
                self._problem(f"failed: {body}: {error!r}")

    def _leave(self, body: dict, chance: random.Random) -> None:
        if not body["stream"] or chance.random() < 0.3:
            self.server.send_and_disconnect(CHAT, body, chance.random() * 0.5)
            return
        with self.server.stream(CHAT, body) as response:
            for _ in range(chance.randrange(1, 30)):
                if not response.readline():
                    return

    def _text(self, body: dict) -> str:
        if not body.get("stream"):
            return self.server.post(CHAT, body)["choices"][0]["message"]["content"]
        with self.server.stream(CHAT, body) as response:
            *events, last, end = response.read().split(b"\n\n")
        assert (last, end) == (b"data: [DONE]", b""), events[-1]
        parsed = [json.loads(event.removeprefix(b"data: ")) for event in events]
        return "".join(choice["delta"].get("content") or "" for event in parsed for choice in event["choices"])

    def _count(self, name: str) -> None:
        with self._guard:
            self.counts[name] += 1

    def _problem(self, text: str) -> None:
        self._count(text.partition(":")[0])
        self.problems.append(text)


def main(argv: list[str] | None = None) -> int:
    """Start the server, collect the references, run the clients, print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("transformers", "llamacpp"), default="transformers")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="serve-soak-") as folder:
        model = _model(Path(folder), args.engine)
        flags = ["--engine", args.engine, "--slots", SLOTS]
        flags += ["--dtype", "float32"] if args.engine == "transformers" else []  # half precision depends on the batch
        with serving([*GLM, "serve", "--model", model, *map(str, flags)], Path(folder) / "log") as server:
            return _soak(server.wait_ready(), args)


def _soak(server: Server, args: argparse.Namespace) -> int:
    chance = random.Random(args.seed)
    questions = _questions(server, chance, 24)
    crowd = Crowd(server, questions, args.seed)
    memory = crowd.run(args.clients, args.seconds)
    time.sleep(2)
    lost = server.metric("glm_running") + server.metric("glm_queue_length")
    reached = _most_running(server, questions[0])
    fifth = max(1, len(memory) // 5)
    growth = statistics.median(memory[-fifth:]) - statistics.median(memory[fifth : 2 * fifth] or memory)
    print(f"{args.engine}, {args.seconds:.0f} s, {args.clients} clients, {SLOTS} slots: {dict(crowd.counts)}")
    print(f"slots not released {lost:.0f}; parallel requests afterwards {reached} of {SLOTS}")
    print(f"memory {memory[-1] / 1e6:.0f} MB, growth from the second to the last fifth {growth / 1e6:+.1f} MB")
    errors = server.log.count("Traceback")
    print(f"tracebacks in the log {errors}")
    for problem in crowd.problems[:5]:
        print(problem)
    return 1 if lost or reached < SLOTS or growth > LIMIT or errors or crowd.problems else 0


def _questions(server: Server, chance: random.Random, count: int) -> list[dict]:
    """Request bodies whose answers do not depend on nearly equal probabilities."""
    found: list[dict] = []
    while len(found) < count:
        text = " ".join(chance.choices(WORDS, k=chance.randrange(1, 12)))
        body = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 80}
        tokens = server.post(CHAT, {**body, "logprobs": True, "top_logprobs": 2})["choices"][0]["logprobs"]["content"]
        leads = [token["top_logprobs"][0]["logprob"] - token["top_logprobs"][1]["logprob"] for token in tokens]
        safe = next((place for place, lead in enumerate(leads) if lead < CLOSE), len(leads))
        if safe >= SHORTEST:
            found.append({**body, "max_tokens": chance.randrange(4, safe + 1)})
    return found


def _most_running(server: Server, body: dict) -> int:
    """Number of parallel answers when more are requested than there are slots."""
    asked = [
        threading.Thread(target=server.post, args=(CHAT, {**body, "max_tokens": 200}), daemon=True)
        for _ in range(2 * SLOTS)
    ]
    for thread in asked:
        thread.start()
    most = 0.0
    while any(thread.is_alive() for thread in asked):
        most = max(most, server.metric("glm_running"))
    return int(most)


def _model(folder: Path, engine: str) -> Path:
    from entrypoints.chat_format.prompt import PromptFormat
    from entrypoints.checkpoint.conversion import convert_to_native
    from entrypoints.demo import model
    from entrypoints.quantization.gguf_writer import write_gguf

    words = Path(model.__file__).with_name("ad_copy.jsonl").read_text(encoding="utf-8").splitlines()
    model.write_demo_model(folder / "original", words)
    convert_to_native(folder / "original", folder / "native", PromptFormat())
    if engine == "transformers":
        return folder / "native"
    write_gguf(folder / "native", folder / "model.gguf", "f16")
    return folder / "model.gguf"


if __name__ == "__main__":
    sys.exit(main())
