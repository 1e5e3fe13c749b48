"""The llama.cpp engine, through xllamacpp: one GGUF file, several answers at once, no torch.

llama.cpp receives and returns token ids; prompt format, stop tokens and text are handled outside it.
Frequency and presence penalty count the tokens of the prompt too, unlike in the other engines.
"""

import contextlib
import logging
import threading
import weakref
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from entrypoints.chat_format.prompt import PromptFormat
from entrypoints.chat_format.sampling import Sampling
from entrypoints.checkpoint.gguf_reader import GgufCheckpoint, open_gguf
from entrypoints.checkpoint.layout import ModelConfig
from entrypoints.checkpoint.manifest import check_file_record
from entrypoints.engines.base import FEATURES, Token
from entrypoints.engines.grammar.json_schema import answer_grammar
from entrypoints.engines.llamacpp.completions import SELECTED_BY_LLAMACPP, CompletionStreams
from entrypoints.engines.llamacpp.cpu_features import load_cpu_code
from entrypoints.engines.llamacpp.prefix_cache import PrefixCache, Slot, open_store
from entrypoints.engines.llamacpp.prefix_store import OPERATOR
from entrypoints.engines.llamacpp.prompt_logprobs import score_prompt
from entrypoints.engines.llamacpp.server import SLOT_ALIGNMENT_TOKENS, LlamaServer, aligned_context, start_server
from entrypoints.engines.llamacpp.slot_files import SlotFiles
from entrypoints.engines.options import EngineOptions
from entrypoints.errors import UserError
from entrypoints.hardware.resources import available_cpus, available_memory
from entrypoints.sizes import format_size

logger = logging.getLogger(__name__)
FLOAT16_BYTES = 2
RUNTIME_BYTES = 16 << 20  # threads, HTTP server and compute buffers of a small model: 10 MB with the demo model
RANDOM_SEED = (1 << 32) - 1  # llama.cpp interprets this seed as "random"


