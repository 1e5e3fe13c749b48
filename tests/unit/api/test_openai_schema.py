import math

import pytest
from pydantic import ValidationError

from entrypoints.api.openai_schema import ChatRequest, CompletionRequest, TokenizeRequest
from entrypoints.api.tools import to_prompt_messages
from entrypoints.chat_format.sampling import Sampling

HELLO = [{"role": "user", "content": "你好"}]


def chat(**fields):
    return ChatRequest.model_validate({"messages": HELLO, **fields})


def problem(model, body):
    """Location and type of the first problem."""
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    first = caught.value.errors()[0]
    return first["loc"], first["type"]


def test_absent_and_null_fields_have_the_defaults_of_sampling():
    names = [name for name in ChatRequest.model_fields if name != "messages"]
    assert len(names) >= 24
    assert chat().sampling() == chat(**dict.fromkeys(names)).sampling() == Sampling()


def test_temperature_zero_is_not_treated_as_missing():
    assert chat(temperature=0).sampling().temperature == 0
    assert chat(temperature=1e-30).sampling().greedy, "dividing logits by it would overflow"
    assert not chat(temperature=0.01).sampling().greedy


def test_a_top_p_of_zero_is_greedy_as_many_clients_send_it_with_temperature_zero():
    for temperature in (None, 0, 1):
        assert chat(temperature=temperature, top_p=0).sampling().greedy
    assert CompletionRequest(prompt="x", top_p=0).sampling().greedy


def test_every_field_reaches_the_engine():
    sampling = chat(
        temperature=0.3, top_p=0.4, top_k=5, repetition_penalty=1.1, frequency_penalty=0.2, presence_penalty=-0.3,
        seed=7, max_completion_tokens=9, logprobs=True, top_logprobs=3, response_format={"type": "json_object"},
    ).sampling()  # fmt: skip
    assert sampling == Sampling(9, 0.3, 0.4, 5, 1.1, 0.2, -0.3, 7, 3, {})


def test_max_completion_tokens_overrides_max_tokens():
    assert chat(max_tokens=3).sampling().max_new_tokens == 3
    assert chat(max_tokens=3, max_completion_tokens=4).sampling().max_new_tokens == 4


@pytest.mark.parametrize(("stop", "stops"), [(None, []), ("a", ["a"]), (["a", "b"], ["a", "b"]), ([], [])])
def test_stop_is_one_string_or_a_list(stop, stops):
    assert chat(stop=stop).stop_strings() == stops


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", 2.1), ("temperature", math.nan), ("temperature", math.inf),
        ("temperature", "warm"), ("top_p", -0.1), ("top_p", 1.1), ("top_k", -2), ("max_tokens", 0), ("max_tokens", -1),
        ("max_completion_tokens", 0), ("n", 0), ("n", 9), ("seed", 2**64), ("seed", 0.5), ("frequency_penalty", 2.1),
        ("presence_penalty", -2.1), ("repetition_penalty", 0), ("repetition_penalty", 1e-9), ("stop", 5),
        ("stop", ["a"] * 17), ("stop", "x" * 257), ("top_logprobs", 21), ("tool_choice", "maybe"), ("tools", {}),
        ("stream", "perhaps"), ("response_format", {"type": "xml"}), ("logit_bias", {"5": 1}), ("functions", [{}]),
    ],
)  # fmt: skip
def test_a_value_out_of_bounds_is_rejected_with_its_field(field, value):
    location, _ = problem(ChatRequest, {"messages": HELLO, "logprobs": True, field: value})
    assert location[0] == field


def test_an_unsupported_field_that_would_change_the_answer_is_rejected():
    assert problem(ChatRequest, {"messages": HELLO, "grammar": "x"}) == (("grammar",), "extra_forbidden")
    assert problem(CompletionRequest, {"prompt": "x", "suffix": "y"}) == (("suffix",), "extra_forbidden")
    assert problem(CompletionRequest, {"prompt": "x", "echo": 1})[0] == ("echo",)
    assert problem(CompletionRequest, {"prompt": "x", "max_tokens": 0})[1] == "value_error"
    assert problem(CompletionRequest, {"prompt": "x", "best_of": 2})[0] == ("best_of",)


