"""Names of files in --output-dir that other packages read as well, without any heavy import."""

import re
from pathlib import Path

from entrypoints.errors import UserError

TRAINING_LOG_FILE = "training_log.jsonl"  # one JSON object per logged event, appended during the run
RUN_STATUS_FILE = "run_status.json"  # written every few seconds by a run in progress; see run_status.py
RUN_LOG_FILE = "train.log"  # the log lines of the run
EVALUATION_SAMPLES_FILE = "evaluation_samples.jsonl"  # answers to validation rows at each evaluation
LATEST_FILE = "latest"  # DeepSpeed's: the name of the folder with its states
STATE_FILE = "trainer_state.json"  # the Trainer's: its log_history and the counters of steps
RESULTS_FILE = "train_results.json"  # the Trainer's metrics of a finished run
FINISHED_FILE = "finished.json"  # written last of all: step, position and settings of a finished run
REPORT_FILE = "report.md"
PROBE_FILE = "probe.json"  # losses of general rows and of rows of the task, before and after training
PAGE_FILE = "report.html"
# defined in evaluation/predict.py, which imports the engines; a test compares the names
PREDICTIONS_FILE = "generated_predictions.jsonl"
SCORES_FILE = "predict_results.json"
EVALUATION_FILE = "eval_results.json"  # the Trainer's: validation loss
# What a fresh run removes from a folder with an earlier one, beside its checkpoints and its result.
RUN_FILES = (
    TRAINING_LOG_FILE, FINISHED_FILE, STATE_FILE, RESULTS_FILE, "all_results.json", PREDICTIONS_FILE, SCORES_FILE,
    EVALUATION_FILE, REPORT_FILE, PAGE_FILE, PROBE_FILE, EVALUATION_SAMPLES_FILE,
)  # fmt: skip
CONTINUED_FILES = (TRAINING_LOG_FILE, PROBE_FILE, EVALUATION_SAMPLES_FILE)  # a resumed run keeps them
REJECTED_REMEDY = "use another checkpoint, and remove this one"
_TAG = re.compile(r"global_step[0-9]{1,18}")


def read_deepspeed_tag(checkpoint: Path) -> str | None:
    """The subfolder with DeepSpeed's states; None without DeepSpeed.

    Raises UserError for another name: it could be a path out of the checkpoint, whose files have not been checked.
    """
    latest = checkpoint / LATEST_FILE
    if not latest.is_file():
        return None
    tag = latest.read_text(encoding="utf-8", errors="replace").strip()
    if not _TAG.fullmatch(tag):
        raise UserError(f"{latest} contains {tag[:100]!r}, not the name of a folder global_stepN", REJECTED_REMEDY)
    return tag
