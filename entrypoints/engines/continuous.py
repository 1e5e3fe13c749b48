"""Many answers at once on transformers' own continuous batching.

Left to itself it sizes its cache to the machine's whole memory, which costs the first call 9 to 32 s on two cores even
for a tiny model; the sizes given here are those that `slots` full windows need.
"""

import copy
import itertools
import logging
import queue
import threading
from collections.abc import Generator, Sequence

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingTopKLogitsWarper

from entrypoints.sampling import Sampling

logger = logging.getLogger(__name__)
PAGE = 256  # tokens
CPU_BATCH_TOKENS = 512  # read in one step; more would only make the others' next token wait
POLL_SECONDS = 0.1  # how soon an answer that has no token yet hears that nobody wants it any more
FEATURES = ("top_k", "top_p", "temperature", "max_new_tokens")


class ContinuousBatcher:
    """One background loop that steps through all running answers; any thread may ask."""

    def __init__(self, model: torch.nn.Module, stop_ids: Sequence[int], window: int, slots: int) -> None:
        self._model = with_shared_weights(model)  # batching changes the attention of the model it runs
        self._stop_ids = list(stop_ids)
        on_cpu = next(model.parameters()).device.type == "cpu"
        pages = -(-window // PAGE)
        self._manager = self._model.init_continuous_batching(
            generation_config=GenerationConfig(
                do_sample=True,
                temperature=0.5,  # any values but the neutral ones: only then can a request bring its own
                top_p=0.5,
                top_k=50,
                eos_token_id=self._stop_ids,
                pad_token_id=0,
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE,
                num_blocks=slots * pages + 1,
                max_batch_tokens=CPU_BATCH_TOKENS if on_cpu else None,
                max_requests_per_batch=slots,
                per_request_processors=True,
                use_async_batching=None if not on_cpu else False,
            ),
        )
        for processor in self._manager.logit_processor.logits_processor:
            if isinstance(processor, ContinuousBatchingTopKLogitsWarper):
                processor.__class__ = _ExactTopK
        self._numbers = itertools.count()
        self._waiting: dict[str, queue.SimpleQueue] = {}
        self._closed = threading.Event()
        with torch.inference_mode():  # the loop takes this mode over from the thread that starts it
            self._manager.start()
        self._router = threading.Thread(target=self._route, name="batch-router", daemon=True)
        self._router.start()

    def can(self, sampling: Sampling) -> bool:
        """Does batching honour everything this request asks for?"""
        plain = Sampling(**{name: getattr(sampling, name) for name in FEATURES})
        return sampling == plain

    def generate(
        self, prompt: Sequence[int], sampling: Sampling, cancelled: threading.Event
    ) -> Generator[int, None, None]:
        """Yield the ids of one answer without its stop id; closing or cancelling takes it out of the batch."""
        name = f"answer-{next(self._numbers)}"
        results = self._waiting[name] = queue.SimpleQueue()
        self._manager.add_request(
            list(prompt),
            request_id=name,
            max_new_tokens=sampling.max_new_tokens,
            streaming=True,
            eos_token_id=self._stop_ids,
            **_choice(sampling, self._model.config.vocab_size),
        )
        seen, finished = 0, False
        try:
            while not finished and not cancelled.is_set():
                try:
                    output = results.get(timeout=POLL_SECONDS)
                except queue.Empty:
                    continue
                if isinstance(output, Exception):
                    raise output
                if output.error:
                    raise RuntimeError(f"continuous batching: {output.error}")
                finished = output.is_finished()
                for id_ in output.generated_tokens[seen:]:
                    if id_ in self._stop_ids:
                        return
                    yield id_
                seen = max(seen, len(output.generated_tokens))
        finally:
            if not finished:
                self._manager.cancel_request(name)
            self._waiting.pop(name, None)

    def close(self) -> None:
        """Stop the loop; running answers end with an error."""
        self._closed.set()
        self._manager.stop(block=True, timeout=30, hard_stop=True)
        self._fail_all(RuntimeError("the engine was closed"))

    @property
    def broken(self) -> bool:
        """Has the loop died?"""
        return not self._closed.is_set() and not self._manager.is_running()

    def _route(self) -> None:
        """Hand each result to the thread that waits for it; the manager has one queue for all."""
        while not self._closed.is_set():
            output = self._manager.get_result(timeout=0.5)
            if output is not None:
                waiting = self._waiting.get(output.request_id)
                if waiting:
                    waiting.put(output)
            elif not self._manager.is_running():
                self._fail_all(RuntimeError("the batching loop ended"))
                self._closed.wait(0.5)

    def _fail_all(self, error: Exception) -> None:
        for waiting in list(self._waiting.values()):
            waiting.put(error)


class _ExactTopK(ContinuousBatchingTopKLogitsWarper):
    """top_k = 1 leaves one candidate, also where two are equally likely, which half precision often makes them."""

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        kept = super().__call__(scores, tensor_arg)
        single = (tensor_arg[: scores.size(0)] == 1).unsqueeze(-1)
        best = scores.argmax(dim=-1, keepdim=True)
        others = torch.ones_like(scores, dtype=torch.bool).scatter(1, best, False)
        return kept.masked_fill(single & others, self.filter_value)


def with_shared_weights(model: torch.nn.Module) -> torch.nn.Module:
    """A second model object on the same tensors: its settings and wrappers can change without touching the first."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _choice(sampling: Sampling, vocabulary: int) -> dict:
    if sampling.greedy:  # the likeliest of one candidate
        return {"temperature": 1.0, "top_p": 1.0, "top_k": 1}
    return {
        "temperature": float(sampling.temperature),
        "top_p": float(sampling.top_p),
        "top_k": sampling.top_k or vocabulary,
    }
