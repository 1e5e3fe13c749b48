"""Concurrent answers through the continuous batching of transformers.

By default it sizes its KV cache to the whole memory of the machine, which delays the first request by 9 to 32 s on two
CPUs even for a tiny model. The sizes set here are those that `slots` full contexts need.
"""

import itertools
import logging
import queue
import threading
from collections.abc import Generator, Sequence
from dataclasses import fields
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, GlmForCausalLM
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import GenerationOutput
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from entrypoints.chat_format.sampling import Sampling
from entrypoints.checkpoint.layout import ModelConfig
from entrypoints.engines.transformers.batched_logits import replace_processors
from entrypoints.engines.transformers.batching_memory import (
    CUDA_CONTEXT_BYTES,
    GPU_BATCH_TOKENS,
    PAGE_TOKENS,
    page_count,
    require_slots,
)
from entrypoints.engines.transformers.logits_processors import check_finite_logits
from entrypoints.engines.transformers.model import with_shared_weights
from entrypoints.errors import ModelError
from entrypoints.hardware.gpus import list_gpus
from entrypoints.hardware.placement import Placement, weight_bytes

logger = logging.getLogger(__name__)
CPU_BATCH_TOKENS = 512  # tokens per step; a longer prefill would delay the next token of the other answers
POLL_SECONDS = 0.1  # how often a thread that waits for a token checks whether it was cancelled or closed
FLASH_ATTENTION_CAPABILITY = (8, 0)
# of Sampling; `cache_salt` changes no answer, and nothing of this engine is kept on disk
BATCHED_FIELDS = ("top_k", "top_p", "temperature", "max_new_tokens", "cache_salt")


