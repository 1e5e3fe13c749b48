"""The vLLM engine compared with transformers on the same checkpoint, on the CPU."""

import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from reference import ANSWER_TOKENS, greedy, reference_answers

from entrypoints.chat_format.answer_parser import decode
from entrypoints.chat_format.sampling import Sampling
from entrypoints.engines.base import Engine, Token
from entrypoints.engines.options import EngineOptions
from entrypoints.engines.transformers.engine import TransformersEngine
from entrypoints.engines.vllm.engine import VllmEngine
from entrypoints.engines.vllm.gpu_settings import ONLINE_QUANTIZATION
from entrypoints.errors import UserError

LONG = 900  # tokens of an answer that is cancelled while it runs
Prompts = list[list[int]]


def unfinished(engine: Engine) -> int:
    return engine._llm.get_num_unfinished_requests()


def wait_until_idle(engine: Engine, seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while unfinished(engine) and time.monotonic() < end:
        time.sleep(0.01)
    assert unfinished(engine) == 0


def sampled(engine: Engine, prompt: Sequence[int], **sampling: object) -> list[int]:
    return list(engine.generate(prompt, Sampling(**{"max_new_tokens": ANSWER_TOKENS, "temperature": 1.0} | sampling)))


def test_greedy_answers_are_those_of_transformers(engine: Engine, toy: Path, prompts: Prompts):
    answers = [list(engine.generate(prompt, greedy())) for prompt in prompts]
    assert len(answers) == 20
    assert answers == reference_answers(toy, prompts)


def test_a_stop_id_ends_the_answer_and_is_not_part_of_it(engine: Engine, prompts: Prompts):
    answers = [list(engine.generate(prompt, greedy())) for prompt in prompts]
    ended = [answer for answer in answers if len(answer) < ANSWER_TOKENS]
    assert ended, "the model is built so that some answers end"
    assert not set(engine.tokenizer.stop_ids) & {id_ for answer in answers for id_ in answer}


def test_concurrent_answers_equal_sequential_ones(engine: Engine, prompts: Prompts):
    serial = [list(engine.generate(prompt, greedy())) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:  # more than slots
        assert list(pool.map(lambda prompt: list(engine.generate(prompt, greedy())), prompts)) == serial


def test_a_batch_gives_the_same_answers_as_one_by_one(engine: Engine, prompts: Prompts):
    serial = [list(engine.generate(prompt, greedy())) for prompt in prompts]
    answers = engine.generate_batch(prompts, greedy())
    assert answers == serial
    assert {type(id_) for answer in answers for id_ in answer} == {int}


def test_tokens_are_streamed_while_the_answer_is_generated(engine: Engine):
    started, times = time.monotonic(), []
    for _ in engine.generate([700, 701], Sampling(max_new_tokens=300, temperature=2.0, top_p=1.0, seed=1)):
        times.append(time.monotonic() - started)
    assert len(times) > 30
    assert times[0] < times[-1] / 4


def test_closing_the_generator_frees_its_slot(engine: Engine):
    """Long answers in all slots are closed after their first token; the next answer must not wait."""
    running = [engine.generate([700 + n], greedy(LONG)) for n in range(engine.slots)]
    for tokens in running:
        next(tokens)
    for tokens in running:
        tokens.close()
    started = time.monotonic()
    assert len(list(engine.generate([900, 901], greedy(3)))) == 3
    assert time.monotonic() - started < 2
    wait_until_idle(engine)


def test_cancelling_ends_an_answer_that_waits_for_a_slot(engine: Engine):
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
    wait_until_idle(engine)


def test_a_prompt_that_fills_the_context_is_rejected_with_both_numbers(engine: Engine):
    with pytest.raises(UserError, match=rf"{engine.context_length} tokens.* {engine.context_length}"):
        next(engine.generate([500] * engine.context_length, greedy()))


def test_an_answer_ends_at_the_context_length(engine: Engine):
    prompt = [500, 600, 700] * (engine.context_length // 3)
    remaining = engine.context_length - len(prompt)
    assert len(list(engine.generate(prompt, greedy(), None))) == remaining
    assert remaining < ANSWER_TOKENS


def test_a_seed_repeats_an_answer(engine: Engine, prompts: Prompts):
    first, same, other = (sampled(engine, prompts[3], seed=seed) for seed in (5, 5, 6))
    assert first == same != other
    # four equal answers have a probability below 1e-9: the most likely one, empty, has 0.004
    assert len({tuple(sampled(engine, prompts[3])) for _ in range(4)}) > 1


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**63 - 1])
def test_any_integer_is_a_seed(engine: Engine, prompts: Prompts, seed: int):
    assert sampled(engine, prompts[3], seed=seed) == sampled(engine, prompts[3], seed=seed)


def test_a_seeded_answer_is_the_same_among_others(engine: Engine, prompts: Prompts):
    alone = sampled(engine, prompts[3], seed=5)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: sampled(engine, prompts[3], seed=5), range(8))) == [alone] * 8


def test_top_k_of_one_is_greedy(engine: Engine, prompts: Prompts):
    assert sampled(engine, prompts[5], top_k=1) == list(engine.generate(prompts[5], greedy()))
    assert sampled(engine, prompts[5], top_p=1e-6) == list(engine.generate(prompts[5], greedy()))


