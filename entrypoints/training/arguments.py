"""What a training run is told; the names are those of the ChatGLM fine-tuning scripts."""

from dataclasses import dataclass, field
from pathlib import Path

from entrypoints.dataset.reading import Columns
from entrypoints.errors import UserError
from entrypoints.prompt import PromptFormat

# The rate of each method where none is given. P-Tuning's is half of the tutorial's 2e-2, at which the model forgets
# what it could do (ChatGLM3 issue 532); at a quarter tests/bench/learn_bench.py hardly learns.
LEARNING_RATES = {"full": 5e-5, "freeze": 5e-5, "lora": 2e-4, "qlora": 2e-4, "ptuning": 1e-2}
METHODS = tuple(LEARNING_RATES)
ADAPTER_METHODS = ("lora", "qlora", "ptuning")  # the result is an adapter, the base stays as it is
LORA_TARGETS = {
    "attention": ("q_proj", "k_proj", "v_proj"),
    "all-linear": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"),
}
LORA = ("lora_rank", "lora_alpha", "lora_target")
SHAPING = {  # fields that decide what the method trains
    "full": (),
    "freeze": ("freeze_layers",),
    "lora": LORA,
    "qlora": LORA,
    "ptuning": ("prefix_length", "prefix_projection"),
}
PRESETS = ("zero2", "zero3", "zero2-offload", "zero3-offload")  # of --deepspeed
PRE_SEQ_LEN = 128  # the tutorial's
COUNTS = (
    "max_source_length",
    "max_target_length",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "logging_steps",
    "save_steps",
    "preprocessing_num_workers",
    "lora_rank",
    "lora_alpha",
    "freeze_layers",
    "max_broken_steps",
)
OPTIONAL_COUNTS = ("max_train_samples", "max_steps", "save_total_limit", "num_gpus", "num_processes", "pre_seq_len")


@dataclass(frozen=True)
class TrainArguments:
    """One run; lengths in tokens, sizes in rows, intervals in optimizer steps.

    Raises UserError naming every field that cannot work, at once.
    """

    model_name_or_path: Path
    train_file: Path | tuple[Path, ...]
    output_dir: Path
    validation_file: Path | None = None
    columns: Columns = field(default_factory=Columns)
    encoding: str = "utf-8"
    prompt_format: PromptFormat | None = None  # None: the one the checkpoint was taught
    overwrite_output_dir: bool = False
    resume: str | None = None  # auto, or the folder of a checkpoint
    method: str = "full"
    lora_rank: int = 8
    lora_alpha: int = 32
    lora_dropout: float = 0.1
    lora_target: str = "attention"
    pre_seq_len: int | None = None  # None: PRE_SEQ_LEN, where the method has a prefix
    prefix_projection: bool = False
    freeze_layers: int = 4
    quantization_bit: int | None = None  # of the frozen base
    max_source_length: int = 512
    max_target_length: int = 512
    packing: bool = False
    max_train_samples: int | None = None
    max_skipped: int | None = None  # None: any number of rows that cannot be used
    per_device_train_batch_size: int = 4
    per_device_eval_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    num_train_epochs: float = 3.0
    max_steps: int | None = None  # None: as many as the epochs need
    learning_rate: float | None = None  # None: the method's own, see `rate`
    lr_scheduler_type: str = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    neftune_noise_alpha: float | None = None
    max_broken_steps: int = 3
    logging_steps: int = 10
    save_steps: int = 500
    save_total_limit: int | None = None
    fp16: bool = False
    bf16: bool | None = None  # None: where the hardware has it
    seed: int = 42
    preprocessing_num_workers: int = 1
    device: str = "auto"
    num_gpus: int | None = None  # None: as many processes as the environment says, else one
    num_processes: int | None = None
    deepspeed: str | None = None  # the name of a preset, or a file

    def __post_init__(self) -> None:
        low = [name for name in COUNTS if getattr(self, name) < 1]
        low += [name for name in OPTIONAL_COUNTS if getattr(self, name) is not None and getattr(self, name) < 1]
        problems = [f"{as_flag(name)} {getattr(self, name)} is below 1" for name in low]
        problems += [
            f"{as_flag(name)} {value} is not above 0"
            for name in ("num_train_epochs", "learning_rate")
            if (value := getattr(self, name)) is not None and value <= 0
        ]
        for name in ("lora_dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                problems.append(f"{as_flag(name)} {getattr(self, name)} is not from 0 to below 1")
        if self.fp16 and self.bf16:
            problems.append("--fp16 and --bf16 exclude each other")
        if self.num_gpus and self.num_processes:
            problems.append("--num-gpus and --num-processes exclude each other")
        if self.method == "ptuning" and self.gradient_checkpointing:
            problems.append("--gradient-checkpointing computes layers anew without their cache, where a prefix lies")
        if self.quantization_bit and not self.makes_adapter:
            bits = self.quantization_bit
            problems.append(f"--quantization-bit {bits}: int{bits} weights cannot be tuned in full")
        if self.method == "ptuning" and self.packing:
            problems.append("--packing puts rows behind each other, and a prefix stands in front of the first alone")
        base = self.model_name_or_path.resolve()
        if self.output_dir.resolve() in (base, *base.parents):  # to overwrite it would delete the base
            problems.append(f"--output-dir {self.output_dir} is or holds the base model's own folder")
        if problems:
            raise UserError("; ".join(problems), "see glm train --help")

    @property
    def train_files(self) -> tuple[Path, ...]:
        """One or more."""
        return (self.train_file,) if isinstance(self.train_file, Path) else tuple(self.train_file)

    @property
    def rate(self) -> float:
        """The learning rate at its highest."""
        return LEARNING_RATES[self.method] if self.learning_rate is None else self.learning_rate

    @property
    def prefix_length(self) -> int:
        """Places of the prefix; 0 where the method has none."""
        return (self.pre_seq_len or PRE_SEQ_LEN) if self.method == "ptuning" else 0

    @property
    def base_bits(self) -> int | None:
        """Bits of the frozen base's weights, if it is quantised while it is loaded."""
        return self.quantization_bit or (4 if self.method == "qlora" else None)

    @property
    def shape_of_learnt(self) -> dict:
        """The flags, with their values, that decide what the method trains: what a resumed run cannot change."""
        named = {"prefix_length": "pre_seq_len"}
        return {named.get(name, name): getattr(self, name) for name in SHAPING[self.method]}

    @property
    def makes_adapter(self) -> bool:
        """Is the result an adapter rather than a whole model?"""
        return self.method in ADAPTER_METHODS


def as_flag(name: str) -> str:
    """A field as the command line has it."""
    return f"--{name.replace('_', '-')}"
