"""Families other than ChatGLM3: their answers, calls, ends and prompts, with a vocabulary of bytes."""

import json

import pytest

from entrypoints.chat_format.answer_parser import parse_answer
from entrypoints.chat_format.openai_messages import from_openai_messages
from entrypoints.chat_format.prompt import IGNORE_INDEX, Message, PromptFormat
from entrypoints.chat_format.tool_calls import parse_any_call
from entrypoints.chat_format.tool_grammar import tool_call_grammar
from entrypoints.checkpoint import tiktoken_vocabulary
from entrypoints.checkpoint.tokenizer import VOCABULARY_FILE, Tokenizer, convert_vocabulary, with_special_tokens
from entrypoints.engines.transformers.grammar_states import GrammarStates
from entrypoints.errors import UserError
from entrypoints.families import FAMILIES, GLM4

FORMAT = PromptFormat.of(GLM4)
WEATHER = {
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = {"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "北京"}'}}


@pytest.fixture(scope="module")
def codec():
    return Tokenizer(
        with_special_tokens(tiktoken_vocabulary.from_ranks([bytes([value]) for value in range(256)], "test"), GLM4),
        GLM4,
    )


def shown(ids, codec):
    """Ids as text, with the names of special tokens."""
    names = {codec.special_token_id(name): name.encode() for name in GLM4.special_tokens}
    return b"".join(names.get(id_) or codec.token_bytes(id_) for id_ in ids).decode()


def answer_ids(text, codec):
    return codec.encode(text)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("\n你好", "你好"),
        ("你好", "你好"),
        ("\n  indented", "  indented"),  # no dummy prefix to remove
        ("get_weather is a tool", "get_weather is a tool"),
        ("get_weather\nnot JSON", "get_weather\nnot JSON"),
        ("get_weather\n[1]", "get_weather\n[1]"),
        ('other\n{"city": 1}', 'other\n{"city": 1}'),
    ],
)
def test_a_text_of_glm4_is_content(text, content, codec):
    answer = parse_answer(answer_ids(text, codec), codec, ["get_weather"])
    assert (answer.content, answer.tool_calls) == (content, [])


def test_a_call_of_glm4_is_a_name_and_a_json_object(codec):
    answer = parse_answer(answer_ids('get_weather\n{"city": "北京", "days": [1, null]}', codec), codec, ["get_weather"])
    assert answer.content == ""
    assert [(call.name, call.arguments) for call in answer.tool_calls] == [
        ("get_weather", {"city": "北京", "days": [1, None]})
    ]


def test_openai_messages_become_glm4s_turns(codec):
    messages = [
        {"role": "user", "content": "天气"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "a", "content": "31"},
    ]
    text = shown(FORMAT.encode(from_openai_messages(messages, [WEATHER]), codec), codec)
    assert text.startswith("[gMASK]<sop><|system|>\n你是一个名为")
    assert "\n\n## get_weather\n\n" + json.dumps(WEATHER, indent=4) + "\n在调用上述函数时" in text
    assert text.endswith('<|user|>\n天气<|assistant|>get_weather\n{"city": "北京"}<|observation|>\n31<|assistant|>')


@pytest.mark.parametrize(
    ("answer", "end"),
    [
        ([Message("assistant", "31 度")], "<|user|>"),
        ([Message("assistant", '{"city": "x"}', "get_weather")], "<|observation|>"),
    ],
)
def test_training_ends_a_text_and_a_call_with_the_token_that_glm4_was_trained_with(answer, end, codec):
    row = FORMAT.encode_for_training([Message("user", "q"), *answer], codec, 99, 99)
    assert shown(row.ids[-1:], codec) == end
    assert row.labels[-1] in codec.stop_ids
    learned = [label for label in row.labels if label != IGNORE_INDEX]
    assert shown(learned, codec).endswith(answer[0].content + end)


def test_an_answer_before_another_question_ends_with_its_tag(codec):
    turns = [Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")]
    row = FORMAT.encode_for_training(turns, codec, 99, 99)
    assert shown(row.ids, codec) == "[gMASK]<sop><|user|>\na<|assistant|>\nb<|user|>\nc<|assistant|>\nd<|user|>"
    assert shown([label for label in row.labels if label != IGNORE_INDEX], codec) == "\nb<|user|>\nd<|user|>"


def test_rows_of_chatglm2_need_no_role_tags(toy_original):
    family = FAMILIES["chatglm2"]
    codec = Tokenizer(convert_vocabulary(toy_original / VOCABULARY_FILE, family), family)
    row = PromptFormat.of(family).encode_for_training(
        [Message("user", "裙"), Message("assistant", "好")], codec, 99, 99
    )
    start = [codec.special_token_id("[gMASK]"), codec.special_token_id("<sop>")]
    learned = [*codec.encode("好"), codec.eos_id]
    assert row.ids == [*start, *codec.encode("[Round 1]\n\n问：裙\n\n答："), *learned]
    assert [label for label in row.labels if label != IGNORE_INDEX] == learned
    assert codec.stop_ids == (codec.eos_id,)
    assert parse_answer(codec.encode(" 好\n的"), codec).content == " 好\n的"


def test_a_row_with_an_empty_question_or_answer_can_be_encoded(codec):
    """The checks before a run measure such rows."""
    turns = [Message("user", ""), Message("assistant", "b")]
    row = FORMAT.encode_for_training(turns, codec, 99, 99)
    assert shown(row.ids, codec) == "[gMASK]<sop><|assistant|>\nb<|user|>"
    row = FORMAT.encode_for_training([Message("user", "a"), Message("assistant", "")], codec, 99, 99)
    assert shown(row.ids, codec) == "[gMASK]<sop><|user|>\na<|assistant|>\n<|user|>"


def test_a_long_question_is_cut_to_the_tokens_of_glm4s_own_form(codec):
    turns = from_openai_messages([{"role": "user", "content": "q" * 500}], [WEATHER])
    whole = len(FORMAT.encode(turns, codec))
    kept, was_cut = FORMAT.truncate(turns, codec, whole - 100)
    assert was_cut
    assert len(FORMAT.encode(kept, codec)) == whole - 100


@pytest.mark.parametrize("family", ["chatglm2", "codegeex2"])
def test_a_family_without_tools_rejects_them(family, toy_tokenizer):
    turns = from_openai_messages([{"role": "user", "content": "x"}], [WEATHER])
    with pytest.raises(UserError, match="the template `round` has no system turn"):
        PromptFormat.of(FAMILIES[family]).encode(turns, toy_tokenizer)


@pytest.mark.parametrize(
    ("text", "is_call"),
    [
        ('get_weather\n{"city": "北京"}', True),
        ('get_weather\n{"city": "a \\" b"}', True),
        ("get_weather\n{}", False),
        ('get_weather\n{"city": 5}', False),
        ("get_weather\n```python\ntool_call(city='x')\n```", False),
        ('other\n{"city": "x"}', False),
    ],
)
def test_a_required_call_of_glm4_is_json_that_matches_the_parameters(text, is_call):
    states = GrammarStates(tool_call_grammar({"get_weather": WEATHER["parameters"]}, GLM4))
    state = states.advance(states.start(), text.encode())
    assert bool(state is not None and state.accepts) == is_call
    if is_call:
        name, _, body = text.partition("\n")
        assert parse_any_call(name, body).arguments == json.loads(body)
