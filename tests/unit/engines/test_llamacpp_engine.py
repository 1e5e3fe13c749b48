"""What llama.cpp promises through our interface. Trap names are those of the list of reported pains."""

import itertools
import json
import math
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from scripted_engine import wait_until

from entrypoints.answer import read_answer
from entrypoints.conversation import load_chat
from entrypoints.engines import llamacpp_engine
from entrypoints.engines.llamacpp_calls import Calls
from entrypoints.engines.llamacpp_engine import LlamaCppEngine
from entrypoints.errors import UserError
from entrypoints.sampling import Sampling

GREEDY = Sampling(max_new_tokens=24, temperature=0)
WILD = Sampling(max_new_tokens=24, temperature=1.5, top_p=1.0)


def ids(engine, prompt, sampling=GREEDY):
    return [int(token) for token in engine.generate(prompt, sampling)]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_ids_are_those_of_transformers(penalty, llama, toy_engine, prompts, same_but_for_ties):
    """The penalty takes part: it counts prompt and answer in both."""
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
    """C2: all three, not only eos."""
    answer = toy_tokenizer.encode("是好")
    engine = scripted_llama([*answer, toy_tokenizer.stop_ids[number]])
    assert ids(engine, prompts[0]) == answer


def test_an_emoji_of_four_ids_arrives_with_all_of_them(scripted_llama, toy_tokenizer, prompts):
    """llama.cpp holds the ids of a started character back, and then tells only the last."""
    answer = [*map(toy_tokenizer.byte, "👋".encode()), *toy_tokenizer.encode("好")[1:]]
    engine = scripted_llama([*answer, toy_tokenizer.eos_id])
    assert ids(engine, prompts[0]) == answer
    assert read_answer(engine.generate(prompts[0], GREEDY), toy_tokenizer).content == "👋好"


def test_bytes_that_are_no_character_arrive_too(scripted_llama, toy_tokenizer, prompts):
    answer = [toy_tokenizer.byte(0xE4), *toy_tokenizer.encode("好")[1:], toy_tokenizer.byte(0xF0)]
    engine = scripted_llama([*answer, *toy_tokenizer.encode("是")[1:], toy_tokenizer.eos_id])
    assert ids(engine, prompts[0])[: len(answer)] == answer


def test_an_answer_cut_inside_a_character_has_the_right_length(scripted_llama, toy_tokenizer, prompts):
    """What llama.cpp does not tell any more is padding; the length is what tells `length` from `stop`."""
    engine = scripted_llama([*map(toy_tokenizer.byte, "👋".encode()), toy_tokenizer.eos_id])
    cut = ids(engine, prompts[0], Sampling(max_new_tokens=3, temperature=0))
    assert cut == [toy_tokenizer.pad_id] * 3
    assert read_answer(cut, toy_tokenizer).content == ""


def test_four_at_once_say_what_one_after_another_says(llama, prompts):
    """More than the slots: the others wait."""
    serial = [ids(llama, prompt) for prompt in prompts[:4]]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda prompt: ids(llama, prompt), prompts[:4])) == serial
    assert llama.generate_batch(prompts[:4], GREEDY) == serial


def test_closing_an_answer_frees_its_slot_within_a_token(toy_gguf, prompts):
    """With one slot, the next question would otherwise wait for the whole answer."""
    engine = LlamaCppEngine.load(toy_gguf, slots=1, threads=1)
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

    assert min(seconds() for _ in range(5)) < whole / 5  # the best: the machine may do something else meanwhile
    engine.close()


@pytest.mark.parametrize("waiting_for", ["its slot", "its prompt", "its next token"])
def test_cancelling_ends_an_answer_whatever_it_waits_for(waiting_for, toy_gguf, prompts):
    """The caller's event, from another thread, for a caller who cannot close what another thread runs."""
    engine = LlamaCppEngine.load(toy_gguf, slots=1, threads=1)
    busy = engine.generate(prompts[0], Sampling(max_new_tokens=1000, temperature=0))
    if waiting_for == "its slot":
        next(busy)
    long = [100] * 600 if waiting_for == "its prompt" else prompts[1]

    def told():
        """How many tokens came although the answer was cancelled."""
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

    assert min(told() for _ in range(3)) < 400  # the best: it may have ended before this thread had its turn
    busy.close()
    assert len(ids(engine, prompts[1])) == 24
    engine.close()


