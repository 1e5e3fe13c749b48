"""Answers parsed id by id: whole characters, headers, tool calls. Nothing a model generates raises or is executed."""

import json
import random
import string

import pytest

from entrypoints.chat_format.answer_parser import (
    AnswerParser,
    IncrementalDetokenizer,
    decode,
    parse_answer,
    split_metadata,
)
from entrypoints.chat_format.tool_calls import ToolCall, parse_tool_call, write_tool_call

CALL = "```python\ntool_call(city='北京')\n```"
TOOLS = ("get_weather", "get_data")


def streamed(ids, codec, tools=()):
    """The deltas that a user receives, and the parser."""
    parser = AnswerParser(codec, tools)
    return [*(parser.feed(id_) for id_ in ids), parser.finish()], parser


def segment_ids(text, codec):
    """Ids as ChatGLM3 generates a segment: header and body encoded separately."""
    head, _, body = text.partition("\n")
    return codec.encode(f"{head}\n") + codec.encode(body)


def test_an_emoji_is_returned_with_the_last_of_its_ids(toy_tokenizer):
    """The id of a byte token is its value + 3, so 👋 = F0 9F 91 8B is 243 162 148 142."""
    stream = IncrementalDetokenizer(toy_tokenizer)
    assert [stream.feed(id_) for id_ in (243, 162, 148, 142)] == ["", "", "", "👋"]
    assert stream.finish() == ""


def test_an_incomplete_emoji_becomes_one_replacement_character_streamed_or_not(toy_tokenizer):
    deltas, parser = streamed([243, 162, 148], toy_tokenizer)
    assert "".join(deltas) == parser.answer.content == decode([243, 162, 148], toy_tokenizer) == "\ufffd"


def test_a_genuine_replacement_character_is_ordinary_text(toy_tokenizer):
    ids = toy_tokenizer.encode("a\ufffdb")
    deltas, _ = streamed(ids, toy_tokenizer)
    assert "".join(deltas) == decode(ids, toy_tokenizer) == "a\ufffdb"


def test_the_deltas_joined_are_the_whole_text(toy_tokenizer, sample_rows):
    texts = [row["summary"] for row in sample_rows] + ["👨‍👩‍👧 はい\n\n  两格", " 前导空格", "\t表\r\n", ""]
    assert len(texts) > 100
    for text in texts:
        ids = toy_tokenizer.encode(text)
        stream = IncrementalDetokenizer(toy_tokenizer)
        assert "".join([*(stream.feed(id_) for id_ in ids), stream.finish()]) == decode(ids, toy_tokenizer) == text


def test_ids_without_text_decode_to_nothing(toy_tokenizer):
    """Unused rows of the padded embedding, labels of padding, stop tokens."""
    ids = toy_tokenizer.encode("你好")
    controls = [toy_tokenizer.special_token_id("<|user|>"), *toy_tokenizer.stop_ids, toy_tokenizer.pad_id]
    assert decode([*ids, 65000, -100, *controls], toy_tokenizer) == "你好"


@pytest.mark.parametrize("tools", [(), TOOLS])
@pytest.mark.parametrize(
    "text", ["", "你好", "get_weather", "get_", "用 get_data() 取值", "a <", "a", "get_weather is\na tool"]
)
def test_text_without_a_header_is_all_content(text, tools, toy_tokenizer):
    """Fine-tuned models omit the header; `get_` and `<` are ordinary text, although they could start one."""
    deltas, parser = streamed(toy_tokenizer.encode(text), toy_tokenizer, tools)
    assert ("".join(deltas), parser.answer.content, parser.answer.tool_calls) == (text, text, [])


@pytest.mark.parametrize("tools", [(), TOOLS])
@pytest.mark.parametrize("body", ["", "你好", " 前导空格", "两\n行", "```python\nprint(1)\n```"])
def test_an_empty_header_is_removed_and_the_body_kept_exactly(body, tools, toy_tokenizer):
    assert parse_answer(segment_ids(f"\n{body}", toy_tokenizer), toy_tokenizer, tools).content == body


def test_the_blank_that_some_models_generate_after_the_header_is_removed(toy_tokenizer):
    """Newline, blank and text encoded as a whole."""
    assert parse_answer(toy_tokenizer.encode("\n 你好"), toy_tokenizer).content == "你好"


def test_a_second_assistant_tag_starts_a_segment_and_its_text_does_not(toy_tokenizer):
    """`a<|assistant|>b`, once as a token and once as characters."""
    ids = [*toy_tokenizer.encode("a"), toy_tokenizer.special_token_id("<|assistant|>"), *toy_tokenizer.encode("b")]
    assert parse_answer(ids, toy_tokenizer).content == "ab"
    text = "a<|assistant|>b"
    assert parse_answer(toy_tokenizer.encode(text), toy_tokenizer).content == text


def test_a_call_of_an_offered_tool_is_parsed_and_not_returned_as_text(toy_tokenizer):
    deltas, parser = streamed(segment_ids(f"get_weather\n{CALL}", toy_tokenizer), toy_tokenizer, TOOLS)
    assert "".join(deltas) == parser.answer.content == ""
    assert parser.answer.tool_calls == [ToolCall("get_weather", {"city": "北京"}, CALL)]


