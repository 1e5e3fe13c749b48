import math

import pytest
from pydantic import ValidationError

from entrypoints.api.openai_schema import ChatRequest, CompletionRequest, TokenizeRequest
from entrypoints.api.tools import to_turns
from entrypoints.sampling import Sampling

HELLO = [{"role": "user", "content": "你好"}]


def chat(**fields):
    return ChatRequest.model_validate({"messages": HELLO, **fields})


def problem(model, body):
    """(place, kind) of the first problem."""
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    first = caught.value.errors()[0]
    return first["loc"], first["type"]


def test_absent_and_null_fields_take_the_defaults_of_sampling():
    names = [name for name in ChatRequest.model_fields if name != "messages"]
    assert len(names) >= 24
    assert chat().chat_sampling() == chat(**dict.fromkeys(names)).chat_sampling() == Sampling()


def test_zero_is_a_temperature_and_not_a_missing_one():
    assert chat(temperature=0).chat_sampling().temperature == 0
    assert chat(temperature=1e-30).chat_sampling().greedy, "divided by it, scores would leave the range of floats"
    assert not chat(temperature=0.01).chat_sampling().greedy


def test_every_field_reaches_the_engine():
    sampling = chat(
        temperature=0.3, top_p=0.4, top_k=5, repetition_penalty=1.1, frequency_penalty=0.2, presence_penalty=-0.3,
        seed=7, max_completion_tokens=9, logprobs=True, top_logprobs=3, response_format={"type": "json_object"},
    ).chat_sampling()  # fmt: skip
    assert sampling == Sampling(9, 0.3, 0.4, 5, 1.1, 0.2, -0.3, 7, 3, {})


def test_max_completion_tokens_beats_the_older_max_tokens():
    assert chat(max_tokens=3).chat_sampling().max_new_tokens == 3
    assert chat(max_tokens=3, max_completion_tokens=4).chat_sampling().max_new_tokens == 4


@pytest.mark.parametrize(("stop", "stops"), [(None, []), ("a", ["a"]), (["a", "b"], ["a", "b"]), ([], [])])
def test_stop_is_one_string_or_a_list(stop, stops):
    assert chat(stop=stop).stops() == stops


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", 2.1), ("temperature", math.nan), ("temperature", math.inf),
        ("temperature", "warm"), ("top_p", 0), ("top_p", 1.1), ("top_k", 0), ("max_tokens", 0), ("max_tokens", -1),
        ("max_completion_tokens", 0), ("n", 0), ("n", 9), ("seed", 2**64), ("seed", 0.5), ("frequency_penalty", 2.1),
        ("presence_penalty", -2.1), ("repetition_penalty", 0), ("repetition_penalty", 1e-9), ("stop", ""),
        ("stop", ["a"] * 17), ("stop", "x" * 257), ("top_logprobs", 21), ("tool_choice", "maybe"), ("tools", {}),
        ("stream", "perhaps"), ("response_format", {"type": "xml"}), ("logit_bias", {"5": 1}), ("functions", []),
    ],
)  # fmt: skip
def test_a_value_out_of_bounds_is_refused_by_name(field, value):
    place, _ = problem(ChatRequest, {"messages": HELLO, "logprobs": True, field: value})
    assert place[0] == field


def test_a_field_that_would_change_the_answer_unseen_is_refused():
    assert problem(ChatRequest, {"messages": HELLO, "grammar": "x"}) == (("grammar",), "extra_forbidden")
    assert problem(CompletionRequest, {"prompt": "x", "suffix": "y"}) == (("suffix",), "extra_forbidden")
    assert problem(CompletionRequest, {"prompt": "x", "echo": True})[0] == ("echo",)
    assert problem(CompletionRequest, {"prompt": "x", "best_of": 2})[0] == ("best_of",)


def test_fields_that_only_label_a_request_are_accepted():
    chat(user="u", metadata={"a": "b"}, store=False, service_tier="auto", safety_identifier="s", prompt_cache_key="k")


def test_top_logprobs_without_logprobs_is_refused():
    with pytest.raises(ValidationError, match="top_logprobs needs logprobs"):
        chat(top_logprobs=2)
    assert chat(logprobs=True).chat_sampling().top_logprobs == 0
    assert chat(logprobs=False).chat_sampling().top_logprobs is None


def test_a_json_schema_format_needs_its_schema():
    with pytest.raises(ValidationError, match="json_schema is missing"):
        chat(response_format={"type": "json_schema"})
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    named = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    assert chat(response_format=named).chat_sampling().json_schema == schema
    assert chat(response_format={"type": "text"}).chat_sampling().json_schema is None


@pytest.mark.parametrize(
    ("turn", "words"),
    [
        ({"role": "user"}, "content is null"),
        ({"role": "user", "content": None}, "content is null"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "content is null"),
        ({"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]}, "cannot have tool_calls"),
        ({"role": "root", "content": "x"}, "Input should be 'system'"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "'text'"),
        ({"role": "user", "content": "x", "colour": "red"}, "Extra inputs"),
        ({"role": "assistant", "content": "x", "function_call": {"name": "f", "arguments": "{}"}}, "should be None"),
        (["user", "x"], "valid dictionary"),
        ("x", "valid dictionary"),
    ],
)
def test_a_turn_that_is_not_understood_is_refused_with_its_index(turn, words):
    with pytest.raises(ValidationError, match=words) as caught:
        ChatRequest.model_validate({"messages": [*HELLO, turn]})
    assert caught.value.errors()[0]["loc"][:2] == ("messages", 1)


@pytest.mark.parametrize("history", [[["你好", "您好"]], [["你好", "您好"], {"role": "user", "content": "x"}]])
def test_pairs_of_chatglm2_are_no_part_of_the_api(history):
    """A4."""
    assert problem(ChatRequest, {"messages": history})[0] == ("messages", 0)


def test_the_answer_of_openais_client_may_be_sent_back_as_it_is():
    """D6: model_dump() of the client's message holds every field it knows, most of them null."""
    from openai.types.chat import ChatCompletionMessage

    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    message = ChatCompletionMessage.model_validate({"role": "assistant", "content": None, "tool_calls": [call]})
    chat(messages=[*HELLO, message.model_dump(), {"role": "tool", "tool_call_id": "c", "content": "1"}])
    chat(messages=[*HELLO, message.model_dump(exclude_unset=True), {"role": "tool", "content": "1"}])


def test_content_in_parts_is_one_text():
    parts = [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]
    assert to_turns(chat(messages=[{"role": "user", "content": parts}]).messages, [])[0].content == "你好"


def test_the_count_of_messages_is_bounded():
    assert problem(ChatRequest, {"messages": []}) == (("messages",), "too_short")
    assert problem(ChatRequest, {"messages": HELLO * 2049}) == (("messages",), "too_long")


def test_tokenize_takes_messages_or_a_prompt():
    for body in ({}, {"messages": HELLO, "prompt": "x"}):
        with pytest.raises(ValidationError, match="either messages or prompt"):
            TokenizeRequest.model_validate(body)