@pytest.mark.parametrize("length", [1000, 1023])
def test_the_window_is_used_to_its_last_token_and_never_shifted(length, llama):
    """L7."""
    assert len(ids(llama, [100] * length, Sampling(max_new_tokens=2048, temperature=0))) == 1024 - length


def test_a_smaller_window_is_kept_though_llama_cpp_rounds_it_up(toy_gguf):
    engine = LlamaCppEngine.load(toy_gguf, slots=1, window=100, threads=1)
    assert len(ids(engine, [100] * 90, Sampling(max_new_tokens=50, temperature=0))) == 10
    with pytest.raises(UserError, match="the prompt has 100 tokens, the window 100"):
        next(engine.generate([100] * 100, GREEDY))
    engine.close()


@pytest.mark.parametrize(("window", "slots"), [(1025, 1), (0, 1), (None, 0)])
def test_a_window_or_slots_that_cannot_be_had_are_refused(window, slots, toy_gguf):
    with pytest.raises(UserError, match="the window is at most 1024, slots at least 1"):
        LlamaCppEngine.load(toy_gguf, slots=slots, window=window)


def test_too_little_memory_is_found_before_loading(toy_gguf, monkeypatch):
    monkeypatch.setattr(llamacpp_engine, "available_memory", lambda: 1_000_000)
    with pytest.raises(UserError, match=r"4 slots of 1024 tokens needs 0\.0 GB of memory.*fewer slots"):
        LlamaCppEngine.load(toy_gguf)


@pytest.mark.parametrize(("window", "pages"), [(1024, 4), (300, 2)])
def test_the_window_of_each_slot_and_one_on_the_shelf_are_counted_before_loading(window, pages, toy_gguf, monkeypatch):
    kept = (3 + 1) * pages * 256 * 4 * 2 * 2 * 32 * 2  # windows of whole pages; layers, keys and values, groups, ...
    embedding = 2 * 2432 * 256  # bytes, ids, hidden
    needed = toy_gguf.stat().st_size + kept + embedding + llamacpp_engine.ROOM
    monkeypatch.setattr(llamacpp_engine, "available_memory", lambda: needed - 1)
    with pytest.raises(UserError, match=f"3 slots of {window} tokens needs"):
        LlamaCppEngine.load(toy_gguf, slots=3, window=window)
    monkeypatch.setattr(llamacpp_engine, "available_memory", lambda: needed)
    LlamaCppEngine.load(toy_gguf, slots=3, window=window, threads=1).close()


def test_the_same_seed_gives_the_same_answer(llama, prompts):
    def answer(seed):
        return ids(llama, prompts[0], Sampling(**{**vars(WILD), "seed": seed}))

    assert answer(7) == answer(7) != answer(8)
    assert answer(-1) == answer(-1) and answer(2**32 - 1) == answer(2**32 - 1)  # llama.cpp's own word for `random`
    assert answer(None) != answer(None)


def test_top_k_of_one_is_greedy_at_any_temperature(llama, prompts):
    assert ids(llama, prompts[0], Sampling(max_new_tokens=24, temperature=2.0, top_k=1)) == ids(llama, prompts[0])


def test_a_small_top_p_is_greedy_at_any_temperature(llama, prompts):
    assert ids(llama, prompts[0], Sampling(max_new_tokens=24, temperature=2.0, top_p=1e-6)) == ids(llama, prompts[0])


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_log_probabilities_are_the_models_own_opinion(temperature, llama, toy_engine, prompts):
    """Before temperature and top_p, as transformers computes them; 5e-3 is what half precision weights cost."""
    sampling = Sampling(max_new_tokens=8, temperature=temperature, top_p=0.5, top_logprobs=5, seed=3)
    tokens = list(llama.generate(prompts[1], sampling))
    greedy = list(toy_engine.generate(prompts[1], Sampling(max_new_tokens=1, temperature=0, top_logprobs=5)))
    assert [id_ for id_, _ in tokens[0].top] == [id_ for id_, _ in greedy[0].top]
    assert [value for _, value in tokens[0].top] == pytest.approx([value for _, value in greedy[0].top], abs=5e-3)
    for token in tokens:
        values = [value for _, value in token.top]
        assert len(values) == 5 and values == sorted(values, reverse=True)
        assert 0 < sum(map(math.exp, values)) <= 1.0001
        assert token.logprob == pytest.approx(dict(token.top).get(token, token.logprob))
        assert token.logprob <= values[0]


