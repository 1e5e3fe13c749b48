"""Training encodes a conversation to the same ids that the API sends to the engine for the same messages."""

import json
from pathlib import Path

import pytest
from asgi import send

from entrypoints.api.openai_schema import ChatMessage
from entrypoints.chat_format.openai_messages import IGNORED_FIELDS
from entrypoints.chat_format.prompt import IGNORE_INDEX, PromptFormat
from entrypoints.dataset.columns import Columns
from entrypoints.dataset.reader import examples, parse_rows
from entrypoints.training.rows.collation import RowEncoder

GUIDE = Path(__file__).parents[3] / "entrypoints" / "dataset"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "default": None}}, "required": ["city"]}
WEATHER = {
    "type": "function",
    "function": {"strict": True, "parameters": SCHEMA, "description": "天气", "name": "get_weather"},
}
CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "北京"}'}}
QUESTION = {"role": "user", "content": [{"type": "text", "text": "say 好"}], "name": "li"}
CALLED = [
    QUESTION,
    {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None, "audio": None},
    {"role": "tool", "tool_call_id": "c1", "content": "31度"},
]
ANSWER = {"role": "assistant", "content": "北京31度。"}


def training_ids(row, tokenizer):
    """Ids and labels of one row, from the reader and the encoder of a training run."""
    rows = parse_rows(json.dumps(row).encode(), Path("turns.jsonl"))
    used, _ = examples(rows, Columns(conversations="messages"))
    encoder = RowEncoder(tokenizer, PromptFormat(), 2000, 2000)
    encoded = encoder({"history": [], "prompt": "", "response": "", "turns": used[0].turns})
    return encoded["input_ids"], encoded["labels"]


@pytest.mark.parametrize("tools", [{}, {"tools": None}, {"tools": [WEATHER]}])
@pytest.mark.parametrize(
    "messages",
    [
        [QUESTION],
        CALLED,
        [{"role": "developer", "content": "简短回答"}, *CALLED],
        [{"role": "system", "content": "简短回答"}, *CALLED, ANSWER, QUESTION],
        [{**CALLED[1], "content": "稍等", "tool_calls": [CALL, CALL]}, *CALLED],
    ],
)
def test_a_row_has_the_ids_that_the_api_sends_to_the_engine(messages, tools, app, engine):
    assert send(app, "POST", "/v1/chat/completions", {"messages": messages, **tools}).status == 200
    prompt = engine.prompts[-1]
    ids, labels = training_ids({"messages": [*messages, ANSWER], **tools}, engine.tokenizer)
    assert ids[: len(prompt)] == prompt
    target = [*engine.tokenizer.encode("\n"), *engine.tokenizer.encode(ANSWER["content"]), engine.tokenizer.eos_id]
    assert ids[len(prompt) :] == labels[len(prompt) :] == target


def test_a_tool_call_is_a_training_target(app, engine):
    """Its ids are those of the same call in the history of a later request."""
    send(app, "POST", "/v1/chat/completions", {"messages": CALLED, "tools": [WEATHER]})
    ids, labels = training_ids({"messages": CALLED[:2], "tools": [WEATHER]}, engine.tokenizer)
    assert ids[:-1] == engine.prompts[-1][: len(ids) - 1]
    assert [label for label in labels if label != IGNORE_INDEX][-1] == engine.tokenizer.eos_id


@pytest.mark.parametrize("tool", [WEATHER, WEATHER["function"]])
def test_chatglm3s_format_has_the_same_ids(tool, engine):
    call = {"role": "assistant", "metadata": "get_weather", "content": "```python\ntool_call(city='北京')\n```"}
    own = [{"role": "system", "content": "查", "tools": [tool]}, {"role": "user", "content": "say 好"}, call]
    own += [{"role": "observation", "content": "31度"}, ANSWER]
    messages = [{"role": "system", "content": "查"}, *CALLED, ANSWER]
    assert training_ids({"messages": own}, engine.tokenizer) == training_ids(
        {"messages": messages, "tools": [WEATHER]}, engine.tokenizer
    )


def test_every_message_field_of_the_api_is_accepted_in_a_row():
    used = {"role", "content", "metadata", "tool_calls"}
    assert set(ChatMessage.model_fields) | ChatMessage.labels == {*used, *IGNORED_FIELDS}


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_examples_of_the_data_guide_are_valid_rows(name, engine):
    text = (GUIDE / name).read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith('{"messages": ') and '"tools": ' in line]
    assert len(rows) == 2, "OpenAI's format and ChatGLM3's"
    names = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
    for row in rows:
        ids, _ = training_ids(json.loads(row), engine.tokenizer)
        assert [ids.count(engine.tokenizer.special_token_id(name)) for name in names] == [1, 1, 2, 1]
