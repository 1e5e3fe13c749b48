"""The llama.cpp engine through the interface that all engines share."""

import itertools
import json
import math
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from scripted_engine import wait_until

from entrypoints.chat_format.answer_parser import parse_answer
from entrypoints.chat_format.sampling import Sampling
from entrypoints.chat_session import load_chat
from entrypoints.engines.llamacpp import engine
from entrypoints.engines.llamacpp.completions import CompletionStreams
from entrypoints.engines.llamacpp.engine import LlamaCppEngine
from entrypoints.engines.options import EngineOptions
from entrypoints.errors import UserError

GREEDY = Sampling(max_new_tokens=24, temperature=0)
SAMPLED = Sampling(max_new_tokens=24, temperature=1.5, top_p=1.0)


def ids(engine, prompt, sampling=GREEDY):
    return [int(token) for token in engine.generate(prompt, sampling)]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_ids_are_those_of_transformers(penalty, llama, toy_engine, prompts, same_but_for_ties):
    """Also with a repetition penalty, which counts prompt and answer in both."""
    sampling = Sampling(max_new_tokens=24, temperature=0, repetition_penalty=penalty)
    for prompt in prompts:
        expected = ids(toy_engine, prompt, sampling)
        same_but_for_ties(ids(llama, prompt, sampling), expected, toy_engine.model, prompt, sampling)


@pytest.mark.parametrize("penalty", ["frequency_penalty", "presence_penalty"])
def test_openai_penalties_make_the_answer_repeat_less(penalty, llama, prompts):
    plain = ids(llama, prompts[0])
    assert len(set(ids(llama, prompts[0], Sampling(max_new_tokens=24, temperature=0, **{penalty: 2.0})))) > len(
        set(plain)
    )


@pytest.mark.parametrize("number", [0, 1, 2])
def test_each_stop_id_ends_the_answer_and_is_not_part_of_it(number, scripted_llama, toy_tokenizer, prompts):
    """Checkpoints end an answer with </s>, <|user|> or <|observation|>; llama.cpp alone would stop at one of them."""
    answer = toy_tokenizer.encode("是好")
    engine = scripted_llama([*answer, toy_tokenizer.stop_ids[number]])
    assert ids(engine, prompts[0]) == answer


def test_an_emoji_of_four_ids_arrives_with_all_of_them(scripted_llama, toy_tokenizer, prompts):
    """llama.cpp holds back the ids of an incomplete character, and then reports only the last one."""
    answer = [*map(toy_tokenizer.byte_token_id, "👋".encode()), *toy_tokenizer.encode("好")[1:]]
    engine = scripted_llama([*answer, toy_tokenizer.eos_id])
    assert ids(engine, prompts[0]) == answer
    assert parse_answer(engine.generate(prompts[0], GREEDY), toy_tokenizer).content == "👋好"


def test_bytes_that_are_not_a_character_arrive_too(scripted_llama, toy_tokenizer, prompts):
    answer = [toy_tokenizer.byte_token_id(0xE4), *toy_tokenizer.encode("好")[1:], toy_tokenizer.byte_token_id(0xF0)]
    engine = scripted_llama([*answer, *toy_tokenizer.encode("是")[1:], toy_tokenizer.eos_id])
    assert ids(engine, prompts[0])[: len(answer)] == answer


def test_an_answer_cut_inside_a_character_has_the_right_length(scripted_llama, toy_tokenizer, prompts):
    """Ids that llama.cpp never reports become padding; the number of tokens decides between `length` and `stop`."""
    engine = scripted_llama([*map(toy_tokenizer.byte_token_id, "👋".encode()), toy_tokenizer.eos_id])
    cut = ids(engine, prompts[0], Sampling(max_new_tokens=3, temperature=0))
    assert cut == [toy_tokenizer.pad_id] * 3
    assert parse_answer(cut, toy_tokenizer).content == ""


def test_four_concurrent_answers_equal_sequential_ones(llama, prompts, toy_engine, same_but_for_ties):
    """More than the two slots: the others wait. A batch rounds differently, which decides between tokens that tie."""
    serial = [ids(llama, prompt) for prompt in prompts[:4]]
    with ThreadPoolExecutor(4) as pool:
        concurrent = list(pool.map(lambda prompt: ids(llama, prompt), prompts[:4]))
    for found in (concurrent, llama.generate_batch(prompts[:4], GREEDY)):
        for answer, expected, prompt in zip(found, serial, prompts[:4], strict=True):
            same_but_for_ties(answer, expected, toy_engine.model, prompt, GREEDY)


def test_closing_an_answer_frees_its_slot_within_a_token(single_slot_llama, prompts):
    """With one slot, the next answer would otherwise wait for the rest of this one."""
    engine = single_slot_llama
    long = Sampling(max_new_tokens=900, temperature=0)
    started = time.perf_counter()
    assert len(ids(engine, prompts[0], long)) == 900
    whole = time.perf_counter() - started

    def seconds():
        answer = engine.generate(prompts[0], long)
        next(answer)
        answer.close()
        started = time.perf_counter()
        next(engine.generate(prompts[1], GREEDY))
        return time.perf_counter() - started

    assert min(seconds() for _ in range(5)) < whole / 5  # the fastest of five: the machine may be busy


