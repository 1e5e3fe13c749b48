"""Generation with the tiny model: one stream, or one padded batch."""

import copy
import json
import shutil
import threading
import time

import pytest
import torch
from transformers import GenerationConfig

from entrypoints.chat_format.sampling import Sampling
from entrypoints.engines.options import EngineOptions
from entrypoints.engines.transformers.engine import TransformersEngine
from entrypoints.engines.transformers.logits_processors import check_finite_logits
from entrypoints.errors import UserError
from entrypoints.hardware import placement

GREEDY = Sampling(temperature=0, max_new_tokens=16)
SHORT, LONG = list(range(300, 305)), list(range(400, 423))  # 5 and 23 ids


@pytest.fixture
def passes(toy_engine):
    """The forward passes of the tiny model during the test: the number of input ids of each."""
    counted = []
    hook = toy_engine.model.register_forward_pre_hook(
        lambda module, args, kwargs: counted.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    yield counted
    hook.remove()


def answer(engine, prompt=SHORT, **sampling):
    return list(engine.generate(prompt, Sampling(**{"max_new_tokens": 16, **sampling})))


@pytest.mark.parametrize("temperature", [0, 1e-40])
def test_temperature_zero_is_greedy_and_twice_the_same(temperature, toy_engine):
    """Also a temperature so small that the scaled logits would overflow."""
    found = [answer(toy_engine, temperature=temperature) for _ in range(2)]
    with torch.no_grad():
        most_likely = int(toy_engine.model(input_ids=torch.tensor([SHORT])).logits[0, -1].argmax())
    assert found[0] == found[1]
    assert found[0][0] == most_likely
    assert len(set(found[0])) > 1


def test_the_same_seed_repeats_an_answer_and_another_seed_changes_it(toy_engine):
    found = [answer(toy_engine, temperature=1, top_p=1, seed=seed) for seed in (7, 7, 8)]
    assert found[0] == found[1] != found[2]


def test_answers_without_a_seed_differ(toy_engine):
    """Four equal answers have a probability below 1e-9: the most likely one, empty, has 0.004."""
    assert len({tuple(answer(toy_engine, temperature=2, top_p=1)) for _ in range(4)}) > 1


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize("limit", [{"top_k": 1}, {"top_p": 1e-6}, {"top_p": 0}], ids=str)
def test_one_candidate_is_the_greedy_answer_at_any_temperature(limit, seed, toy_engine):
    """top_k and top_p apply to sampling with and without a seed."""
    assert answer(toy_engine, temperature=2, seed=seed, **limit) == answer(toy_engine, temperature=0)


def test_a_repetition_penalty_keeps_the_answer_from_repeating(toy_engine):
    """Without it, the untrained model repeats ids."""
    plain, penalized = (answer(toy_engine, temperature=0, repetition_penalty=penalty) for penalty in (1.0, 2.0))
    assert len(set(plain)) < len(plain)
    assert len(set(penalized)) == len(penalized)


@pytest.mark.parametrize("length", [1, 2, 7])
def test_max_new_tokens_is_the_number_of_new_tokens(length, toy_engine):
    assert answer(toy_engine, temperature=0, max_new_tokens=length) == answer(toy_engine, temperature=0)[:length]


def test_an_answer_ends_at_the_context_length(toy_engine):
    engine = TransformersEngine(toy_engine.model, toy_engine.tokenizer, toy_engine.prompt_format, context_length=30)
    assert len(answer(engine, LONG, temperature=0, max_new_tokens=5000)) == 30 - 23


def test_a_prompt_over_the_context_length_is_rejected_and_the_next_one_is_answered(toy_engine, passes):
    """Before the model receives a token without a valid position."""
    engine = TransformersEngine(toy_engine.model, toy_engine.tokenizer, toy_engine.prompt_format, context_length=64)
    for prompt in ([300] * 64, [300] * 200):
        with pytest.raises(UserError, match=f"{len(prompt)} tokens, the context length is 64"):
            answer(engine, prompt)
    assert passes == []
    assert answer(engine, temperature=0) == answer(toy_engine, temperature=0)


@pytest.mark.parametrize("stop", range(3))
def test_every_stop_id_ends_the_stream_and_the_batch_and_is_not_returned(stop, scripted, toy_tokenizer):
    """Checkpoints end an answer with </s>, <|user|> or <|observation|>; all three must work."""
    engine = scripted([500, 501, toy_tokenizer.stop_ids[stop], 502])
    prompt = [300, toy_tokenizer.special_token_id("<|assistant|>")]
    assert list(engine.generate(prompt, GREEDY)) == [500, 501]
    assert engine.generate_batch([prompt, [500], [300, 301, *prompt]], GREEDY) == [[500, 501], [501], [500, 501]]


def test_a_batch_gives_the_same_ids_as_one_by_one(toy_engine):
    """5 and 23 tokens, left-padded: padding that is not masked would change the shorter answer."""
    alone = [answer(toy_engine, prompt, temperature=0) for prompt in (SHORT, LONG)]
    assert toy_engine.generate_batch([SHORT, LONG], GREEDY) == alone
    assert alone[0] != alone[1]


def test_ids_are_streamed_while_the_model_generates(toy_engine, passes):
    ids = toy_engine.generate(SHORT, Sampling(temperature=0, max_new_tokens=400))
    next(ids)
    assert len(passes) < 400
    ids.close()


def test_closing_the_stream_stops_the_model(toy_engine, passes):
    """At the next token; the engine is free at once."""
    ids = toy_engine.generate(SHORT, Sampling(temperature=0, max_new_tokens=900))
    next(ids)
    ids.close()
    stopped_after = len(passes)
    time.sleep(0.2)
    assert len(passes) == stopped_after < 900
    assert answer(toy_engine, temperature=0, max_new_tokens=1)


def test_a_stream_that_is_never_read_runs_no_forward_pass(toy_engine, passes):
    toy_engine.generate(SHORT, GREEDY).close()
    assert passes == []


def test_an_error_in_the_models_thread_is_raised_by_the_stream_and_the_next_answer_works(toy_engine):
    def fail(*_):
        raise RuntimeError("out of memory")

    hook = toy_engine.model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        answer(toy_engine)
    hook.remove()
    assert answer(toy_engine, temperature=0, max_new_tokens=1)


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_nan_logits_are_an_error_and_produce_no_text(temperature, toy_engine):
    """The reference implementation replaced them with token 5."""
    model = copy.deepcopy(toy_engine.model)
    with torch.no_grad():
        model.lm_head.weight[700] = torch.nan
    engine = TransformersEngine(model, toy_engine.tokenizer, toy_engine.prompt_format, toy_engine.context_length)
    with pytest.raises(UserError, match="--dtype float32"):
        answer(engine, temperature=temperature)
    with pytest.raises(UserError, match="--dtype float32"):
        engine.generate_batch([SHORT, LONG], Sampling(temperature=temperature))


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_one_invalid_logit_in_one_row_is_an_error(number):
    """float16 overflows to infinity before it becomes NaN."""
    scores = torch.zeros(2, 9)
    scores[1, 3] = -torch.inf  # a masked token is valid
    assert check_finite_logits(torch.zeros(2, 1), scores) is scores
    scores[1, 4] = number
    with pytest.raises(UserError, match="--dtype float32"):
        check_finite_logits(torch.zeros(2, 1), scores)


def test_concurrent_answers_equal_those_of_separate_calls(toy_engine):
    """They are generated one after another, and each has its own random generator."""
    calls = [(SHORT, {"temperature": 0}), (LONG, {"temperature": 0}), (SHORT, {"seed": 1}), (LONG, {"seed": 2})]
    alone = [answer(toy_engine, prompt, **sampling) for prompt, sampling in calls]
    together = [None] * len(calls)

    def ask(number, prompt, sampling):
        together[number] = answer(toy_engine, prompt, **sampling)

    threads = [threading.Thread(target=ask, args=(number, *calls[number])) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_the_generation_config_of_the_folder_is_ignored(toy_native, toy_engine, tmp_path):
    """Fine-tuned folders contain arbitrary settings; every request passes its own."""
    folder = shutil.copytree(toy_native, tmp_path / "native")
    (folder / "manifest.json").unlink()
    settings = {"do_sample": True, "temperature": 0.01, "top_p": 0.01, "top_k": 1, "repetition_penalty": 2.0}
    settings |= {
        "no_repeat_ngram_size": 1,
        "min_new_tokens": 9,
        "max_length": 20,
        "eos_token_id": 2,
        "use_cache": False,
    }
    (folder / "generation_config.json").write_text(json.dumps(settings))
    engine = TransformersEngine.load(folder, EngineOptions(device="cpu", dtype="float32"))
    for sampling in ({"temperature": 0}, {"temperature": 1, "top_p": 1, "seed": 3}):
        assert answer(engine, **sampling) == answer(toy_engine, **sampling)
    torch.manual_seed(0)
    drawn = answer(engine, temperature=1, top_p=1)
    torch.manual_seed(0)
    assert drawn == answer(toy_engine, temperature=1, top_p=1)


def test_the_generation_config_of_a_folder_is_never_read_by_transformers(toy_native, monkeypatch):
    def read(*args, **options):
        raise AssertionError("read")

    monkeypatch.setattr(GenerationConfig, "from_pretrained", read)
    TransformersEngine.load(toy_native, EngineOptions(device="cpu", dtype="float32"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_model_is_loaded_in_the_selected_dtype_and_answers(dtype, toy_native):
    """float16 is used only on request: on the CPU it is slow and overflows."""
    engine = TransformersEngine.load(toy_native, EngineOptions(device="cpu", dtype=dtype))
    assert {parameter.dtype for parameter in engine.model.parameters()} == {getattr(torch, dtype)}
    assert len(answer(engine, temperature=0, max_new_tokens=2)) == 2


def test_insufficient_memory_is_reported_before_anything_is_loaded(toy_native, monkeypatch):
    """Loading would otherwise end in the out-of-memory killer."""
    monkeypatch.setattr(placement, "available_memory", lambda: 1000)
    monkeypatch.setattr("entrypoints.engines.transformers.engine.load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError, match="B of memory"):
        TransformersEngine.load(toy_native, EngineOptions(device="cpu"))


def test_verify_checks_every_file_before_loading(toy_native, tmp_path):
    folder = shutil.copytree(toy_native, tmp_path / "native")
    whole = bytearray((folder / "model.safetensors").read_bytes())
    whole[-1] ^= 1
    (folder / "model.safetensors").write_bytes(whole)
    assert TransformersEngine.load(folder, EngineOptions(device="cpu", dtype="float32")).context_length == 1024
    with pytest.raises(UserError, match="does not match its SHA-256"):
        TransformersEngine.load(folder, EngineOptions(device="cpu", dtype="float32", verify=True))


def test_an_adapter_that_is_not_loaded_is_an_error(toy_engine):
    with pytest.raises(KeyError):
        list(toy_engine.generate(SHORT, GREEDY, adapter="nothing"))
