"""Training steps a second: our batches against the tutorial's, on the same rows, model and optimizer.

Ours: rows of like length together, padded to the longest of a batch. The tutorial's (ChatGLM2's ptuning/main.py): rows
in random order, each padded to max_source_length + max_target_length + 1 = 1025 ids. Both run the same number of rows
in the same batch size through the same forward, backward and AdamW step, in float32 and alternating rounds of one
process; every round starts from a copy of the same weights. Told are medians of the rounds and their ratio, and the
largest difference of any label's loss between the two ways of padding the same rows: padding must cost time alone.

    python tests/bench/batches_bench.py                 minutes; ADGEN's development set, else the bundled sample
    python tests/bench/batches_bench.py --model DIR     a converted model in place of a random one of 4 layers
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from transformers import AutoModelForCausalLM, GlmConfig, GlmForCausalLM  # noqa: E402

from entrypoints.checkpoint.layout import Shape  # noqa: E402
from entrypoints.checkpoint.native import open_native  # noqa: E402
from entrypoints.checkpoint.tokenizer import Tokenizer, convert_vocabulary  # noqa: E402
from entrypoints.dataset.reading import Columns, examples, read_rows  # noqa: E402
from entrypoints.demo.model import write_toy  # noqa: E402
from entrypoints.prompt import IGNORED, PromptFormat  # noqa: E402
from entrypoints.training.batches import Collator, GroupedByLength, RowEncoder  # noqa: E402

GOLDEN = Path(os.environ.get("GOLDEN_DIR", REPOSITORY.parent / "shared" / "golden"))
SAMPLE = REPOSITORY / "entrypoints" / "demo" / "ad_copy.jsonl"
SOURCE, TARGET = 512, 512  # tokens, the defaults of glm train
PADDED = SOURCE + TARGET + 1
SEED = 42


def main(argv: list[str] | None = None) -> int:
    """Encode, compare the losses, time the rounds, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32, help="rows of a round (default: 32)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each way (default: 3)")
    parser.add_argument("--batch-size", type=int, default=4, help="rows of a step (default: 4, as the tutorial's)")
    parser.add_argument("--model", type=Path, help="converted checkpoint (default: 4 random layers of hidden size 256)")
    args = parser.parse_args(argv)
    file = GOLDEN / "adgen_dev.json"
    file = file if file.is_file() else SAMPLE
    tokenizer, model = _given(args.model) if args.model else _random()
    encoder = RowEncoder(tokenizer, PromptFormat(), SOURCE, TARGET)
    used, _ = examples(read_rows(file)[: args.rows], Columns())
    rows = [encoder({"prompt": row.prompt, "response": row.response, "history": row.history}) for row in used]
    lengths = [row["length"] for row in rows]
    print(
        f"{len(rows)} rows of {file.name}, {statistics.mean(lengths):.1f} ids on average, {max(lengths)} at most; "
        f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.1f} M weights, batches of {args.batch_size}, "
        f"{torch.get_num_threads()} threads"
    )
    short, long = (
        Collator(tokenizer.pad_id)(rows[: args.batch_size]),
        _padded(rows[: args.batch_size], tokenizer.pad_id),
    )
    first, second = (_losses(model, batch) for batch in (short, long))
    print(
        f"largest difference of a label's loss, {len(first)} labels in {short['input_ids'].shape[1]} and {PADDED} ids: "
        f"{(first - second).abs().max().item():.1e} (mean loss {first.mean().item():.4f})"
    )
    ways = {
        "tutorial": list(_tutorial_batches(rows, args.batch_size, tokenizer.pad_id)),
        "ours": list(_our_batches(rows, args.batch_size, tokenizer.pad_id)),
    }
    seconds = _timed(model, ways, args.rounds)
    speed = {way: [len(rows) / took for took in times] for way, times in seconds.items()}
    _report(ways, speed)
    return 0


def _tutorial_batches(rows: list[dict], size: int, pad: int) -> Iterator[dict]:
    """As main.py prepares them: ids and labels of 1025, no attention mask."""
    order = random.Random(SEED).sample(rows, len(rows))
    for start in range(0, len(order), size):
        yield _padded(order[start : start + size], pad)


def _padded(batch: list[dict], pad: int) -> dict:
    fill = [PADDED - row["length"] for row in batch]
    return {
        "input_ids": torch.tensor([row["input_ids"] + [pad] * more for row, more in zip(batch, fill, strict=True)]),
        "labels": torch.tensor([row["labels"] + [IGNORED] * more for row, more in zip(batch, fill, strict=True)]),
    }


def _our_batches(rows: list[dict], size: int, pad: int) -> Iterator[dict]:
    """As glm train makes them: the sampler's order, the collator's padding."""
    order, collate = list(GroupedByLength([row["length"] for row in rows], size, SEED)), Collator(pad)
    for start in range(0, len(order), size):
        yield collate([rows[index] for index in order[start : start + size]])


def _timed(model: torch.nn.Module, ways: dict[str, list[dict]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each round; the ways take turns, so that a busy machine is busy for both."""
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for batches in ways.values():  # the first step of a shape is slower
        _train(model, batches[:1])
    seconds = {way: [] for way in ways}
    for _ in range(rounds):
        for way, batches in ways.items():
            model.load_state_dict(start)
            seconds[way].append(_train(model, batches))
    return seconds


def _train(model: torch.nn.Module, batches: list[dict]) -> float:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)  # the default of the Trainer
    begin = time.perf_counter()
    for batch in batches:
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - begin


def _losses(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    """The loss of each label that counts, (labels,)."""
    model.eval()
    labels = batch["labels"][:, 1:]
    with torch.inference_mode():
        logits = model(batch["input_ids"], attention_mask=batch.get("attention_mask")).logits[:, :-1]
    taught = labels != IGNORED
    return torch.nn.functional.cross_entropy(logits[taught], labels[taught], reduction="none")


def _report(ways: dict[str, list[dict]], speed: dict[str, list[float]]) -> None:
    print(f"{'':10} {'ids a round':>12} {'rows/s':>8}  rounds")
    for way, batches in ways.items():
        ids = sum(batch["input_ids"].numel() for batch in batches)
        each = ", ".join(f"{value:.2f}" for value in speed[way])
        print(f"{way:10} {ids:12,} {statistics.median(speed[way]):8.2f}  {each}")
    ratio = statistics.median(speed["ours"]) / statistics.median(speed["tutorial"])
    print(f"ours is {ratio:.1f} times as fast")


def _given(folder: Path) -> tuple[Tokenizer, torch.nn.Module]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return open_native(folder).tokenizer, model


def _random() -> tuple[Tokenizer, torch.nn.Module]:
    """Four layers of hidden size 256 on ChatGLM3's vocabulary, or on the toy's where that is absent."""
    vocabulary = GOLDEN / "original-tiny" / "tokenizer.model"
    with tempfile.TemporaryDirectory() as folder:
        if not vocabulary.is_file():
            write_toy(Path(folder), SAMPLE.read_text(encoding="utf-8").splitlines())
            vocabulary = Path(folder, "tokenizer.model")
        tokenizer = Tokenizer(convert_vocabulary(vocabulary))
    ids = -(-tokenizer.size // 256) * 256  # padded as the original's 65024
    shape = Shape(4, 256, 8, 2, 32, 512, ids, 2048, 1e-5, 1)
    torch.manual_seed(SEED)
    config = GlmConfig(**shape.native_config("float32", tokenizer.stop_ids, tokenizer.pad_id))
    return tokenizer, GlmForCausalLM(config)


if __name__ == "__main__":
    sys.exit(main())
