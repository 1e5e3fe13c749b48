"""Memory of a run on each GPU and on the host, before anything is loaded: by method, ZeRO stage, batch and length.

Model states (weights, gradients, optimizer states) are exact: bytes per parameter times parameters, partitioned as by
ZeRO. Activations count what autograd saves for each operation; fused attention saves no attention matrix.
"""

from dataclasses import dataclass, replace

import torch

from entrypoints.checkpoint.layout import ModelConfig
from entrypoints.dataset.reader import may_have_several_answers
from entrypoints.hardware.placement import weight_bytes
from entrypoints.training.arguments import TrainArguments
from entrypoints.training.launch import ProcessLayout
from entrypoints.training.methods import trainable_model
from entrypoints.training.methods.deepspeed_config import Config, is_offloaded, read_config, zero_stage
from entrypoints.training.methods.loss import LOSS_POSITIONS
from entrypoints.training.run_context import RunContext

CUDA_CONTEXT_BYTES = 1.0e9  # of each GPU: CUDA, its libraries and the fragmentation of the allocator
PROCESS_BYTES = 3.0e9  # host memory of a process that has imported torch
ADAM_BYTES = 8  # for each trainable parameter: two moments in float32
FP32_COPY_BYTES = 4  # for each trainable parameter: the float32 copy of DeepSpeed
NF4_BYTES = 0.516  # for each parameter in nf4 with double quantization of its scales
LOADING_TENSORS = 4  # that transformers reads at a time: GLOBAL_WORKERS of core_model_loading.py
# Defaults of DeepSpeed, in parameters: runtime/zero/config.py
BUCKET_PARAMETERS = 5e8  # reduce_bucket_size
LIVE_PARAMETERS = 1e9  # stage3_max_live_parameters
SUB_GROUP_PARAMETERS = 1e9  # sub_group_size


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes: of one process, on its GPU if it has one; `offloaded` in the host memory of one node."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float  # while gradients are computed: of gradients that are exchanged, of weights that ZeRO-3 gathers
    step: float  # while the optimizer steps, when no activations exist
    loaded: float  # the model as it is loaded
    loading: float  # in host memory of a node while GPUs load it
    offloaded: float  # of all processes of the node
    nproc_per_node: int

    @property
    def states(self) -> float:
        """Bytes of a process that do not depend on the batch."""
        return self.weights + self.gradients + self.optimizer

    @property
    def gpu(self) -> float:
        """Bytes of one GPU."""
        return self.states + max(self.activations + self.buffers, self.step) + CUDA_CONTEXT_BYTES

    def host(self, has_gpu: bool) -> float:
        """Bytes of one node; without a GPU all states are in host memory: first the loaded model, then the run."""
        if has_gpu:
            return self.nproc_per_node * PROCESS_BYTES + self.loading + self.offloaded
        transient = max(self.activations + self.buffers, self.step)
        running = self.offloaded + self.nproc_per_node * (self.states + transient)
        return self.nproc_per_node * PROCESS_BYTES + max(self.nproc_per_node * self.loaded, running)

    def fits(self, gpu_bytes: float | None, host_bytes: float) -> bool:
        """Whether it fits into the free bytes of each GPU (None: no GPU) and of the host."""
        return (gpu_bytes is None or self.gpu <= gpu_bytes) and self.host(gpu_bytes is not None) <= host_bytes


