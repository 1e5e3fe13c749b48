"""vLLM's engine against transformers on the same checkpoint, on a processor."""

import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from reference import ANSWER, greedy, reference_answers

from entrypoints.answer import decode
from entrypoints.engines.base import Engine, Token
from entrypoints.engines.transformers_engine import TransformersEngine
from entrypoints.engines.vllm_engine import VllmEngine
from entrypoints.engines.vllm_settings import EIGHT_BITS
from entrypoints.errors import UserError
from entrypoints.sampling import Sampling

LONG = 900  # tokens of an answer that is still running when it is left
Prompts = list[list[int]]


def unfinished(engine: Engine) -> int:
    return engine._llm.get_num_unfinished_requests()


def wait_for_rest(engine: Engine, seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while unfinished(engine) and time.monotonic() < end:
        time.sleep(0.01)
    assert unfinished(engine) == 0


def drawn(engine: Engine, prompt: Sequence[int], **sampling: object) -> list[int]:
    return list(engine.generate(prompt, Sampling(**{"max_new_tokens": ANSWER, "temperature": 1.0} | sampling)))


def test_greedy_answers_are_those_of_transformers(engine: Engine, toy: Path, prompts: Prompts):
    answers = [list(engine.generate(prompt, greedy())) for prompt in prompts]
    assert len(answers) == 20
    assert answers == reference_answers(toy, prompts)


def test_a_stop_id_ends_the_answer_and_is_not_part_of_it(engine: Engine, prompts: Prompts):
    answers = [list(engine.generate(prompt, greedy())) for prompt in prompts]
    ended = [answer for answer in answers if len(answer) < ANSWER]
    assert ended, "the toy was made so that some answers end"
    assert not set(engine.tokenizer.stop_ids) & {id_ for answer in answers for id_ in answer}


def test_many_at_once_answer_as_one_by_one(engine: Engine, prompts: Prompts):
    serial = [list(engine.generate(prompt, greedy())) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:  # more than slots
        assert list(pool.map(lambda prompt: list(engine.generate(prompt, greedy())), prompts)) == serial


def test_a_batch_answers_as_one_by_one(engine: Engine, prompts: Prompts):
    serial = [list(engine.generate(prompt, greedy())) for prompt in prompts]
    answers = engine.generate_batch(prompts, greedy())
    assert answers == serial
    assert {type(id_) for answer in answers for id_ in answer} == {int}


def test_tokens_come_while_the_answer_is_written(engine: Engine):
    started, times = time.monotonic(), []
    for _ in engine.generate([700, 701], Sampling(max_new_tokens=300, temperature=2.0, top_p=1.0, seed=1)):
        times.append(time.monotonic() - started)
    assert len(times) > 30
    assert times[0] < times[-1] / 4


def test_closing_the_generator_frees_its_slot(engine: Engine):
    """All slots are taken by long answers; left after their first token, they make room at once."""
    running = [engine.generate([700 + n], greedy(LONG)) for n in range(engine.slots)]
    for tokens in running:
        next(tokens)
    for tokens in running:
        tokens.close()
    started = time.monotonic()
    assert len(list(engine.generate([900, 901], greedy(3)))) == 3
    assert time.monotonic() - started < 2
    wait_for_rest(engine)


def test_cancelling_ends_an_answer_that_waits_for_its_turn(engine: Engine):
    running = [engine.generate([700 + n], greedy(LONG)) for n in range(engine.slots)]
    for tokens in running:
        next(tokens)
    cancelled = threading.Event()
    threading.Timer(0.2, cancelled.set).start()
    started = time.monotonic()
    list(engine.generate([900, 901], greedy(LONG), cancelled=cancelled))
    assert time.monotonic() - started < 1
    for tokens in running:
        tokens.close()
    wait_for_rest(engine)


def test_a_prompt_that_fills_the_window_is_refused_with_both_numbers(engine: Engine):
    with pytest.raises(UserError, match=rf"{engine.window} tokens.* {engine.window}"):
        next(engine.generate([500] * engine.window, greedy()))


def test_an_answer_ends_at_the_window(engine: Engine):
    prompt = [500, 600, 700] * (engine.window // 3)
    room = engine.window - len(prompt)
    assert len(list(engine.generate(prompt, greedy(), None))) == room
    assert room < ANSWER


def test_a_seed_repeats_an_answer(engine: Engine, prompts: Prompts):
    first, same, other = (drawn(engine, prompts[3], seed=seed) for seed in (5, 5, 6))
    assert first == same != other
    assert drawn(engine, prompts[3]) != drawn(engine, prompts[3])


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**63 - 1])
def test_any_integer_is_a_seed(engine: Engine, prompts: Prompts, seed: int):
    assert drawn(engine, prompts[3], seed=seed) == drawn(engine, prompts[3], seed=seed)


def test_a_seeded_answer_is_the_same_among_others(engine: Engine, prompts: Prompts):
    alone = drawn(engine, prompts[3], seed=5)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: drawn(engine, prompts[3], seed=5), range(8))) == [alone] * 8


def test_top_k_of_one_is_greedy(engine: Engine, prompts: Prompts):
    assert drawn(engine, prompts[5], top_k=1) == list(engine.generate(prompts[5], greedy()))
    assert drawn(engine, prompts[5], top_p=1e-6) == list(engine.generate(prompts[5], greedy()))


