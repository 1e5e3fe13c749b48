"""One stream or one padded batch on the toy. Trap names (C2 to C6, D1, D7) are those of the list of reported pains."""

import copy
import json
import shutil
import threading
import time

import pytest
import torch

from entrypoints.engines import placement
from entrypoints.engines.logits import refuse_broken_numbers
from entrypoints.engines.transformers_engine import TransformersEngine
from entrypoints.errors import UserError
from entrypoints.sampling import Sampling

GREEDY = Sampling(temperature=0, max_new_tokens=16)
SHORT, LONG = list(range(300, 305)), list(range(400, 423))  # 5 and 23 ids


@pytest.fixture
def passes(toy_engine):
    """The forward passes of the toy while the test runs: the number of ids that each one read."""
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
    """C3; so is one so small that the scores would leave the range of floats."""
    found = [answer(toy_engine, temperature=temperature) for _ in range(2)]
    with torch.no_grad():
        likeliest = int(toy_engine.model(input_ids=torch.tensor([SHORT])).logits[0, -1].argmax())
    assert found[0] == found[1]
    assert found[0][0] == likeliest
    assert len(set(found[0])) > 1


def test_a_seed_gives_the_same_answer_again_and_another_seed_another(toy_engine):
    found = [answer(toy_engine, temperature=1, top_p=1, seed=seed) for seed in (7, 7, 8)]
    assert found[0] == found[1] != found[2]


def test_without_a_seed_each_answer_is_another(toy_engine):
    assert answer(toy_engine, temperature=2, top_p=1) != answer(toy_engine, temperature=2, top_p=1)


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize("only", [{"top_k": 1}, {"top_p": 1e-6}], ids=str)
def test_one_candidate_is_the_greedy_answer_at_any_temperature(only, seed, toy_engine):
    """top_k and top_p reach the choice, drawn with a seed or without."""
    assert answer(toy_engine, temperature=2, seed=seed, **only) == answer(toy_engine, temperature=0)


def test_a_repetition_penalty_keeps_the_answer_from_repeating(toy_engine):
    """Undisturbed, the untrained toy says one id over and over."""
    plain, penalised = (answer(toy_engine, temperature=0, repetition_penalty=penalty) for penalty in (1.0, 2.0))
    assert len(set(plain)) < len(plain)
    assert len(set(penalised)) == len(penalised)


@pytest.mark.parametrize("length", [1, 2, 7])
def test_max_new_tokens_is_the_number_of_new_tokens(length, toy_engine):
    assert answer(toy_engine, temperature=0, max_new_tokens=length) == answer(toy_engine, temperature=0)[:length]


def test_an_answer_ends_where_the_window_does(toy_engine):
    engine = TransformersEngine(toy_engine.model, toy_engine.tokenizer, toy_engine.prompt_format, window=30)
    assert len(answer(engine, LONG, temperature=0, max_new_tokens=5000)) == 30 - 23


def test_a_prompt_over_the_window_is_refused_with_both_numbers_and_the_next_one_answered(toy_engine, passes):
    """C4: before the model sees an id that it has no place for."""
    engine = TransformersEngine(toy_engine.model, toy_engine.tokenizer, toy_engine.prompt_format, window=64)
    for prompt in ([300] * 64, [300] * 200):
        with pytest.raises(UserError, match=f"{len(prompt)} tokens, the window 64"):
            answer(engine, prompt)
    assert passes == []
    assert answer(engine, temperature=0) == answer(toy_engine, temperature=0)


@pytest.mark.parametrize("stop", range(3))
def test_every_stop_id_ends_the_stream_and_the_batch_and_is_not_given(stop, scripted, toy_tokenizer):
    """C2."""
    engine = scripted([500, 501, toy_tokenizer.stop_ids[stop], 502])
    prompt = [300, toy_tokenizer.control("<|assistant|>")]
    assert list(engine.generate(prompt, GREEDY)) == [500, 501]
    assert engine.generate_batch([prompt, [500], [300, 301, *prompt]], GREEDY) == [[500, 501], [501], [500, 501]]


def test_a_batch_gives_the_same_ids_as_one_by_one(toy_engine):
    """C5: 5 and 23 tokens, padded on the left with their mask."""
    alone = [answer(toy_engine, prompt, temperature=0) for prompt in (SHORT, LONG)]
    assert toy_engine.generate_batch([SHORT, LONG], GREEDY) == alone
    assert alone[0] != alone[1]


def test_ids_come_while_the_model_still_works(toy_engine, passes):
    ids = toy_engine.generate(SHORT, Sampling(temperature=0, max_new_tokens=400))
    next(ids)
    assert len(passes) < 400
    ids.close()


