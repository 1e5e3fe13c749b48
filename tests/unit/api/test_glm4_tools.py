"""Tool calls of GLM-4 over HTTP: a JSON object after the name, where ChatGLM3 writes Python."""

import json

import pytest
from asgi import send
from gbnf_matcher import matches
from scripted_engine import ScriptedEngine

from entrypoints.chat_format.prompt import PromptFormat
from entrypoints.checkpoint import tiktoken_vocabulary
from entrypoints.checkpoint.tokenizer import Tokenizer, with_special_tokens
from entrypoints.families import GLM4

CHAT = "/v1/chat/completions"
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "天气",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = 'get_weather\n{"city": "北京"}'


@pytest.fixture(scope="module")
def tokenizer():
    """A vocabulary of bytes."""
    backend = tiktoken_vocabulary.from_ranks([bytes([value]) for value in range(256)], "test")
    return Tokenizer(with_special_tokens(backend, GLM4), GLM4)


@pytest.fixture
def engine(tokenizer):
    engine = ScriptedEngine(tokenizer, context_length=8192)
    engine.prompt_format = PromptFormat.of(GLM4)
    return engine


@pytest.fixture
def app(make_app, engine):
    return make_app(engine=engine)


def body(script, **fields):
    return {"messages": [{"role": "user", "content": script}], "tools": [TOOL], **fields}


def shown(ids, tokenizer):
    """Ids as text, with the names of special tokens."""
    names = {tokenizer.special_token_id(name): name.encode() for name in GLM4.special_tokens}
    return b"".join(names.get(id_) or tokenizer.token_bytes(id_) for id_ in ids).decode()


def streamed(app, script):
    """The joined content, the calls and the last finish_reason of a streamed answer."""
    choices = [event["choices"][0] for event in send(app, "POST", CHAT, body(script, stream=True)).events()]
    content = "".join(choice["delta"].get("content") or "" for choice in choices)
    calls = [call for choice in choices for call in choice["delta"].get("tool_calls") or []]
    return content, calls, choices[-1]["finish_reason"]


def test_a_call_is_returned_as_json_arguments_whole_and_streamed(app):
    choice = send(app, "POST", CHAT, body(f"raw {CALL}")).json()["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "北京"}
    content, calls, reason = streamed(app, f"raw {CALL}")
    assert (content, [each["function"] for each in calls], reason) == ("", [call["function"]], "tool_calls")


@pytest.mark.parametrize("text", ["你好", "get_weather\n[1]", 'other\n{"city": "北京"}', 'get_weather\n{"city":'])
def test_anything_else_is_text_whole_and_streamed(text, app):
    choice = send(app, "POST", CHAT, body(f"say {text}")).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")
    assert "tool_calls" not in choice["message"]
    assert streamed(app, f"say {text}") == (text, [], "stop")


def test_the_prompt_offers_the_tools_and_carries_call_and_result_in_glm4s_form(app, engine, tokenizer):
    answered = json.loads(json.dumps(send(app, "POST", CHAT, body(f"raw {CALL}")).json()))["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": answered["tool_calls"][0]["id"], "content": "晴"}
    conversation = {"messages": [{"role": "user", "content": "say 晴天"}, answered, result], "tools": [TOOL]}
    assert send(app, "POST", CHAT, conversation).json()["choices"][0]["message"]["content"] == "晴天"
    prompt = shown(engine.prompts[-1], tokenizer)
    assert prompt.startswith("[gMASK]<sop><|system|>\n你是一个名为 ")
    assert "## get_weather\n\n{\n" in prompt
    assert prompt.endswith(f"<|user|>\nsay 晴天<|assistant|>{CALL}<|observation|>\n晴<|assistant|>")


def test_a_required_call_is_constrained_to_json(app, engine):
    reply = send(app, "POST", CHAT, body(f"raw {CALL}", tool_choice="required"))
    assert reply.json()["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "get_weather"
    grammar = engine.samplings[-1].grammar
    assert matches(grammar, CALL)
    assert not matches(grammar, "get_weather\n```python\ntool_call(city='北京')\n```")