@pytest.mark.parametrize(
    "penalty", [{"repetition_penalty": 1.3}, {"frequency_penalty": 0.4}, {"presence_penalty": -0.4}], ids=str
)
def test_penalties_work_as_with_transformers(
    engine: Engine, reference: TransformersEngine, prompts: Prompts, penalty: dict[str, float]
):
    asked = greedy(ANSWER, **penalty)
    answers = [list(engine.generate(prompt, asked)) for prompt in prompts[:10]]
    assert answers == [list(reference.generate(prompt, asked)) for prompt in prompts[:10]]
    assert answers != [list(engine.generate(prompt, greedy())) for prompt in prompts[:10]]


def test_log_probabilities_are_the_models_own(engine: Engine, reference: TransformersEngine, prompts: Prompts):
    """Neither temperature nor penalties nor top_p are in them."""
    choice = {"temperature": 0, "frequency_penalty": 0.4, "top_p": 0.3, "top_logprobs": 5, "max_new_tokens": ANSWER}
    ours = list(engine.generate(prompts[4], Sampling(**choice)))
    theirs = list(reference.generate(prompts[4], Sampling(**choice)))
    assert ours == theirs
    assert [token.logprob for token in ours] == pytest.approx([token.logprob for token in theirs], abs=1e-4)
    for mine, other in zip(ours, theirs, strict=True):
        assert len(mine.top) == 5
        assert [id_ for id_, _ in mine.top] == [id_ for id_, _ in other.top]
        assert [value for _, value in mine.top] == pytest.approx([value for _, value in other.top], abs=1e-4)


@pytest.mark.parametrize(("asked", "told"), [(None, None), (0, 0), (1, 1), (20, 20)])
def test_as_many_log_probabilities_come_as_were_asked_for(engine: Engine, asked: int | None, told: int | None):
    for token in engine.generate([700, 701], Sampling(max_new_tokens=8, temperature=2.0, top_logprobs=asked)):
        assert isinstance(token, Token)
        assert (token.logprob is None) == (told is None)
        assert len(token.top) == (told or 0)


def test_an_adapter_changes_the_answer_as_peft_does(engine: Engine, toy: Path, lora: Path, prompts: Prompts):
    """The adapter has all linear layers, the fused feed-forward one too."""
    answers = [list(engine.generate(prompt, greedy(), "tuned")) for prompt in prompts]
    assert answers == reference_answers(toy, prompts, lora)
    plain = [list(engine.generate(prompt, greedy())) for prompt in prompts]
    assert all(tuned != own for tuned, own in zip(answers, plain, strict=True))


def test_adapter_and_model_answer_in_one_batch(engine: Engine, prompts: Prompts):
    asked = [(prompt, adapter) for prompt in prompts[:6] for adapter in (None, "tuned")]
    serial = [list(engine.generate(prompt, greedy(), adapter)) for prompt, adapter in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        assert list(pool.map(lambda pair: list(engine.generate(pair[0], greedy(), pair[1])), asked)) == serial


def test_an_answer_can_be_held_to_a_json_schema(engine: Engine):
    schema = {
        "type": "object",
        "properties": {"color": {"enum": ["红色", "blue"]}, "fits": {"type": "boolean"}},
        "required": ["color", "fits"],
        "additionalProperties": False,
    }
    answer = json.loads(decode(engine.generate([700, 701], greedy(200, json_schema=schema)), engine.tokenizer))
    assert set(answer) == {"color", "fits"}
    assert answer["color"] in ("红色", "blue")


def test_an_empty_schema_asks_for_any_object(engine: Engine):
    text = decode(engine.generate([700, 701], greedy(30, json_schema={})), engine.tokenizer)
    assert text.lstrip().startswith("{")


def test_a_schema_that_is_none_is_refused(engine: Engine):
    with pytest.raises(UserError, match="schema"):
        list(engine.generate([700, 701], greedy(30, json_schema={"type": "nothing"})))
    assert engine.broken is None


def test_ids_beyond_the_vocabulary_are_refused(engine: Engine):
    with pytest.raises(UserError, match="vocabulary"):
        list(engine.generate([10**6], greedy()))
    with pytest.raises(UserError, match="vocabulary"):
        engine.generate_batch([[700], [10**6]], greedy())
    assert engine.broken is None


def test_an_empty_prompt_is_refused(engine: Engine):
    with pytest.raises(UserError):
        list(engine.generate([], greedy()))


def test_vllm_knows_the_name_of_its_eight_bits():
    from vllm.config.quantization import ONLINE_QUANT_SHORTHAND_NAMES

    assert EIGHT_BITS in ONLINE_QUANT_SHORTHAND_NAMES


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_in_eight_bits_most_answers_begin_as_in_sixteen(engine: Engine, toy: Path, prompts: Prompts):
    smaller = VllmEngine.load(toy, {}, 4, load_in="8bit")
    pairs = [(next(engine.generate(prompt, greedy())), next(smaller.generate(prompt, greedy()))) for prompt in prompts]
    smaller.close()
    assert sum(one == other for one, other in pairs) > len(prompts) / 2