class ContinuousBatcher:
    """One background loop that steps through all running answers; thread-safe."""

    def __init__(self, model: GlmForCausalLM, stop_ids: Sequence[int], context_length: int, slots: int) -> None:
        self._model = with_shared_weights(model)  # batching replaces the attention of the model that it runs
        weight = next(model.parameters())
        self._flash_attention = _installed_flash_attention(weight.device.type, weight.dtype)
        if self._flash_attention:
            self._model.set_attn_implementation(self._flash_attention)
        self._stop_ids = list(stop_ids)
        self._manager = self._create_manager(context_length, slots)
        self._request_numbers = itertools.count()
        self._results: dict[str, queue.SimpleQueue[GenerationOutput | Exception]] = {}  # by request id
        self.failure: ModelError | None = None  # why the loop ended, if the model is at fault
        self._closed = threading.Event()
        with torch.inference_mode():  # the loop's thread inherits this mode
            self._manager.start()
        self._dispatcher = threading.Thread(target=self._dispatch_results, name="batch-dispatcher", daemon=True)
        self._dispatcher.start()

    def supports(self, sampling: Sampling) -> bool:
        """Does batching support every option of this request?"""
        default = Sampling()
        others = [field.name for field in fields(Sampling) if field.name not in BATCHED_FIELDS]
        return all(getattr(sampling, name) == getattr(default, name) for name in others)

    def generate(
        self, prompt: Sequence[int], sampling: Sampling, cancelled: threading.Event
    ) -> Generator[int, None, None]:
        """Yield the ids of one answer without its stop id; closing or cancelling removes it from the batch."""
        request_id = f"answer-{next(self._request_numbers)}"
        results = self._results[request_id] = queue.SimpleQueue()
        self._manager.add_request(
            list(prompt),
            request_id=request_id,
            max_new_tokens=sampling.max_new_tokens,
            streaming=True,
            eos_token_id=self._stop_ids,
            **_sampling_arguments(sampling, self._model.config.vocab_size),
        )
        yielded, finished = 0, False
        try:
            while not finished and not cancelled.is_set():
                try:
                    output = results.get(timeout=POLL_SECONDS)
                except queue.Empty:
                    continue
                if isinstance(output, Exception):
                    raise output
                if output.error:
                    error = RuntimeError(f"continuous batching: {output.error}")
                    raise ModelError(*self.failure.args) if self.failure else error
                finished = output.is_finished()
                for id_ in output.generated_tokens[yielded:]:  # each output holds the answer from its start
                    if id_ in self._stop_ids:
                        return
                    yield id_
                yielded = max(yielded, len(output.generated_tokens))
        finally:
            if not finished:
                self._manager.cancel_request(request_id)
            self._results.pop(request_id, None)

    def close(self) -> None:
        """Stop the loop; running answers end with an error. Returns when both threads have ended.

        A thread that frees the model's tensors while the interpreter exits can abort the process (pytorch#38228).
        """
        self._closed.set()
        self._manager.stop(block=True, timeout=30, hard_stop=True)
        self._dispatcher.join()
        self._fail_all(RuntimeError("the engine was closed"))

    @property
    def is_dead(self) -> bool:
        """Has the loop ended without being closed?"""
        return not self._closed.is_set() and not self._manager.is_running()

    def _create_manager(self, context_length: int, slots: int) -> ContinuousBatchingManager:
        on_cpu = next(self._model.parameters()).device.type == "cpu"
        manager = self._model.init_continuous_batching(
            generation_config=GenerationConfig(  # type: ignore[no-untyped-call]  # transformers: untyped
                do_sample=True,
                temperature=0.5,  # not the neutral values: a request can only override a setting that is active
                top_p=0.5,
                top_k=50,
                eos_token_id=self._stop_ids,
                pad_token_id=0,
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE_TOKENS,
                num_blocks=page_count(context_length, slots),
                max_batch_tokens=CPU_BATCH_TOKENS if on_cpu else GPU_BATCH_TOKENS,
                max_requests_per_batch=slots,
                per_request_processors=True,
                use_async_batching=False,  # it doubles the memory of inputs and mask
                auto_switch_to_flash=False,  # it would download a kernel from a hub where the package `kernels` is
            ),
        )
        # with flash attention a step is a CUDA graph
        replace_processors(manager, None if self._flash_attention else self._check_finite)
        return manager

    def _dispatch_results(self) -> None:
        """Pass each result to the call that waits for it; the manager has one queue for all."""
        while not self._closed.is_set():
            output = self._manager.get_result(timeout=POLL_SECONDS)
            if output is not None:
                results = self._results.get(output.request_id)
                if results:
                    results.put(output)
            elif not self._manager.is_running():
                self._fail_all(RuntimeError("the batching loop ended"))
                self._closed.wait(POLL_SECONDS)

    def _check_finite(self, logits: torch.Tensor) -> None:
        """End the loop: NaN spreads to the keys of all running answers, and stays in pages that later ones share."""
        try:
            check_finite_logits(logits, logits)
        except ModelError as error:
            self.failure = error
            raise

    def _fail_all(self, error: Exception) -> None:
        for results in list(self._results.values()):
            results.put(error)


def check_batching_memory(model_config: ModelConfig, slots: int, placement: Placement) -> None:
    """Raise UserError before loading if the KV cache of the slots does not fit on the GPU beside the weights."""
    if "cuda:0" not in placement.device_map.values():
        return
    itemsize = placement.dtype.itemsize
    free = list_gpus()[0].free - weight_bytes(model_config, itemsize) - CUDA_CONTEXT_BYTES
    flash_attention = _installed_flash_attention("cuda", placement.dtype) is not None
    require_slots(model_config, slots, free, itemsize, flash_attention)


def _installed_flash_attention(device: str, dtype: torch.dtype) -> str | None:
    """The FlashAttention that this GPU and precision can use, as transformers names it; it reads the cache by pages."""
    if device != "cuda" or dtype.itemsize != 2 or list_gpus()[0].capability < FLASH_ATTENTION_CAPABILITY:
        return None
    names = {"flash_attention_3": is_flash_attn_3_available, "flash_attention_2": is_flash_attn_2_available}
    return next((name for name, is_available in names.items() if is_available()), None)


def _sampling_arguments(sampling: Sampling, vocab_size: int) -> dict[str, Any]:
    if sampling.greedy:
        return {"temperature": 1.0, "top_p": 1.0, "top_k": 1}
    return {
        "temperature": float(sampling.temperature),
        "top_p": float(sampling.top_p),
        "top_k": min(sampling.top_k or vocab_size, vocab_size),  # transformers 5.19 fails on a larger one
    }