@pytest.mark.parametrize("waiting_for", ["its slot", "its prompt", "its next token"])
def test_cancelling_ends_an_answer_in_every_phase(waiting_for, single_slot_llama, prompts):
    """By an event that another thread sets: a generator cannot be closed by a thread while another one runs it."""
    engine = single_slot_llama
    busy = engine.generate(prompts[0], Sampling(max_new_tokens=1000, temperature=0))
    if waiting_for == "its slot":
        next(busy)
    long = [100] * 600 if waiting_for == "its prompt" else prompts[1]

    def tokens_after_cancelling():
        """Number of tokens of an answer that is cancelled."""
        cancelled, found = threading.Event(), []
        answer = engine.generate(long, Sampling(max_new_tokens=400, temperature=0), cancelled=cancelled)
        reader = threading.Thread(target=lambda: found.extend(answer), daemon=True)
        reader.start()
        if waiting_for == "its next token":
            wait_until(lambda: found)
        cancelled.set()
        reader.join(60)
        assert not reader.is_alive()
        return len(found)

    # the best of three: on a busy machine an answer may end before this thread runs
    assert min(tokens_after_cancelling() for _ in range(3)) < 400
    busy.close()
    assert len(ids(engine, prompts[1])) == 24


@pytest.mark.parametrize("length", [1000, 1023])
def test_the_context_is_used_to_its_last_token_and_never_shifted(length, llama):
    """A context shift would drop the start of the prompt silently."""
    assert len(ids(llama, [100] * length, Sampling(max_new_tokens=2048, temperature=0))) == 1024 - length


def test_a_smaller_context_length_is_exact_although_llama_cpp_rounds_it_up(toy_gguf):
    engine = LlamaCppEngine.load(toy_gguf, EngineOptions(slots=1, context_length=100, threads=1))
    assert len(ids(engine, [100] * 90, Sampling(max_new_tokens=50, temperature=0))) == 10
    with pytest.raises(UserError, match="the prompt has 100 tokens, the context length is 100"):
        next(engine.generate([100] * 100, GREEDY))
    engine.close()


def test_insufficient_memory_is_reported_before_loading(toy_gguf, monkeypatch):
    monkeypatch.setattr(engine, "available_memory", lambda: 1_000_000)
    with pytest.raises(UserError, match=r"--slots 4 of 1024 tokens needs \d+\.\d MB of memory.*fewer slots"):
        LlamaCppEngine.load(toy_gguf, EngineOptions(slots=4))


@pytest.mark.parametrize(("context_length", "pages"), [(1024, 4), (300, 2)])
def test_the_kv_cache_of_each_slot_and_of_the_prompt_cache_is_counted_before_loading(
    context_length, pages, toy_gguf, monkeypatch
):
    kept = (3 + 1) * pages * 256 * 4 * 2 * 2 * 32 * 2  # aligned contexts; layers, keys and values, KV heads, ...
    embedding = 2 * 2432 * 256  # bytes, ids, hidden
    needed = toy_gguf.stat().st_size + kept + embedding + engine.RUNTIME_BYTES
    monkeypatch.setattr(engine, "available_memory", lambda: needed - 1)
    with pytest.raises(UserError, match=f"--slots 3 of {context_length} tokens needs"):
        LlamaCppEngine.load(toy_gguf, EngineOptions(slots=3, context_length=context_length))
    monkeypatch.setattr(engine, "available_memory", lambda: needed)
    LlamaCppEngine.load(toy_gguf, EngineOptions(slots=3, context_length=context_length, threads=1)).close()


def test_the_same_seed_gives_the_same_answer(llama, prompts):
    def answer(seed):
        return ids(llama, prompts[0], Sampling(**{**vars(SAMPLED), "seed": seed}))

    assert answer(7) == answer(7) != answer(8)
    for seed in (-1, 2**32 - 1):  # llama.cpp interprets the second one as `random`
        assert answer(seed) == answer(seed)
    # four equal answers have a probability below 1e-9: the most likely one, empty, has 0.004
    assert len({tuple(answer(None)) for _ in range(4)}) > 1


def test_top_k_of_one_is_greedy_at_any_temperature(llama, prompts):
    assert ids(llama, prompts[0], Sampling(max_new_tokens=24, temperature=2.0, top_k=1)) == ids(llama, prompts[0])