def test_log_probabilities_come_as_many_as_asked(llama, prompts):
    (none,) = llama.generate(prompts[0], Sampling(max_new_tokens=1, temperature=0))
    (own,) = llama.generate(prompts[0], Sampling(max_new_tokens=1, temperature=0, top_logprobs=0))
    assert (none.logprob, none.top) == (None, ())
    assert own.logprob < 0 and own.top == ()


@pytest.mark.parametrize("seed", range(4))
def test_an_answer_is_json_of_its_schema(seed, llama, prompts, toy_tokenizer):
    """G4. The untrained toy would say anything."""
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["a", "裙"]}, "n": {"type": "integer"}},
        "required": ["ok", "n"],
    }
    sampling = Sampling(max_new_tokens=400, temperature=1.0, top_p=1.0, json_schema=schema, seed=seed)
    value = json.loads(read_answer(llama.generate(prompts[0], sampling), toy_tokenizer).content)
    assert isinstance(value["ok"], bool) and isinstance(value["n"], int)
    assert value.get("kind", "a") in ("a", "裙") and set(value) <= {"ok", "kind", "n"}


def test_a_schema_that_cannot_be_kept_is_refused_not_ignored(llama, prompts):
    with pytest.raises(UserError, match="the JSON schema has keyword 'pattern'"):
        next(llama.generate(prompts[0], Sampling(json_schema={"type": "string", "pattern": "a"})))


def test_the_engine_says_what_it_can(llama):
    assert (llama.name, llama.slots, llama.window, llama.adapters, llama.broken) == ("llamacpp", 2, 1024, {}, None)
    assert llama.features <= set(Sampling.__dataclass_fields__)


def test_an_adapter_is_refused(llama, prompts):
    with pytest.raises(UserError, match="no adapter 'mine'"):
        next(llama.generate(prompts[0], GREEDY, adapter="mine"))


def test_what_llama_cpp_refuses_is_the_users_error_and_what_fails_in_it_is_not(llama, toy_tokenizer):
    with pytest.raises(UserError, match=r"llama.cpp refuses this: Prompt contains invalid tokens"):
        next(llama.generate([99999], GREEDY))
    broken = SimpleNamespace(handle_completions=lambda request, tell: tell({"error": {"code": 500, "message": "oh"}}))
    with pytest.raises(RuntimeError, match="oh"):
        next(Calls(broken, toy_tokenizer).stream({}))
    with pytest.raises(ZeroDivisionError):
        next(Calls(SimpleNamespace(handle_completions=lambda request, tell: 1 / 0), toy_tokenizer).stream({}))


def test_the_engine_needs_no_torch():
    """The image that runs quantised models has none."""
    code = (
        "import sys, xllamacpp, entrypoints.conversation, entrypoints.engines.llamacpp_engine;"
        "print(sorted({'torch', 'transformers', 'safetensors', 'sentencepiece'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_chat_with_a_gguf_file_says_what_chat_with_its_folder_says(toy_gguf, toy_native):
    """In text, whole characters only, with history."""
    question, sampling = "你好", {"temperature": 0, "max_new_tokens": 16}
    answers = [load_chat(path, dtype=dtype).chat(question, **sampling) for path, dtype in
               ((toy_gguf, "auto"), (toy_native, "float32"))]  # fmt: skip
    assert answers[0] == answers[1]
    assert answers[0][0]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"adapter": "x"}, "take adapters"),
        ({"dtype": "float16"}, "dtype"),
        ({"device": "cuda"}, "device"),
        ({"verify": True}, "verify"),
    ],
)
def test_what_a_gguf_file_cannot_have_is_refused(given, words, toy_gguf):
    with pytest.raises(UserError, match=words):
        load_chat(toy_gguf, **given)


def test_a_question_in_the_middle_of_another_answer_does_not_wait(llama, prompts):
    first = llama.generate(prompts[0], Sampling(max_new_tokens=900, temperature=0))
    next(first)
    assert len(ids(llama, prompts[1])) == 24
    assert len(list(itertools.islice(first, 10))) == 10
    first.close()