def test_closing_the_stream_stops_the_model(toy_engine, passes):
    """D7: at the next token, and the engine is free at once."""
    ids = toy_engine.generate(SHORT, Sampling(temperature=0, max_new_tokens=900))
    next(ids)
    ids.close()
    stopped_after = len(passes)
    time.sleep(0.2)
    assert len(passes) == stopped_after < 900
    assert answer(toy_engine, temperature=0, max_new_tokens=1)


def test_a_stream_that_nobody_read_costs_nothing(toy_engine, passes):
    toy_engine.generate(SHORT, GREEDY).close()
    assert passes == []


def test_an_error_in_the_models_thread_reaches_the_caller_and_the_next_answer_comes(toy_engine):
    def fail(*_):
        raise RuntimeError("out of memory")

    hook = toy_engine.model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        answer(toy_engine)
    hook.remove()
    assert answer(toy_engine, temperature=0, max_new_tokens=1)


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_numbers_that_are_none_are_an_error_and_no_text(temperature, toy_engine):
    """D1: the reference turned them into token 5."""
    model = copy.deepcopy(toy_engine.model)
    with torch.no_grad():
        model.lm_head.weight[700] = torch.nan
    engine = TransformersEngine(model, toy_engine.tokenizer, toy_engine.prompt_format, toy_engine.window)
    with pytest.raises(UserError, match="--dtype float32"):
        answer(engine, temperature=temperature)
    with pytest.raises(UserError, match="--dtype float32"):
        engine.generate_batch([SHORT, LONG], Sampling(temperature=temperature))


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_one_broken_number_of_one_row_is_enough(number):
    """D1: float16 overflows to infinity before it becomes NaN."""
    scores = torch.zeros(2, 9)
    scores[1, 3] = -torch.inf  # that token is forbidden, which is no fault
    assert refuse_broken_numbers(torch.zeros(2, 1), scores) is scores
    scores[1, 4] = number
    with pytest.raises(UserError, match="--dtype float32"):
        refuse_broken_numbers(torch.zeros(2, 1), scores)


def test_answers_that_run_at_the_same_time_are_as_if_alone(toy_engine):
    """D1: one waits for the other; a seed is each answer's own."""
    asked = [(SHORT, {"temperature": 0}), (LONG, {"temperature": 0}), (SHORT, {"seed": 1}), (LONG, {"seed": 2})]
    alone = [answer(toy_engine, prompt, **sampling) for prompt, sampling in asked]
    together = [None] * len(asked)

    def ask(number, prompt, sampling):
        together[number] = answer(toy_engine, prompt, **sampling)

    threads = [threading.Thread(target=ask, args=(number, *asked[number])) for number in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_nothing_is_taken_over_from_the_folders_generation_config(toy_native, toy_engine, tmp_path):
    """Tuned folders bring all sorts of settings; a request says what it wants."""
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
    engine = TransformersEngine.load(folder, device="cpu", dtype="float32")
    for sampling in ({"temperature": 0}, {"temperature": 1, "top_p": 1, "seed": 3}):
        assert answer(engine, **sampling) == answer(toy_engine, **sampling)
    torch.manual_seed(0)
    drawn = answer(engine, temperature=1, top_p=1)
    torch.manual_seed(0)
    assert drawn == answer(toy_engine, temperature=1, top_p=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_model_is_loaded_in_the_chosen_precision_and_answers(dtype, toy_native):
    """C6: float16 only where it was asked for."""
    engine = TransformersEngine.load(toy_native, device="cpu", dtype=dtype)
    assert {parameter.dtype for parameter in engine.model.parameters()} == {getattr(torch, dtype)}
    assert len(answer(engine, temperature=0, max_new_tokens=2)) == 2


def test_too_little_memory_is_told_before_anything_is_loaded(toy_native, monkeypatch):
    """C6."""
    monkeypatch.setattr(placement, "available_memory", lambda: 1000)
    monkeypatch.setattr("entrypoints.engines.transformers_engine.load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError, match="GB of memory"):
        TransformersEngine.load(toy_native, device="cpu")


def test_verify_reads_every_file_before_loading(toy_native, tmp_path):
    folder = shutil.copytree(toy_native, tmp_path / "native")
    whole = bytearray((folder / "model.safetensors").read_bytes())
    whole[-1] ^= 1
    (folder / "model.safetensors").write_bytes(whole)
    assert TransformersEngine.load(folder, device="cpu", dtype="float32").window == 1024
    with pytest.raises(UserError, match="other contents"):
        TransformersEngine.load(folder, device="cpu", dtype="float32", verify=True)


def test_asking_with_an_adapter_that_is_not_loaded_is_an_error(toy_engine):
    with pytest.raises(KeyError):
        list(toy_engine.generate(SHORT, GREEDY, adapter="nothing"))