@dataclass(frozen=True)
class MemoryPlan:
    """A run to estimate: its options, the model, the longest row and the processes."""

    arguments: TrainArguments
    model_config: ModelConfig
    compute_dtype: torch.dtype
    length: int  # tokens of the longest row
    deepspeed: Config | None = None
    world_size: int = 1
    nproc_per_node: int = 1

    @classmethod
    def of_run(cls, run: RunContext, layout: ProcessLayout) -> "MemoryPlan":
        """The plan of a run, with rows as long as the limits and the context length allow."""
        plan = cls(run.arguments, run.base.model_config, run.precision.compute_dtype, 0, run.deepspeed)
        return plan.with_longest_rows(layout)

    def with_longest_rows(self, layout: ProcessLayout) -> "MemoryPlan":
        """The same run in these processes, with rows as long as the limits and the context length allow."""
        arguments = self.arguments
        longest = arguments.max_source_length + arguments.max_target_length + 1 + arguments.prefix_length
        length = min(longest, self.model_config.context_length)
        return replace(self, length=length, world_size=layout.world_size, nproc_per_node=layout.nproc_per_node)

    def with_arguments(self, arguments: TrainArguments) -> "MemoryPlan":
        """The same run with other options."""
        config = read_config(arguments.deepspeed) if arguments.deepspeed else None
        compute_dtype = torch.float16 if arguments.fp16 else self.compute_dtype
        return replace(self, arguments=arguments, deepspeed=config, compute_dtype=compute_dtype)

    def estimate(self) -> MemoryEstimate:
        """The memory that the run needs."""
        config, model_config, width = self.deepspeed, self.model_config, self.compute_dtype.itemsize
        total = weight_bytes(model_config, 1)
        trainable = trainable_model.count_trainable(self.arguments, model_config, total)
        loaded = self._loaded_bytes(total, trainable)
        if config:
            states: list[float] = [width * total, width * trainable, (ADAM_BYTES + FP32_COPY_BYTES) * trainable]
        else:
            autocast_copies = width * trainable if width < 4 else 0
            states = [loaded + autocast_copies, 4 * trainable, ADAM_BYTES * trainable]
        shards = [self.world_size if zero_stage(config) >= stage else 1 for stage in (3, 2, 1)]
        weights, gradients, optimizer = (size / count for size, count in zip(states, shards, strict=True))
        offloaded = 0.0
        if is_offloaded(config, "optimizer"):
            offloaded += self.nproc_per_node * (optimizer + 4 * trainable / shards[1])
            gradients = optimizer = 0.0
        if is_offloaded(config, "param"):
            offloaded += self.nproc_per_node * weights
            weights = 0.0
        buffers, step = self._transient_bytes(total, trainable)
        return MemoryEstimate(
            weights, gradients, optimizer, self._activation_bytes(), buffers, step, loaded, self._loading_bytes(total),
            offloaded, self.nproc_per_node,
        )  # fmt: skip

    def _loading_bytes(self, total: int) -> float:
        """Each GPU receives one tensor after the other; with ZeRO-3 the first process holds all weights."""
        width = self.compute_dtype.itemsize
        if zero_stage(self.deepspeed) == 3:
            return width * total
        largest = self.model_config.vocab_size * self.model_config.hidden_size
        return self.nproc_per_node * LOADING_TENSORS * width * largest

    def _transient_bytes(self, total: int, trainable: int) -> tuple[float, float]:
        """Bytes that exist while gradients are computed, and while the optimizer steps.

        DistributedDataParallel copies gradients into buckets, unless gradient_as_bucket_view is set (its docstring).
        ZeRO has one or two buckets of 16-bit gradients (stage_1_and_2.py, setup_buckets); its step flattens those of a
        process and copies them to float32 (the same file and stage3.py, _prepare_fp32_grad_for_sub_group). ZeRO-3
        keeps weights that it gathered (partitioned_param_coordinator.py).
        """
        config, width, world = self.deepspeed, self.compute_dtype.itemsize, self.world_size
        if not config:
            return (4.0 * trainable if world > 1 else 0.0), 0.0
        zero, stage = config["zero_optimization"], zero_stage(config)
        copies = width + 4 if width < 4 else width  # for each parameter: flattened, and in float32
        bucket = self._bucket_parameters(zero)
        if stage < 3:
            buckets = (2 if zero.get("overlap_comm") else 1) if zero.get("contiguous_gradients", True) else 0
            step = copies * trainable / (world if stage else 1)
            return buckets * width * bucket, 0.0 if is_offloaded(config, "optimizer") else step
        gathers = world > 1 or is_offloaded(config, "param")
        live = min(total, float(zero.get("stage3_max_live_parameters", LIVE_PARAMETERS))) if gathers else 0.0
        group = min(trainable / world, float(zero.get("sub_group_size", SUB_GROUP_PARAMETERS)))
        return width * (bucket + live), copies * group

    def _bucket_parameters(self, zero: Config) -> float:
        """Parameters of a bucket; `auto` is the square of the hidden size (transformers, integrations/deepspeed.py)."""
        written = zero.get("reduce_bucket_size", BUCKET_PARAMETERS)
        return self.model_config.hidden_size**2 if written == "auto" else float(written)

    def _loaded_bytes(self, total: int, trainable: int) -> float:
        width, bits = self.compute_dtype.itemsize, self.arguments.quantized_bits
        unquantized = _embedding_parameters(self.model_config)
        if bits:
            return width * unquantized + (NF4_BYTES if bits == 4 else 1) * (total - unquantized) + 4 * trainable
        if self.deepspeed:
            return width * total
        if self.arguments.method == "full":
            return 4 * total
        return width * total + (4 if self.arguments.saves_adapter else 4 - width) * trainable

    def _activation_bytes(self) -> float:
        arguments, model_config, width = self.arguments, self.model_config, self.compute_dtype.itemsize
        tokens = arguments.sequences_per_batch * self.length
        layers = arguments.freeze_layers if arguments.method == "freeze" else model_config.num_layers
        layer = layer_activation_bytes(model_config, width, arguments)
        saved = layers * layer
        if arguments.gradient_checkpointing:
            saved = layers * width * model_config.hidden_size + layer
        dequantized = 2 * model_config.intermediate_size * model_config.hidden_size if arguments.quantized_bits else 0
        return tokens * (saved + 8 * model_config.hidden_size) + self._loss_bytes() + width * dequantized

    def _loss_bytes(self) -> float:
        """Logits of LOSS_POSITIONS in the compute dtype and float32; hidden states of all labels and their gradients.

        Preferences keep all logits. The gradient of a trained output layer is collected in float32.
        """
        arguments, model_config, width = self.arguments, self.model_config, self.compute_dtype.itemsize
        labels = self._label_count()
        positions = labels if arguments.objective == "dpo" else min(labels, LOSS_POSITIONS)
        of_weights = model_config.vocab_size * (4 + width) if arguments.method == "full" else 0
        return (
            positions * model_config.vocab_size * (width + 4)
            + labels * 2 * width * model_config.hidden_size
            + of_weights * model_config.hidden_size
        )

    def _label_count(self) -> int:
        """Upper bound for the labels of a batch; a row with one answer has no more than that answer and its end."""
        arguments = self.arguments
        many_answers = arguments.packing or any(
            may_have_several_answers(file, arguments.encoding, arguments.columns)
            for file in arguments.train_files
            if arguments.objective != "dpo"  # only the last answer is compared
        )
        labels = self.length if many_answers else min(self.length, arguments.max_target_length + 1)
        return arguments.sequences_per_batch * labels