def test_text_before_a_call_is_content(toy_tokenizer):
    ids = [
        *segment_ids("\n我来查天气。", toy_tokenizer),
        toy_tokenizer.special_token_id("<|assistant|>"),
        *segment_ids(f"get_weather\n{CALL}", toy_tokenizer),
    ]
    answer = parse_answer(ids, toy_tokenizer, TOOLS)
    assert (answer.content, [call.name for call in answer.tool_calls]) == ("我来查天气。", ["get_weather"])


@pytest.mark.parametrize("text", [f"get_weather\n{CALL}", f"get_time\n{CALL}", "get_weather\n是一个函数"])
def test_the_same_text_is_content_without_the_tool_or_the_code_block(text, toy_tokenizer):
    tools = () if text.startswith(f"get_weather\n{CALL}") else TOOLS
    answer = parse_answer(segment_ids(text, toy_tokenizer), toy_tokenizer, tools)
    assert answer.tool_calls == []
    assert answer.content.replace("\n ", "\n") == text


def test_a_call_that_cannot_be_parsed_is_returned_as_text(toy_tokenizer):
    body = "```python\ntool_call(__import__('os'))\n```"
    deltas, parser = streamed(segment_ids(f"get_weather\n{body}", toy_tokenizer), toy_tokenizer, TOOLS)
    assert "".join(deltas) == parser.answer.content
    assert parser.answer.content.endswith(body)


@pytest.mark.parametrize("tools", [(), TOOLS])
@pytest.mark.parametrize("text", ["\n你好！", "你好！👋", "用 get_data() 取值", f"get_weather\n{CALL}", "a <"])
def test_an_answer_that_ends_after_any_token_streams_its_content(text, tools, toy_tokenizer):
    """Text that is held back is returned when the answer ends early."""
    ids = toy_tokenizer.encode(text)
    assert len(ids) > 2
    for length in range(len(ids) + 1):
        deltas, parser = streamed(ids[:length], toy_tokenizer, tools)
        assert "".join(deltas) == parser.answer.content == parse_answer(ids[:length], toy_tokenizer, tools).content


def test_no_ids_make_the_parser_raise_or_lose_text(toy_tokenizer):
    """1,000 random answers, some empty, with undefined ids, separated by assistant tags; seed 0."""
    rng, tag = random.Random(0), toy_tokenizer.special_token_id("<|assistant|>")
    frequent = [tag, *toy_tokenizer.encode("\n `"), *toy_tokenizer.encode("get_weather\n"), *toy_tokenizer.encode(CALL)]
    for _ in range(1000):
        ids = [rng.choice([rng.choice(frequent), rng.randrange(-1, 2500)]) for _ in range(rng.randint(0, 30))]
        deltas, parser = streamed(ids, toy_tokenizer, ("get_weather", "g"))
        assert "".join(deltas) == parser.answer.content
        segments = [[]]
        for id_ in ids:
            segments.append([]) if id_ == tag else segments[-1].append(id_)
        whole = "".join(split_metadata(decode(segment, toy_tokenizer))[1] for segment in segments)
        assert parse_answer(ids, toy_tokenizer).content == whole


@pytest.mark.parametrize(
    ("source", "arguments"),
    [
        (CALL, {"city": "北京"}),
        ("```python\ntool_call(city='北京')", {"city": "北京"}),
        ("```\ntool_call()\n```", {}),
        (
            "tool_call(a=1, b=-2.5, c=None, d=[True, {'x': 'y'}])",
            {"a": 1, "b": -2.5, "c": None, "d": [True, {"x": "y"}]},
        ),
        ("tool_call(a=1, **{'max-results': 5, 'from': 'x'})", {"a": 1, "max-results": 5, "from": "x"}),
        ("想一想\n```python\ntool_call(\n  text='a\\nb',\n)\n```\n好", {"text": "a\nb"}),
    ],
)
def test_a_call_with_literal_arguments_is_parsed(source, arguments):
    assert parse_tool_call("get_weather", source) == ToolCall("get_weather", arguments, source)


@pytest.mark.parametrize(
    "source",
    [
        "",
        "北京",
        "tool_call(",
        "tool_call('北京')",
        "tool_call(**{1: 2})",
        "tool_call(**[1])",
        "tool_call(**a)",
        "tool_call(a=1, **{'a': 2})",
        "tool_call(*[1])",
        "other_call(a=1)",
        "os.tool_call(a=1)",
        "tool_call(a=b)",
        "tool_call(a=f'{1}')",
        "tool_call(a=10**9)",
        "tool_call(a=1)(b=2)",
        "x = tool_call(a=1)",
        "tool_call(a=1); tool_call(a=2)",
        "tool_call(a='\0')",
    ],
)
def test_anything_but_a_call_with_named_literals_is_none(source):
    assert parse_tool_call("get_weather", f"```python\n{source}\n```") is None


