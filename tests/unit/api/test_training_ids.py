"""F7: a conversation is learnt with the ids that the engine is given when a client sends the same messages."""

import json
from pathlib import Path

import pytest
from asgi import ask

from entrypoints.api.openai_schema import ChatMessage
from entrypoints.dataset.reading import Columns, examples, parse_rows
from entrypoints.openai_turns import LABELS, NULLS
from entrypoints.prompt import IGNORED, PromptFormat
from entrypoints.training.batches import RowEncoder

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


def learnt(row, tokenizer):
    """Ids and labels of one row, through reading and the encoder of a run."""
    rows = parse_rows(json.dumps(row).encode(), Path("turns.jsonl"))
    used, _ = examples(rows, Columns(conversations="messages"))
    encoder = RowEncoder(tokenizer, PromptFormat(), 2000, 2000)
    found = encoder({"history": [], "prompt": "", "response": "", "turns": used[0].turns})
    return found["input_ids"], found["labels"]


@pytest.mark.parametrize("tools", [{}, {"tools": None}, {"tools": [WEATHER]}])
@pytest.mark.parametrize(
    "asked",
    [
        [QUESTION],
        CALLED,
        [{"role": "developer", "content": "简短回答"}, *CALLED],
        [{"role": "system", "content": "简短回答"}, *CALLED, ANSWER, QUESTION],
        [{**CALLED[1], "content": "稍等", "tool_calls": [CALL, CALL]}, *CALLED],
    ],
)
def test_a_row_is_learnt_with_the_ids_that_the_api_sends_to_the_engine(asked, tools, app, engine):
    assert ask(app, "POST", "/v1/chat/completions", {"messages": asked, **tools}).status == 200
    prompt = engine.prompts[-1]
    ids, labels = learnt({"messages": [*asked, ANSWER], **tools}, engine.tokenizer)
    assert ids[: len(prompt)] == prompt
    target = [*engine.tokenizer.encode("\n"), *engine.tokenizer.encode(ANSWER["content"]), engine.tokenizer.eos_id]
    assert ids[len(prompt) :] == labels[len(prompt) :] == target


def test_a_call_is_an_answer_to_learn(app, engine):
    """Its ids are those of the same call in a later request's history."""
    ask(app, "POST", "/v1/chat/completions", {"messages": CALLED, "tools": [WEATHER]})
    ids, labels = learnt({"messages": CALLED[:2], "tools": [WEATHER]}, engine.tokenizer)
    assert ids[:-1] == engine.prompts[-1][: len(ids) - 1]
    assert [label for label in labels if label != IGNORED][-1] == engine.tokenizer.eos_id


@pytest.mark.parametrize("tool", [WEATHER, WEATHER["function"]])
def test_chatglm3s_own_form_has_the_same_ids(tool, engine):
    call = {"role": "assistant", "metadata": "get_weather", "content": "```python\ntool_call(city='北京')\n```"}
    own = [{"role": "system", "content": "查", "tools": [tool]}, {"role": "user", "content": "say 好"}, call]
    own += [{"role": "observation", "content": "31度"}, ANSWER]
    messages = [{"role": "system", "content": "查"}, *CALLED, ANSWER]
    assert learnt({"messages": own}, engine.tokenizer) == learnt(
        {"messages": messages, "tools": [WEATHER]}, engine.tokenizer
    )


def test_every_field_of_a_message_of_the_api_may_stand_in_a_row():
    meant = {"role", "content", "metadata", "tool_calls"}
    assert set(ChatMessage.model_fields) == {*meant, *LABELS, *NULLS}


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_example_of_the_readme_is_a_row_to_learn(name, engine):
    text = (Path(__file__).parents[3] / name).read_text(encoding="utf-8")
    (example,) = [line for line in text.splitlines() if line.startswith('{"messages": ')]
    ids, _ = learnt(json.loads(example), engine.tokenizer)
    names = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
    assert [ids.count(engine.tokenizer.control(name)) for name in names] == [1, 1, 2, 1]