@pytest.mark.parametrize(
    "penalty", [{"repetition_penalty": 1.3}, {"frequency_penalty": 0.4}, {"presence_penalty": -0.4}], ids=str
)
def test_penalties_work_as_with_transformers(
    engine: Engine, reference: TransformersEngine, prompts: Prompts, penalty: dict[str, float]
):
    sampling = greedy(ANSWER_TOKENS, **penalty)
    answers = [list(engine.generate(prompt, sampling)) for prompt in prompts[:10]]
    assert answers == [list(reference.generate(prompt, sampling)) for prompt in prompts[:10]]
    assert answers != [list(engine.generate(prompt, greedy())) for prompt in prompts[:10]]


def test_log_probabilities_are_those_of_the_model(engine: Engine, reference: TransformersEngine, prompts: Prompts):
    """Without temperature, penalties and top_p."""
    fields = {
        "temperature": 0,
        "frequency_penalty": 0.4,
        "top_p": 0.3,
        "top_logprobs": 5,
        "max_new_tokens": ANSWER_TOKENS,
    }
    tokens = list(engine.generate(prompts[4], Sampling(**fields)))
    expected = list(reference.generate(prompts[4], Sampling(**fields)))
    assert tokens == expected
    assert [token.logprob for token in tokens] == pytest.approx([token.logprob for token in expected], abs=1e-4)
    for token, other in zip(tokens, expected, strict=True):
        assert len(token.top) == 5
        assert [id_ for id_, _ in token.top] == [id_ for id_, _ in other.top]
        assert [value for _, value in token.top] == pytest.approx([value for _, value in other.top], abs=1e-4)


@pytest.mark.parametrize("requested", [None, 0, 1, 20])
def test_the_number_of_log_probabilities_is_the_requested_one(engine: Engine, requested: int | None):
    for token in engine.generate([700, 701], Sampling(max_new_tokens=8, temperature=2.0, top_logprobs=requested)):
        assert isinstance(token, Token)
        assert (token.logprob is None) == (requested is None)
        assert len(token.top) == (requested or 0)


def test_an_adapter_changes_the_answer_as_peft_does(engine: Engine, toy: Path, lora: Path, prompts: Prompts):
    """The adapter covers all linear layers, including the fused one of the MLP."""
    answers = [list(engine.generate(prompt, greedy(), "tuned")) for prompt in prompts]
    assert answers == reference_answers(toy, prompts, lora)
    plain = [list(engine.generate(prompt, greedy())) for prompt in prompts]
    assert all(tuned != base for tuned, base in zip(answers, plain, strict=True))


def test_base_model_and_adapter_answer_in_one_batch(engine: Engine, prompts: Prompts):
    pairs = [(prompt, adapter) for prompt in prompts[:6] for adapter in (None, "tuned")]
    serial = [list(engine.generate(prompt, greedy(), adapter)) for prompt, adapter in pairs]
    with ThreadPoolExecutor(len(pairs)) as pool:
        assert list(pool.map(lambda pair: list(engine.generate(pair[0], greedy(), pair[1])), pairs)) == serial


def test_an_answer_matches_its_json_schema(engine: Engine):
    schema = {
        "type": "object",
        "properties": {"color": {"enum": ["红色", "blue"]}, "fits": {"type": "boolean"}},
        "required": ["color", "fits"],
        "additionalProperties": False,
    }
    answer = json.loads(decode(engine.generate([700, 701], greedy(200, json_schema=schema)), engine.tokenizer))
    assert set(answer) == {"color", "fits"}
    assert answer["color"] in ("红色", "blue")


def test_an_empty_schema_matches_any_object(engine: Engine):
    text = decode(engine.generate([700, 701], greedy(30, json_schema={})), engine.tokenizer)
    assert text.lstrip().startswith("{")


def test_an_invalid_schema_is_rejected(engine: Engine):
    with pytest.raises(UserError, match="schema"):
        list(engine.generate([700, 701], greedy(30, json_schema={"type": "nothing"})))
    assert engine.fatal_error is None


def test_ids_outside_the_vocabulary_are_rejected(engine: Engine):
    with pytest.raises(UserError, match="vocabulary"):
        list(engine.generate([10**6], greedy()))
    with pytest.raises(UserError, match="vocabulary"):
        engine.generate_batch([[700], [10**6]], greedy())
    assert engine.fatal_error is None


def test_an_empty_prompt_is_rejected(engine: Engine):
    with pytest.raises(UserError):
        list(engine.generate([], greedy()))


def test_vllm_supports_the_online_quantization():
    from vllm.config.quantization import ONLINE_QUANT_SHORTHAND_NAMES

    assert set(ONLINE_QUANTIZATION.values()) <= set(ONLINE_QUANT_SHORTHAND_NAMES)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_most_answers_in_8_bits_start_as_in_16_bits(engine: Engine, toy: Path, prompts: Prompts):
    quantized = VllmEngine.load(toy, EngineOptions(slots=4, load_in="8bit"))
    pairs = [
        (next(engine.generate(prompt, greedy())), next(quantized.generate(prompt, greedy()))) for prompt in prompts
    ]
    quantized.close()
    assert sum(one == other for one, other in pairs) > len(prompts) / 2