@pytest.mark.parametrize(
    "fields",
    [
        {"functions": None, "logit_bias": {}, "stop_token_ids": [], "suffix": "", "anything_else": None},
        {"min_p": 0, "best_of": 1, "modalities": ["text"], "reasoning_effort": "none", "function_call": "auto"},
        {"ignore_eos": False, "unknown_switch": False, "skip_special_tokens": True, "do_sample": True},
        {"request_id": "r-1", "prompt_cache_retention": "24h", "stream_options": {"include_obfuscation": True}},
        {"drop_params": True, "thinking": {"type": "disabled"}},
        {"enable_thinking": False, "chat_template_kwargs": {"enable_thinking": False, "thinking": False}},
        {"top_k": -1}, {"top_k": 0}, {"top_logprobs": 0}, {"max_tokens": 8.0, "temperature": 1},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": None, "strict": None}}},
    ],
)  # fmt: skip
def test_a_field_that_changes_nothing_passes(fields):
    given, plain = chat(**fields), chat(**{name: fields[name] for name in fields if name == "response_format"})
    assert given.sampling() in (plain.sampling(), Sampling(max_new_tokens=8, temperature=1))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("do_sample", False), ("skip_special_tokens", False), ("min_p", 0.1), ("best_of", 2), ("best_of", True),
        ("modalities", ["audio"]), ("reasoning_effort", "high"), ("unknown_switch", True), ("unknown_number", 0),
        ("max_tokens", True), ("max_tokens", "8"), ("temperature", "0.5"), ("n", True), ("stream", 1),
        ("stream", "true"), ("logprobs", "yes"), ("stream_options", {"continuous_usage_stats": True}),
        ("response_format", {"type": "json_object", "schema": {"type": "object"}}),
        ("thinking", {"type": "enabled"}), ("chat_template_kwargs", {"enable_thinking": True}),
    ],
)  # fmt: skip
def test_a_field_that_would_change_the_answer_is_named(field, value):
    location, _ = problem(ChatRequest, {"messages": HELLO, field: value})
    assert location[0] == field


def test_labels_of_an_earlier_answer_have_no_effect():
    labels = {
        "provider_specific_fields": {"a": 1}, "reasoning_content": "hm", "id": "msg_1", "type": "message",
        "refusal": None, "annotations": [], "audio": None, "function_call": None, "label_of_another_server": 5,
    }  # fmt: skip
    for answer in ({"role": "assistant", "content": "a"}, {"role": "assistant", "content": None}):
        with_labels = chat(messages=[*HELLO, {**answer, **labels}, *HELLO])
        assert with_labels == chat(messages=[*HELLO, answer, *HELLO])


def test_fields_that_only_label_a_request_are_accepted():
    chat(user="u", metadata={"a": "b"}, store=False, service_tier="auto", safety_identifier="s", prompt_cache_key="k")


def test_top_logprobs_requires_logprobs():
    with pytest.raises(ValidationError, match="top_logprobs requires logprobs"):
        chat(top_logprobs=2)
    assert chat(logprobs=True).sampling().top_logprobs == 0
    assert chat(logprobs=False).sampling().top_logprobs is None


def test_the_json_schema_format_requires_a_schema():
    with pytest.raises(ValidationError, match="json_schema is missing"):
        chat(response_format={"type": "json_schema"})
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    named = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    assert chat(response_format=named).sampling().json_schema == schema
    assert chat(response_format={"type": "text"}).sampling().json_schema is None


@pytest.mark.parametrize(
    ("message", "problem_text"),
    [
        ({"role": "user"}, "content of a user message is null"),
        ({"role": "user", "content": None}, "content of a user message is null"),
        ({"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]}, "cannot have tool_calls"),
        ({"role": "root", "content": "x"}, "Input should be 'system'"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "'text'"),
        ({"role": "user", "content": "x", "color": "red"}, "Extra inputs"),
        ({"role": "assistant", "content": "x", "function_call": {"name": "f", "arguments": "{}"}}, "Extra inputs"),
        ({"role": "assistant", "content": "x", "audio": {"id": "a"}}, "Extra inputs"),
        ({"role": "user", "content": "x", "images": ["aGk="]}, "Extra inputs"),
        (["user", "x"], "valid dictionary"),
        ("x", "valid dictionary"),
    ],
)
def test_an_invalid_message_is_rejected_with_its_index(message, problem_text):
    with pytest.raises(ValidationError, match=problem_text) as caught:
        ChatRequest.model_validate({"messages": [*HELLO, message]})
    assert caught.value.errors()[0]["loc"][:2] == ("messages", 1)


@pytest.mark.parametrize("history", [[["你好", "您好"]], [["你好", "您好"], {"role": "user", "content": "x"}]])
def test_chatglm2_history_pairs_are_rejected(history):
    """Pairs of question and answer, the history of ChatGLM2, must not be read as messages in silence."""
    assert problem(ChatRequest, {"messages": history})[0] == ("messages", 0)


def test_a_message_returned_by_openais_client_is_accepted_as_history():
    """model_dump() of the client's message contains every field it knows, most of them null."""
    from openai.types.chat import ChatCompletionMessage

    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    message = ChatCompletionMessage.model_validate({"role": "assistant", "content": None, "tool_calls": [call]})
    chat(messages=[*HELLO, message.model_dump(), {"role": "tool", "tool_call_id": "c", "content": "1"}])
    chat(messages=[*HELLO, message.model_dump(exclude_unset=True), {"role": "tool", "content": "1"}])


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]
    assert to_prompt_messages(chat(messages=[{"role": "user", "content": parts}]).messages, [])[0].content == "你好"


def test_the_number_of_messages_is_limited():
    assert problem(ChatRequest, {"messages": []}) == (("messages",), "too_short")
    assert problem(ChatRequest, {"messages": HELLO * 2049}) == (("messages",), "too_long")


def test_tokenize_takes_messages_or_a_prompt():
    for body in ({}, {"messages": HELLO, "prompt": "x"}):
        with pytest.raises(ValidationError, match="either messages or prompt"):
            TokenizeRequest.model_validate(body)
