"""What each method learns: scores on held-out rows of the sample, before and after, by the commands a user would type.

A toy learns one half of the bundled ad copy and the small talk in full: the base. Then each method starts from that
base, learns the other half, and answers rows that neither half holds.

    python tests/bench/learn_bench.py        half an hour on one core
    python tests/bench/learn_bench.py --rates ptuning=5e-3 ptuning=2e-2
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from entrypoints.demo.model import write_toy  # noqa: E402
from entrypoints.training.arguments import LEARNING_RATES  # noqa: E402

SAMPLE = REPOSITORY / "entrypoints" / "demo"
HELD_OUT = 40
LIMITS = ("--max-source-length", 256, "--max-target-length", 128, "--per-device-train-batch-size", 16)
COURSE = ("--lr-scheduler-type", "cosine", "--warmup-steps", 10, "--save-steps", 100000, "--device", "cpu")
WORDS = {"ptuning": ("--pre-seq-len", 32), "lora": ("--lora-target", "all-linear"), "freeze": ("--freeze-layers", 2)}


def main(argv: list[str] | None = None) -> int:
    """Make the base, tune it by each method, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-epochs", type=int, default=20, help="passes of the base over its half (default: 20)")
    parser.add_argument("--epochs", type=int, default=20, help="passes of each method over the other half")
    every = [f"{method}={rate:g}" for method, rate in LEARNING_RATES.items() if method != "qlora"]
    parser.add_argument("--rates", nargs="+", default=every, metavar="METHOD=RATE", help="runs (default: the defaults)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = _base(folder, args.base_epochs)
        print(f"{'method':10} {'rate':>8} {'bleu_4':>7} {'rouge_1':>8} {'rouge_2':>8} {'rouge_l':>8}  loss", flush=True)
        _glm("evaluate", "--model", base, "--test-file", folder / "dev.jsonl", "--output-dir", folder / "base-scores",
             "--device", "cpu")  # fmt: skip
        _tell("base", "", folder / "base-scores", "")
        for number, run in enumerate(args.rates):
            method, rate = run.split("=")
            output = folder / f"run-{number}"
            _glm("train", "--model-name-or-path", base, "--train-file", folder / "second.jsonl", "--output-dir", output,
                 "--method", method, *WORDS.get(method, ()), "--learning-rate", rate, "--num-train-epochs", args.epochs,
                 "--test-file", folder / "dev.jsonl", "--predict-with-generate", *LIMITS, *COURSE)  # fmt: skip
            history = json.loads((output / "trainer_state.json").read_text())["log_history"]
            losses = [entry["loss"] for entry in history if "loss" in entry]
            _tell(method, rate, output, f"{losses[0]:.2f} to {losses[-1]:.2f}")
    return 0


def _base(folder: Path, epochs: int) -> Path:
    ads = (SAMPLE / "ad_copy.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    talk = (SAMPLE / "chat.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    texts = [row[column] for row in map(json.loads, ads + talk) for column in ("content", "summary")]
    held_out = ads[:: len(ads) // HELD_OUT][:HELD_OUT]
    rest = [row for row in ads if row not in held_out]
    for name, rows in (("dev", held_out), ("first", rest[::2] + talk), ("second", rest[1::2])):
        (folder / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
    write_toy(folder / "original", texts)
    _glm("convert", folder / "original", folder / "native")
    _glm("train", "--model-name-or-path", folder / "native", "--train-file", folder / "first.jsonl",
         "--output-dir", folder / "base", "--learning-rate", 2e-3, "--num-train-epochs", epochs, *LIMITS,
         *COURSE)  # fmt: skip
    return folder / "base"


def _glm(*words: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "entrypoints", *map(str, words)], capture_output=True, text=True, cwd=REPOSITORY
    )
    if done.returncode:
        raise SystemExit(done.stderr)


def _tell(method: str, rate: str, folder: Path, loss: str) -> None:
    scores = json.loads((folder / "predict_results.json").read_text())
    numbers = " ".join(f"{scores[name]:>{width}.1f}" for name, width in zip(
        ("bleu_4", "rouge_1", "rouge_2", "rouge_l"), (7, 8, 8, 8), strict=True))  # fmt: skip
    print(f"{method:10} {rate:>8} {numbers}  {loss}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