def layer_activation_bytes(model_config: ModelConfig, width: int, arguments: TrainArguments) -> float:
    """Bytes that autograd saves of one layer for each token; `width`: bytes of a value of the compute dtype."""
    hidden, ffn = model_config.hidden_size, model_config.intermediate_size
    heads = model_config.num_heads * model_config.head_dim
    # with the mask of a prefix, keys and values are repeated for every head
    kv_heads = heads if arguments.method == "ptuning" else model_config.num_kv_heads * model_config.head_dim
    trains_layer = not arguments.saves_adapter
    norms = 2 * (4 * hidden + (2 * width * hidden if trains_layer else 0))
    attention = 2 * width * (heads + kv_heads)  # queries and output; keys and values
    mlp = width * ffn * (4 if trains_layer else 3)
    if arguments.method not in ("lora", "qlora"):
        return norms + attention + mlp
    every_layer = arguments.lora_target != "attention"
    dropped = 5 if every_layer else 3  # inputs that a dropout copies, with a mask of one byte; without, some are shared
    inputs = dropped * (width + 1) * hidden if arguments.lora_dropout else (1 + every_layer) * width * hidden
    down_proj = (width + bool(arguments.lora_dropout)) * ffn if every_layer else 0  # its input, after dropout
    return norms + attention + mlp + inputs + down_proj


def _embedding_parameters(model_config: ModelConfig) -> int:
    """Of the embedding and the output layer, which are never quantized."""
    return 2 * model_config.vocab_size * model_config.hidden_size