@pytest.mark.parametrize("top_p", [0, 1e-6])
def test_a_small_top_p_is_greedy_at_any_temperature(top_p, llama, prompts):
    assert ids(llama, prompts[0], Sampling(max_new_tokens=24, temperature=2.0, top_p=top_p)) == ids(llama, prompts[0])


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_log_probabilities_are_those_of_the_model(temperature, llama, toy_engine, prompts):
    """Before temperature and top_p, as transformers computes them; the float16 weights differ by up to 5e-3."""
    sampling = Sampling(max_new_tokens=8, temperature=temperature, top_p=0.5, top_logprobs=5, seed=3)
    tokens = list(llama.generate(prompts[1], sampling))
    greedy = list(toy_engine.generate(prompts[1], Sampling(max_new_tokens=1, temperature=0, top_logprobs=5)))
    assert [id_ for id_, _ in tokens[0].top] == [id_ for id_, _ in greedy[0].top]
    assert [value for _, value in tokens[0].top] == pytest.approx([value for _, value in greedy[0].top], abs=5e-3)
    for token in tokens:
        values = [value for _, value in token.top]
        assert len(values) == 5
        assert values == sorted(values, reverse=True)
        assert 0 < sum(map(math.exp, values)) <= 1.0001
        assert token.logprob == pytest.approx(dict(token.top).get(token, token.logprob))
        assert token.logprob <= values[0]


def test_the_number_of_log_probabilities_is_the_requested_one(llama, prompts):
    (none,) = llama.generate(prompts[0], Sampling(max_new_tokens=1, temperature=0))
    (own,) = llama.generate(prompts[0], Sampling(max_new_tokens=1, temperature=0, top_logprobs=0))
    assert (none.logprob, none.top) == (None, ())
    assert own.logprob < 0
    assert own.top == ()


@pytest.mark.parametrize("seed", range(4))
def test_an_answer_is_json_of_its_schema(seed, llama, prompts, toy_tokenizer):
    """The untrained model generates any token, so that only the grammar can make it valid JSON."""
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["a", "裙"]}, "n": {"type": "integer"}},
        "required": ["ok", "n"],
    }
    sampling = Sampling(max_new_tokens=400, temperature=1.0, top_p=1.0, json_schema=schema, seed=seed)
    value = json.loads(parse_answer(llama.generate(prompts[0], sampling), toy_tokenizer).content)
    assert isinstance(value["ok"], bool)
    assert isinstance(value["n"], int)
    assert value.get("kind", "a") in ("a", "裙")
    assert set(value) <= {"ok", "kind", "n"}


def test_an_unsupported_schema_is_rejected_and_not_ignored(llama, prompts):
    with pytest.raises(UserError, match="the JSON schema has keyword 'pattern'"):
        next(llama.generate(prompts[0], Sampling(json_schema={"type": "string", "pattern": "a"})))


def test_the_engine_reports_its_properties(llama):
    assert (llama.name, llama.slots, llama.context_length, llama.adapters, llama.fatal_error) == (
        "llamacpp",
        2,
        1024,
        {},
        None,
    )
    assert llama.features <= {*Sampling.__dataclass_fields__, "prompt_logprobs"}


def test_an_adapter_is_rejected(llama, prompts):
    with pytest.raises(UserError, match="no adapter 'mine'"):
        next(llama.generate(prompts[0], GREEDY, adapter="mine"))


def test_a_request_that_llama_cpp_rejects_is_a_user_error_and_its_failure_is_not(llama, toy_tokenizer):
    with pytest.raises(UserError, match=r"llama.cpp rejected the request: Prompt contains invalid tokens"):
        next(llama.generate([99999], GREEDY))
    broken = SimpleNamespace(handle_completions=lambda request, tell: tell({"error": {"code": 500, "message": "oh"}}))
    with pytest.raises(RuntimeError, match="oh"):
        next(CompletionStreams(broken, toy_tokenizer).stream({}))
    with pytest.raises(ZeroDivisionError):
        next(
            CompletionStreams(SimpleNamespace(handle_completions=lambda request, tell: 1 / 0), toy_tokenizer).stream({})
        )


def test_the_engine_needs_no_torch():
    """The image that runs GGUF files does not contain it."""
    code = (
        "import sys, xllamacpp, entrypoints.chat_session, entrypoints.engines.llamacpp.engine;"
        "print(sorted({'torch', 'transformers', 'safetensors', 'sentencepiece'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_chat_with_a_gguf_file_answers_as_chat_with_its_folder(toy_gguf, toy_native):
    """Text of complete characters, and the history."""
    question, sampling = "你好", {"temperature": 0, "max_new_tokens": 16}
    answers = [load_chat(path, EngineOptions(dtype=dtype)).chat(question, **sampling) for path, dtype in
               ((toy_gguf, "auto"), (toy_native, "float32"))]  # fmt: skip
    assert answers[0] == answers[1]
    assert answers[0][0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"adapter": Path("x")}, "support adapters"),
        ({"dtype": "float16"}, "dtype"),
        ({"device": "cuda"}, "device"),
        ({"verify": True}, "verify"),
    ],
)
def test_options_that_a_gguf_file_does_not_support_are_rejected(given, message, toy_gguf):
    with pytest.raises(UserError, match=message):
        load_chat(toy_gguf, EngineOptions(**given))


def test_an_answer_does_not_wait_for_one_that_is_running(llama, prompts):
    first = llama.generate(prompts[0], Sampling(max_new_tokens=900, temperature=0))
    next(first)
    assert len(ids(llama, prompts[1])) == 24
    assert len(list(itertools.islice(first, 10))) == 10
    first.close()
