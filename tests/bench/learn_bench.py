"""Scores of each fine-tuning method on held-out rows of the sample, before and after, using the real commands.

The base model knows the language and not the task: a demo model trained to continue the texts of one half of the
bundled ads, and the small talk. Each method starts from it, learns to write an ad from its attributes on the other
half, and answers rows of neither half. There are several splits with disjoint held-out rows; means are reported, and
the ROUGE-L of each split. The loss is that per held-out label, after the first epoch and after the last.

    python tests/bench/learn_bench.py        half an hour on one core
    python tests/bench/learn_bench.py --splits 0 --rates ptuning=1e-2 ptuning=2e-2
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from entrypoints.demo.model import write_demo_model  # noqa: E402
from entrypoints.training.arguments import LEARNING_RATES  # noqa: E402

SAMPLE = REPOSITORY / "entrypoints" / "demo"
HELD_OUT_ROWS = 40  # per split
SCORES = ("bleu_4", "rouge_1", "rouge_2", "rouge_l")
LIMIT_FLAGS = ("--max-source-length", 256, "--max-target-length", 64, "--per-device-train-batch-size", 16)
SCHEDULE_FLAGS = ("--lr-scheduler-type", "cosine", "--warmup-steps", 10, "--save-steps", 100000, "--device", "cpu")
EVAL_FLAGS = ("--per-device-eval-batch-size", HELD_OUT_ROWS)
METHOD_FLAGS = {
    "ptuning": ("--pre-seq-len", 32),
    "lora": ("--lora-target", "all-linear"),
    "freeze": ("--freeze-layers", 2),
}


def main(argv: list[str] | None = None) -> int:
    """For each split train the base model and fine-tune it with each method; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--splits", type=int, nargs="+", default=[0, 1, 2], help="splits to run, each 0 to 8 (default: 0 1 2)"
    )
    parser.add_argument(
        "--base-epochs", type=int, default=6, help="epochs of the base model over its half (default: 6)"
    )
    parser.add_argument("--epochs", type=int, default=40, help="epochs of each method over its half (default: 40)")
    every = [f"{method}={rate:g}" for method, rate in LEARNING_RATES.items() if method != "qlora"]
    parser.add_argument(
        "--rates",
        nargs="+",
        default=every,
        metavar="METHOD=RATE",
        help="methods and learning rates (default: all with their defaults)",
    )
    args = parser.parse_args(argv)
    found = {run: [] for run in ("base", *args.rates)}
    for split in args.splits:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            found["base"].append(_base(folder, split, args.base_epochs))
            print(f"split {split}, base: {found['base'][-1]}", file=sys.stderr, flush=True)
            for run in args.rates:
                found[run].append(_tuned(folder, *run.split("="), args.epochs))
                print(f"split {split}, {run}: {found[run][-1]}", file=sys.stderr, flush=True)
    _report(found)
    return 0


def _report(found: dict[str, list[dict]]) -> None:
    print(f"{'':16} {'bleu_4':>7} {'rouge_1':>8} {'rouge_2':>8} {'rouge_l':>8}  {'loss':14} rouge_l per split")
    for run, splits in found.items():
        means = (statistics.mean(scores[name] for scores in splits) for name in SCORES)
        numbers = " ".join(f"{mean:>{width}.1f}" for mean, width in zip(means, (7, 8, 8, 8), strict=True))
        losses = [statistics.mean(part) for part in zip(*(scores["losses"] for scores in splits), strict=True)]
        each = ", ".join(f"{scores['rouge_l']:.1f}" for scores in splits)
        print(f"{run:16} {numbers}  {' to '.join(f'{loss:.2f}' for loss in losses):14} {each}")


def _base(folder: Path, split: int, epochs: int) -> dict:
    """Write the files of the split, train the base model, score it."""
    ads = (SAMPLE / "ad_copy.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    talk = (SAMPLE / "chat.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    texts = [row[column] for row in map(json.loads, ads + talk) for column in ("content", "summary")]
    held_out = ads[split :: len(ads) // HELD_OUT_ROWS][:HELD_OUT_ROWS]
    rest = [row for row in ads if row not in held_out]
    sentences = [
        json.dumps(row, ensure_ascii=False) + "\n" for ad in rest[::2] for row in _continuation_rows(json.loads(ad))
    ]
    for name, rows in (("dev", held_out), ("first", sentences + talk), ("second", rest[1::2])):
        (folder / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
    write_demo_model(folder / "original", texts, seed=split)
    run_glm("convert", folder / "original", folder / "native")
    run_glm("train", "--model-name-or-path", folder / "native", "--train-file", folder / "first.jsonl",
         "--output-dir", folder / "base", "--learning-rate", 2e-3, "--num-train-epochs", epochs, *LIMIT_FLAGS,
         *SCHEDULE_FLAGS)  # fmt: skip
    run_glm("evaluate", "--model", folder / "base", "--test-file", folder / "dev.jsonl", "--output-dir",
         folder / "base-scores", "--max-target-length", 64, "--device", "cpu", *EVAL_FLAGS)  # fmt: skip
    return _scores(folder / "base-scores", [])


def _continuation_rows(ad: dict) -> Iterator[dict]:
    """An ad's text split after each of its clauses: the first part is the question, the rest the answer."""
    text = ad["summary"]
    for end, sign in enumerate(text[:-1], start=1):
        if sign in "，。":
            yield {"content": text[:end], "summary": text[end:]}


def _tuned(folder: Path, method: str, rate: str, epochs: int) -> dict:
    output = folder / f"{method}-{rate}"
    run_glm("train", "--model-name-or-path", folder / "base", "--train-file", folder / "second.jsonl",
         "--output-dir", output, "--method", method, *METHOD_FLAGS.get(method, ()), "--learning-rate", rate,
         "--num-train-epochs", epochs, "--test-file", folder / "dev.jsonl", "--predict-with-generate",
         "--validation-file", folder / "dev.jsonl", *LIMIT_FLAGS, *SCHEDULE_FLAGS, *EVAL_FLAGS)  # fmt: skip
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    return _scores(output, [losses[0], losses[-1]])


def _scores(folder: Path, losses: list[float]) -> dict:
    scores = json.loads((folder / "predict_results.json").read_text())
    return {name: scores[name] for name in SCORES} | {"losses": losses}


def run_glm(*arguments: object) -> None:
    """Run a command; its error ends the measurement."""
    done = subprocess.run(
        [sys.executable, "-m", "entrypoints", *map(str, arguments)], capture_output=True, text=True, cwd=REPOSITORY
    )
    if done.returncode:
        raise SystemExit(done.stderr)


if __name__ == "__main__":
    sys.exit(main())
