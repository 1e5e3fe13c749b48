"""Options of a training run, named as in the public ChatGLM fine-tuning scripts."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from entrypoints.dataset.columns import Columns
from entrypoints.dataset.shapes import REJECTED
from entrypoints.errors import UserError

# The default rate of each method. P-Tuning's is half of the public script's 2e-2, at which the model forgets what it
# could do; at a quarter of it tests/bench/learn_bench.py hardly learns.
LEARNING_RATES = {"full": 5e-5, "freeze": 5e-5, "lora": 2e-4, "qlora": 2e-4, "ptuning": 1e-2}
# As TRL's: preferences change a model by much smaller steps than new answers.
DPO_LEARNING_RATES = {"full": 1e-6, "freeze": 1e-6, "lora": 1e-5, "qlora": 1e-5}
METHODS = tuple(LEARNING_RATES)
OBJECTIVES = ("sft", "dpo")
ADAPTER_METHODS = ("lora", "qlora", "ptuning")  # the result is an adapter; the base model stays unchanged
LORA_TARGETS = {
    "attention": ("q_proj", "k_proj", "v_proj"),
    "all-linear": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"),
}
LORA_FIELDS = ("lora_rank", "lora_alpha", "lora_target")
TRAINABLE_FIELDS = {  # fields that determine the trainable parameters
    "full": (),
    "freeze": ("freeze_layers",),
    "lora": LORA_FIELDS,
    "qlora": LORA_FIELDS,
    "ptuning": ("prefix_length", "prefix_projection"),
}
PRESETS = ("zero2", "zero3", "zero2-offload", "zero3-offload")  # of --deepspeed
DEFAULT_PREFIX_LENGTH = 128  # of the public P-Tuning script
POSITIVE_FIELDS = (
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
OPTIONAL_POSITIVE_FIELDS = (
    "max_train_samples",
    "max_steps",
    "save_total_limit",
    "eval_steps",
    "eval_samples",
    "num_processes",
    "pre_seq_len",
)


@dataclass(frozen=True)
class TrainArguments:
    """One run; lengths in tokens, batch sizes in rows, intervals in optimizer steps.

    Raises UserError that names every invalid field at once.
    """

    model_name_or_path: Path
    train_file: Path | tuple[Path, ...]
    output_dir: Path
    validation_file: Path | None = None
    test_file: Path | None = None
    columns: Columns = field(default_factory=Columns)
    encoding: str = "utf-8"
    template: str | None = None  # None: the prompt format that the checkpoint was trained with
    source_prefix: str | None = None  # None: that of the checkpoint
    overwrite_output_dir: bool = False
    predict_with_generate: bool = False
    resume: str | None = None  # auto, or the folder of a checkpoint
    method: str = "full"
    objective: str = "sft"  # sft: learn the answers; dpo: prefer chosen ones to rejected ones
    dpo_beta: float = 0.1
    lora_rank: int = 8
    lora_alpha: int = 32
    lora_dropout: float = 0.1
    lora_target: str = "attention"
    pre_seq_len: int | None = None  # None: DEFAULT_PREFIX_LENGTH with ptuning
    prefix_projection: bool = False
    freeze_layers: int = 4
    quantization_bit: int | None = None  # of the frozen base model
    adapter: Path | None = None  # to continue; its shape is in the fields above
    max_source_length: int = 512
    max_target_length: int = 512
    packing: bool = False
    max_train_samples: int | None = None
    mix: str | None = None  # FILE:SHARE: general rows, against forgetting, as a share of all rows
    max_skipped: int | None = 0  # unusable rows; None: any number
    per_device_train_batch_size: int = 4
    per_device_eval_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    num_train_epochs: float = 3.0
    max_steps: int | None = None  # None: as many as the epochs need
    learning_rate: float | None = None  # None: the method's default, see `peak_learning_rate`
    lr_scheduler_type: str = "linear"
    warmup_steps: int = 0
    warmup_ratio: float = 0.0  # of all steps, in place of warmup_steps
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    neftune_noise_alpha: float | None = None
    max_broken_steps: int = 3
    logging_steps: int = 10
    save_steps: int = 500
    save_total_limit: int | None = None
    eval_steps: int | None = None  # None: evaluate the validation rows after each epoch
    eval_samples: int | None = None  # validation rows to answer at each evaluation
    load_best: bool = False
    fp16: bool = False
    bf16: bool | None = None  # None: where the hardware supports it
    seed: int = 42
    preprocessing_num_workers: int = 1
    device: str = "auto"
    num_gpus: int | None = None  # None: as many processes as the environment says, else one; 0: on CPUs
    num_processes: int | None = None
    deepspeed: str | None = None  # name of a preset, or a file

    def __post_init__(self) -> None:
        problems = [*self._range_problems(), *self._combination_problems()]
        if problems:
            raise UserError("; ".join(problems), "see glm train --help")

    def _range_problems(self) -> list[str]:
        low = [name for name in POSITIVE_FIELDS if getattr(self, name) < 1]
        low += [name for name in OPTIONAL_POSITIVE_FIELDS if (value := getattr(self, name)) is not None and value < 1]
        problems = [f"{flag_name(name)} {getattr(self, name)} is below 1" for name in low]
        if (self.num_gpus or 0) < 0:
            problems.append(f"--num-gpus {self.num_gpus} is below 0")
        problems += [
            f"{flag_name(name)} {value} is not above 0"
            for name in ("num_train_epochs", "learning_rate", "dpo_beta")
            if (value := getattr(self, name)) is not None and value <= 0
        ]
        if self.mix is not None and not 0 < self.mix_share < 1:
            problems.append(f"--mix {self.mix}: the share is not a number between 0 and 1, as in FILE:0.1")
        problems += [
            f"{flag_name(name)} {getattr(self, name)} is not in the range from 0 to below 1"
            for name in ("lora_dropout", "label_smoothing", "warmup_ratio")
            if not 0 <= getattr(self, name) < 1
        ]
        return problems

    def _combination_problems(self) -> list[str]:
        prefix_tuning, base = self.method == "ptuning", self.model_name_or_path.resolve()
        bits, output = self.quantization_bit, self.output_dir
        checks = [
            (self.fp16 and self.bf16, "--fp16 and --bf16 exclude each other"),
            (self.num_gpus and self.num_processes, "--num-gpus and --num-processes exclude each other"),
            (
                prefix_tuning and self.gradient_checkpointing,
                "--gradient-checkpointing does not work with ptuning: it recomputes layers without the cache that "
                "holds the prefix",
            ),
            (
                prefix_tuning and self.packing,
                "--packing does not work with ptuning: only the first of several packed rows would get the prefix",
            ),
            (
                bits and not self.saves_adapter,
                f"--quantization-bit {bits} does not work with {self.method}: int{bits} weights cannot be trained",
            ),
            (  # overwriting it would delete the base model
                self.train_files and output.resolve() in (base, *base.parents),
                f"--output-dir {output} is or contains the folder of the base model",
            ),
            (self.warmup_steps and self.warmup_ratio, "--warmup-steps and --warmup-ratio exclude each other"),
            (self.eval_steps and not self.validation_file, "--eval-steps needs --validation-file FILE"),
            (self.eval_samples and not self.validation_file, "--eval-samples needs --validation-file FILE"),
            (self.load_best and not self.validation_file, "--load-best needs --validation-file FILE"),
            (self.predict_with_generate and not self.test_file, "answering test rows needs --test-file FILE"),
        ]
        return [problem for applies, problem in [*checks, *self._objective_checks()] if applies]

    def _objective_checks(self) -> list[tuple[object, str]]:
        if self.objective == "sft":
            return [
                (self.dpo_beta != 0.1, "--dpo-beta belongs to --objective dpo"),
                (self.columns.rejected, "--rejected-column belongs to --objective dpo"),
            ]
        unsupported = {
            "--method ptuning": self.method == "ptuning",
            "--packing": self.packing,
            "--mix": self.mix,
            "--label-smoothing": self.label_smoothing,
            "--neftune-noise-alpha": self.neftune_noise_alpha,
            "--format moss": self.columns.format == "moss",
        }
        deepspeed = not self.saves_adapter and self.deepspeed
        return [
            *((used, f"{flag} does not work with --objective dpo") for flag, used in unsupported.items()),
            (
                deepspeed,
                f"--deepspeed does not work with --objective dpo and --method {self.method}: use --method lora",
            ),
        ]

    @property
    def train_files(self) -> tuple[Path, ...]:
        """One or more files."""
        return (self.train_file,) if isinstance(self.train_file, Path) else tuple(self.train_file)

    def columns_of(self, file: Path) -> Columns:
        """How a file of this run is read; only training rows must have the column of --history-column."""
        columns = self.columns
        if self.objective == "dpo" and (file in self.train_files or file != self.test_file):
            columns = replace(columns, rejected=columns.rejected or REJECTED)
        return columns if file in self.train_files else replace(columns, may_lack_history=True)

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate after the warmup."""
        rates = DPO_LEARNING_RATES if self.objective == "dpo" else LEARNING_RATES
        return rates[self.method] if self.learning_rate is None else self.learning_rate

    @property
    def mix_file(self) -> Path | None:
        """The file with general rows."""
        return None if self.mix is None else Path(self.mix.rpartition(":")[0])

    @property
    def mix_share(self) -> float:
        """Their share of all rows that are trained on; 0 if it is not a number."""
        try:
            return 0.0 if self.mix is None else float(self.mix.rpartition(":")[2])
        except ValueError:
            return 0.0

    @property
    def sequences_per_batch(self) -> int:
        """Sequences that a process computes at once; a preference row has two."""
        return self.per_device_train_batch_size * (2 if self.objective == "dpo" else 1)

    @property
    def prefix_length(self) -> int:
        """Tokens of the P-Tuning v2 prefix; 0 for other methods."""
        return (self.pre_seq_len or DEFAULT_PREFIX_LENGTH) if self.method == "ptuning" else 0

    @property
    def quantized_bits(self) -> int | None:
        """Bits of the frozen base model's weights, if it is quantized while it is loaded."""
        return self.quantization_bit or (4 if self.method == "qlora" else None)

    @property
    def trainable_config(self) -> dict[str, Any]:
        """Fields, with their values, that determine the trainable parameters; a resumed run cannot change them."""
        stored_names = {"prefix_length": "pre_seq_len"}
        names = ("objective", *TRAINABLE_FIELDS[self.method])
        return {stored_names.get(name, name): getattr(self, name) for name in names}

    @property
    def saves_adapter(self) -> bool:
        """Whether the result is an adapter, not a complete model."""
        return self.method in ADAPTER_METHODS


def flag_name(field_name: str) -> str:
    """The command line flag of a field."""
    return f"--{field_name.replace('_', '-')}"