@pytest.mark.parametrize(
    "value",
    ["{1, 2}", "b'1'", "1 + 2j", "...", "1e999", "-1e999", "{(1, 2): 3}", "'\\ud800'", "0x" + "f" * 5000],
    ids=lambda value: value[:10],
)
def test_a_literal_that_is_not_json_is_rejected(value):
    """The API returns the call as JSON; serializing must not fail on what a model generated."""
    assert parse_tool_call("get_weather", f"tool_call(a={value})") is None


@pytest.mark.parametrize(
    ("before", "middle", "after"),
    [
        ("(", "1", ")"),
        ("[", "", "]"),
        ("-", "1", ""),
        ("not ", "1", ""),
        ("", "x", ".x"),
        ("", "x", "()"),
        ("", "1", "+1"),
        ("lambda:", "1", ""),
        ("1 if 1 else ", "1", ""),
        ("", "1", "1"),
    ],
)
def test_an_extremely_nested_or_long_call_is_none(before, middle, after):
    """50,000 levels; the last one is an integer of 50,001 digits."""
    assert parse_tool_call("get_weather", f"tool_call(a={before * 50_000}{middle}{after * 50_000})") is None


def test_code_in_a_call_is_not_executed(tmp_path):
    """Evaluating the generated call would let a prompt run code on the server."""
    file = tmp_path / "pwn"
    assert parse_tool_call("x", f"```python\ntool_call(a=__import__('os').system('touch {file}'))\n```") is None
    assert not file.exists()


NAMES = [
    "city",
    "城市",
    "max-results",
    "from",
    "None",
    "__debug__",
    "",
    " ",
    "1a",
    "a.b",
    "ﬁ",
    "μ",
    "µ",
    "'",
    '"',
    "**",
]
TEXTS = [
    "",
    "北京",
    "'",
    '"',
    "\"'",
    "\n```",
    "```python\n",
    "\\n",
    "\x00",
    "\r\u2028\x85",
    "{}",
    "👋",
    "<|user|>",
    "a\tb",
]


def random_value(rng, depth=0):
    """Any JSON value: an equal chance for each type, nested up to four levels."""
    numbers = [0, -1, 2**70, 0.1, -0.0, 1e-300, 1.7976931348623157e308, rng.random(), rng.randrange(-(10**30), 10**30)]
    texts = [rng.choice(TEXTS) + rng.choice(TEXTS), "".join(rng.choices(string.printable, k=rng.randint(0, 12)))]
    leaves = [None, True, False, rng.choice(numbers), rng.choice(texts), rng.choice(texts)]
    if depth == 4 or rng.random() < 0.5:
        return rng.choice(leaves)
    if rng.random() < 0.5:
        return [random_value(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    return random_object(rng, depth + 1)


def random_object(rng, depth=0):
    names = [
        rng.choice([*NAMES, *TEXTS, "".join(rng.choices(string.printable, k=3))]) for _ in range(rng.randint(0, 4))
    ]
    return {name: random_value(rng, depth) for name in names}


def test_a_call_is_written_so_that_the_parser_reads_every_json_object_back():
    """3,000 generated objects, seed 0; compared as JSON text, which differs for 1, 1.0 and true, and by order."""
    rng, with_other_names = random.Random(0), 0
    for _ in range(3000):
        arguments = random_object(rng)
        code = write_tool_call(arguments)
        with_other_names += "tool_call(**" in code
        assert json.dumps(parse_tool_call("f", code).arguments) == json.dumps(arguments), code
        assert code.splitlines() == ["```python", code[10:-4], "```"], "the call is one line of the block"
    assert 1000 < with_other_names < 3000


def test_a_call_streamed_as_the_model_generates_it_has_the_arguments_that_were_written(toy_tokenizer):
    rng = random.Random(1)
    for _ in range(100):
        arguments = random_object(rng)
        ids = segment_ids(f"get_weather\n{write_tool_call(arguments)}", toy_tokenizer)
        answer = parse_answer(ids, toy_tokenizer, TOOLS)
        assert [json.dumps(call.arguments) for call in answer.tool_calls] == [json.dumps(arguments)]


def test_names_that_are_keywords_are_written_as_the_reference_writes_them():
    """format_function_call of ChatGLM3's fine-tuning script unparses `tool_call(name=constant)`."""
    written = write_tool_call({"city": "北京", "days": 2, "wet": True, "unit": None})
    assert written == "```python\ntool_call(city='北京', days=2, wet=True, unit=None)\n```"
    assert write_tool_call({"city": "北京", "max-results": 5}).splitlines()[1] == (
        "tool_call(**{'city': '北京', 'max-results': 5})"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud800", [[[]] * 2 + [{"a": "\udfff"}]]])
def test_arguments_that_are_not_json_are_not_written(value):
    with pytest.raises(ValueError, match=r"Out of range|surrogates not allowed"):
        write_tool_call({"a": value})


def test_arguments_nested_too_deeply_for_the_parser_are_not_written():
    nested = 1
    for _ in range(300):
        nested = [nested]
    with pytest.raises(ValueError, match="nested too deeply"):
        write_tool_call({"a": nested})