class LlamaCppEngine:
    """A GGUF model in this process; calls beyond `slots` wait inside llama.cpp."""

    name = "llamacpp"
    fatal_error: str | None = None  # a crash of llama.cpp ends the process

    def __init__(
        self,
        checkpoint: GgufCheckpoint,
        server: LlamaServer,
        options: EngineOptions,
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        self.tokenizer = checkpoint.tokenizer
        self.prompt_format = checkpoint.prompt_format
        self.adapters: Mapping[str, PromptFormat] = {}
        self.slots = options.slots
        self.context_length = checkpoint.context_length
        # llama.cpp computes no probabilities of drafted tokens
        self.features = FEATURES - {"top_logprobs", "prompt_logprobs"} if options.speculative else FEATURES
        self._vocab_size = checkpoint.model_config.vocab_size
        self._speculative = options.speculative
        self._prefix_cache = prefix_cache
        self._streams = CompletionStreams(server, checkpoint.tokenizer)
        # also at interpreter exit: a thread that is still inside llama.cpp would crash the process
        self._close = weakref.finalize(self, self._streams.close)

    @classmethod
    def load(cls, file: Path, options: EngineOptions) -> "LlamaCppEngine":
        """Check and load a file written by `glm quantize`.

        Raises UserError if the file is not usable, the context length is larger than the model's, or memory is short.
        """
        load_cpu_code()  # rejects the CPU before it reads the file
        if options.verify:
            check_file_record(file)
        checkpoint = options.limited(open_gguf(file))
        require_memory(checkpoint, options.slots, options.use_mmap)
        options = replace(options, threads=options.threads or available_cpus())
        logger.info(
            "loading %s (%s) with --slots %d of %d tokens, --threads %d",
            file,
            checkpoint.type,
            options.slots,
            checkpoint.context_length,
            options.threads,
        )
        store = open_store(checkpoint, options) if options.prefix_cache else None
        slot_files = SlotFiles(store.folder) if store else None
        server = start_server(checkpoint, options, slot_files)
        prefix_cache = PrefixCache(store, slot_files, options.slots) if store and slot_files else None
        engine = cls(checkpoint, server, options, prefix_cache)
        # Warm up with one token. This also waits until the server's loop runs: closing it before that would hang.
        list(engine.generate([checkpoint.tokenizer.pad_id], Sampling(max_new_tokens=1)))
        return engine

    def generate(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        adapter: str | None = None,
        cancelled: threading.Event | None = None,
    ) -> Generator[Token, None, None]:
        """Yield the tokens of the answer, without the stop token; closing or cancelling takes effect within a token."""
        if adapter is not None:
            raise UserError(f"a GGUF model has no adapter {adapter!r}", "merge the adapter: glm quantize --adapter")
        self._check_length(len(prompt))
        max_tokens = min(sampling.max_new_tokens, self.context_length - len(prompt))
        request = _completion_request(prompt, sampling, max_tokens)
        if self._speculative:
            request["verbose"] = True  # also return the ids of drafted tokens
        with self._slot_for(prompt, sampling.cache_salt, cancelled) as slot:
            if slot is None:
                return
            with contextlib.closing(self._streams.stream(request | {"id_slot": slot.number}, cancelled)) as tokens:
                for count, token in enumerate(tokens, start=1):
                    slot.tokens.append(token)
                    if token in self.tokenizer.stop_ids:
                        return
                    yield _with_logprobs(token, sampling.top_logprobs)
                    if count >= max_tokens:  # llama.cpp continues to the end of a character
                        return

    @property
    def keeps_prefixes(self) -> bool:
        """Is there a prefix cache?"""
        return self._prefix_cache is not None

    def warm(self, prompt: Sequence[int]) -> None:
        """Compute a prompt that clients will use, or read it from the prefix cache. All clients may use it."""
        list(self.generate(prompt, Sampling(max_new_tokens=1, temperature=0, cache_salt=OPERATOR)))
        if self._prefix_cache:
            self._prefix_cache.save()

    def _slot_for(
        self, prompt: Sequence[int], owner: str, cancelled: threading.Event | None
    ) -> contextlib.AbstractContextManager[Slot | None]:
        if self._prefix_cache:
            return self._prefix_cache.slot_for(prompt, owner, cancelled)
        return contextlib.nullcontext(Slot(SELECTED_BY_LLAMACPP))

    def score(
        self,
        prompt: Sequence[int],
        top_logprobs: int,
        adapter: str | None = None,
        cancelled: threading.Event | None = None,
    ) -> list[Token]:
        """The ids of a prompt with their log probabilities, one step each; cancelling takes effect within a step."""
        self._check_length(len(prompt))
        sampling = Sampling(max_new_tokens=1, temperature=0, top_logprobs=top_logprobs)
        with self._slot_for(prompt, sampling.cache_salt, cancelled) as slot:
            if slot is None:
                return []
            slot.is_saved = True  # no file: every id is computed each time
            tokens = score_prompt(
                self._streams.stream,
                lambda ids: _completion_request(ids, sampling, 1) | {"id_slot": slot.number},
                prompt,
                self.tokenizer,
                cancelled,
            )
        return [_with_logprobs(token, top_logprobs) for token in tokens]

    def _check_length(self, prompt_length: int) -> None:
        if prompt_length >= self.context_length:
            raise UserError(
                f"the prompt has {prompt_length} tokens, the context length is {self.context_length}",
                "shorten the conversation",
            )

    def generate_greedy(self, prompt: Sequence[int], max_new_tokens: int, top_logprobs: int) -> list[Token]:
        """The greedy answer, including a stop token, each token with its `top_logprobs` most likely alternatives.

        Tokens that llama.cpp does not report (see `CompletionStreams`) have no logprob.
        """
        request = _completion_request(prompt, Sampling(max_new_tokens=max_new_tokens, temperature=0), max_new_tokens)
        answer = []
        for token in self._streams.stream(request | {"n_probs": min(top_logprobs, self._vocab_size)}):
            answer.append(token)
            if token in self.tokenizer.stop_ids or len(answer) == max_new_tokens:
                break
        return answer

    def generate_batch(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
        """Answers to several prompts, `slots` at a time, without stop tokens."""
        with ThreadPoolExecutor(self.slots) as pool:
            return list(pool.map(lambda prompt: list(map(int, self.generate(prompt, sampling))), prompts))

    def close(self) -> None:
        """Write the prefix cache, end running calls with an error and free the memory."""
        if self._prefix_cache:
            self._prefix_cache.close()
        self._close()


def slot_bytes(model_config: ModelConfig, context_length: int) -> int:
    """Bytes of the KV cache of one slot."""
    return model_config.kv_cache_bytes(aligned_context(context_length))


def needed_bytes(
    model_config: ModelConfig, file_bytes: int, slots: int, context_length: int, use_mmap: bool = False
) -> int:
    """Bytes that the engine allocates for a file of `file_bytes`, in addition to what the process uses already.

    KV cache for each slot and for one entry of the prompt cache (`start_server`), RUNTIME_BYTES, and what is held twice
    during loading, at most the embedding in float16: 0.40 GB in f16, 0.32 in q8_0, 0.23 in q4_0, measured with
    4 layers of the 6B's width.
    """
    cache = (slots + 1) * slot_bytes(model_config, context_length) + RUNTIME_BYTES
    embedding = FLOAT16_BYTES * model_config.vocab_size * model_config.hidden_size
    return cache if use_mmap else cache + file_bytes + embedding


def require_memory(checkpoint: GgufCheckpoint, slots: int, use_mmap: bool = False) -> None:
    """Raise UserError if less memory is available than the engine would allocate."""
    model_config, context_length = checkpoint.model_config, checkpoint.context_length
    file_bytes = checkpoint.file.stat().st_size
    needed = needed_bytes(model_config, file_bytes, slots, context_length, use_mmap)
    if (available := available_memory()) < needed:
        spare = available - needed_bytes(model_config, file_bytes, slots, 0, use_mmap)
        step = (slots + 1) * slot_bytes(model_config, SLOT_ALIGNMENT_TOKENS)
        fitting = spare // step * SLOT_ALIGNMENT_TOKENS
        raise UserError(
            f"{checkpoint.file} with --slots {slots} of {context_length} tokens needs {format_size(needed)} of memory, "
            f"{format_size(available)} are available",
            f"free memory, or use fewer slots or a smaller type{f', or --context-length {fitting}' * (fitting > 0)}",
        )


def _with_logprobs(token: Token, top_logprobs: int | None) -> Token:
    """The token with as many log probabilities as requested; llama.cpp always returns at least one."""
    return Token(token) if top_logprobs is None else Token(token, token.logprob, token.top[:top_logprobs])


def _completion_request(prompt: Sequence[int], sampling: Sampling, max_tokens: int) -> dict[str, Any]:
    seed = {} if sampling.seed is None else {"seed": sampling.seed % RANDOM_SEED}
    grammar = answer_grammar(sampling)
    return {
        "prompt": list(prompt),
        "stream": True,
        "timings_per_token": True,  # with the number of tokens so far, of which a stream names only some
        "return_progress": True,  # a chunk after each step of the prefill, at which the call can be cancelled
        "n_predict": max_tokens,
        "n_probs": max(1, sampling.top_logprobs or 0),  # token ids are only reported together with probabilities
        # The order of transformers; llama.cpp's other default samplers are off. Greedy is top_k of 1: top_p would sort
        # the whole vocabulary for each token.
        "samplers": ["penalties", "top_k"] if sampling.greedy else ["penalties", "temperature", "top_k", "top_p"],
        "temperature": 1.0 if sampling.greedy else sampling.temperature,
        "top_k": 1 if sampling.greedy else sampling.top_k or 0,
        "top_p": sampling.top_p,
        "repeat_penalty": sampling.repetition_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
        "repeat_last_n": len(prompt) + max_tokens,
        **seed,
        **({"grammar": grammar} if grammar else {}),
    }
