"""What a training run is told; the names are those of the ChatGLM fine-tuning scripts."""

from dataclasses import dataclass, field
from pathlib import Path

from entrypoints.dataset.reading import Columns
from entrypoints.errors import UserError
from entrypoints.prompt import PromptFormat


@dataclass(frozen=True)
class TrainArguments:
    """One run; lengths in tokens, sizes in rows, intervals in optimizer steps.

    Raises UserError naming every field that cannot work, at once.
    """

    model_name_or_path: Path
    train_file: Path
    output_dir: Path
    validation_file: Path | None = None
    columns: Columns = field(default_factory=Columns)
    encoding: str = "utf-8"
    prompt_format: PromptFormat | None = None  # None: the one the checkpoint was taught
    overwrite_output_dir: bool = False
    max_source_length: int = 512
    max_target_length: int = 512
    max_train_samples: int | None = None
    per_device_train_batch_size: int = 4
    per_device_eval_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    num_train_epochs: float = 3.0
    max_steps: int | None = None  # None: as many as the epochs need
    learning_rate: float = 5e-5
    lr_scheduler_type: str = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    logging_steps: int = 10
    save_steps: int = 500
    save_total_limit: int | None = None
    fp16: bool = False
    bf16: bool = False
    seed: int = 42
    preprocessing_num_workers: int = 1
    device: str = "auto"

    def __post_init__(self) -> None:
        counts = (
            "max_source_length",
            "max_target_length",
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "logging_steps",
            "save_steps",
            "preprocessing_num_workers",
        )
        optional = ("max_train_samples", "max_steps", "save_total_limit")
        low = [name for name in counts if getattr(self, name) < 1]
        low += [name for name in optional if getattr(self, name) is not None and getattr(self, name) < 1]
        problems = [f"--{name.replace('_', '-')} {getattr(self, name)} is below 1" for name in low]
        if self.num_train_epochs <= 0:
            problems.append(f"--num-train-epochs {self.num_train_epochs} is not above 0")
        if self.learning_rate <= 0:
            problems.append(f"--learning-rate {self.learning_rate} is not above 0")
        if self.fp16 and self.bf16:
            problems.append("--fp16 and --bf16 exclude each other")
        base = self.model_name_or_path.resolve()
        if self.output_dir.resolve() in (base, *base.parents):  # to overwrite it would delete the base
            problems.append(f"--output-dir {self.output_dir} is or holds the base model's own folder")
        if problems:
            raise UserError("; ".join(problems), "see glm train --help")
