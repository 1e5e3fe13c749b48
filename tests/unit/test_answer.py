"""Trap names (A8, C1, D2, D3, L1) are those of the list of reported pains."""

import random

import pytest

from entrypoints.answer import AnswerReader, TextStream, ToolCall, decode, parse_tool_call, read_answer, split_answer

CALL = "```python\ntool_call(city='北京')\n```"
TOOLS = ("get_weather", "get_data")


def shown(ids, codec, tools=()):
    """What a user sees piece by piece, and the reader."""
    reader = AnswerReader(codec, tools)
    return [*(reader.feed(id_) for id_ in ids), reader.finish()], reader


def spoken(text, codec):
    """Ids as ChatGLM3 writes a segment: header and body encoded apart."""
    head, _, body = text.partition("\n")
    return codec.encode(f"{head}\n") + codec.encode(body)


def test_an_emoji_appears_with_the_last_of_its_ids(toy_tokenizer):
    """D2: byte value + 3 is the id of a byte piece, so the wave is F0 9F 91 8B = 243 162 148 142."""
    stream = TextStream(toy_tokenizer)
    assert [stream.feed(id_) for id_ in (243, 162, 148, 142)] == ["", "", "", "👋"]
    assert stream.finish() == ""


def test_an_emoji_cut_short_leaves_one_replacement_character_streamed_or_not(toy_tokenizer):
    pieces, reader = shown([243, 162, 148], toy_tokenizer)
    assert "".join(pieces) == reader.answer.content == decode([243, 162, 148], toy_tokenizer) == "\ufffd"


def test_a_genuine_replacement_character_is_text_like_any_other(toy_tokenizer):
    ids = toy_tokenizer.encode("a\ufffdb")
    pieces, _ = shown(ids, toy_tokenizer)
    assert "".join(pieces) == decode(ids, toy_tokenizer) == "a\ufffdb"


def test_pieces_joined_are_the_whole_text(toy_tokenizer, sample_rows):
    texts = [row["summary"] for row in sample_rows] + ["👨‍👩‍👧 はい\n\n  两格", " 前导空格", "\t表\r\n", ""]
    assert len(texts) > 100
    for text in texts:
        ids = toy_tokenizer.encode(text)
        stream = TextStream(toy_tokenizer)
        assert "".join([*(stream.feed(id_) for id_ in ids), stream.finish()]) == decode(ids, toy_tokenizer) == text


def test_ids_without_text_decode_to_nothing(toy_tokenizer):
    """A8: rows of the padded embedding, labels of padding, stop ids."""
    ids = toy_tokenizer.encode("你好")
    controls = [toy_tokenizer.control("<|user|>"), *toy_tokenizer.stop_ids, toy_tokenizer.pad_id]
    assert decode([*ids, 65000, -100, *controls], toy_tokenizer) == "你好"


@pytest.mark.parametrize("tools", [(), TOOLS])
@pytest.mark.parametrize(
    "text", ["", "你好", "get_weather", "get_", "用 get_data() 取值", "a <", "a", "get_weather is\na tool"]
)
def test_text_without_a_header_is_all_content(text, tools, toy_tokenizer):
    """C1 and D3: tuned models leave the header's newline out; `get_` and `<` are letters."""
    pieces, reader = shown(toy_tokenizer.encode(text), toy_tokenizer, tools)
    assert ("".join(pieces), reader.answer.content, reader.answer.tool_calls) == (text, text, [])


@pytest.mark.parametrize("tools", [(), TOOLS])
@pytest.mark.parametrize("body", ["", "你好", " 前导空格", "两\n行", "```python\nprint(1)\n```"])
def test_an_empty_header_is_left_out_and_the_body_kept_to_the_blank(body, tools, toy_tokenizer):
    assert read_answer(spoken(f"\n{body}", toy_tokenizer), toy_tokenizer, tools).content == body


def test_the_blank_that_some_models_write_after_the_header_is_left_out(toy_tokenizer):
    """C1: `\\n 你好` in one encoding."""
    assert read_answer(toy_tokenizer.encode("\n 你好"), toy_tokenizer).content == "你好"


def test_a_second_assistant_tag_begins_a_segment_and_its_letters_do_not(toy_tokenizer):
    """C1: `a<|assistant|>b`."""
    ids = [*toy_tokenizer.encode("a"), toy_tokenizer.control("<|assistant|>"), *toy_tokenizer.encode("b")]
    assert read_answer(ids, toy_tokenizer).content == "ab"
    letters = "a<|assistant|>b"
    assert read_answer(toy_tokenizer.encode(letters), toy_tokenizer).content == letters


def test_a_call_of_an_offered_tool_is_read_and_not_shown(toy_tokenizer):
    pieces, reader = shown(spoken(f"get_weather\n{CALL}", toy_tokenizer), toy_tokenizer, TOOLS)
    assert "".join(pieces) == reader.answer.content == ""
    assert reader.answer.tool_calls == [ToolCall("get_weather", {"city": "北京"}, CALL)]


def test_text_before_a_call_is_content(toy_tokenizer):
    ids = [
        *spoken("\n我来查天气。", toy_tokenizer),
        toy_tokenizer.control("<|assistant|>"),
        *spoken(f"get_weather\n{CALL}", toy_tokenizer),
    ]
    answer = read_answer(ids, toy_tokenizer, TOOLS)
    assert (answer.content, [call.name for call in answer.tool_calls]) == ("我来查天气。", ["get_weather"])


@pytest.mark.parametrize("text", [f"get_weather\n{CALL}", f"get_time\n{CALL}", "get_weather\n是一个函数"])
def test_without_the_tool_or_the_code_the_same_text_is_content(text, toy_tokenizer):
    tools = () if text.startswith(f"get_weather\n{CALL}") else TOOLS
    answer = read_answer(spoken(text, toy_tokenizer), toy_tokenizer, tools)
    assert answer.tool_calls == []
    assert answer.content.replace("\n ", "\n") == text


def test_a_call_that_cannot_be_read_is_shown_whole(toy_tokenizer):
    body = "```python\ntool_call(__import__('os'))\n```"
    pieces, reader = shown(spoken(f"get_weather\n{body}", toy_tokenizer), toy_tokenizer, TOOLS)
    assert "".join(pieces) == reader.answer.content
    assert reader.answer.content.endswith(body)


@pytest.mark.parametrize("tools", [(), TOOLS])
@pytest.mark.parametrize("text", ["\n你好！", "你好！👋", "用 get_data() 取值", f"get_weather\n{CALL}", "a <"])
def test_an_answer_cut_at_any_length_streams_what_it_reads(text, tools, toy_tokenizer):
    """D3: no number of ids is too short to be shown."""
    ids = toy_tokenizer.encode(text)
    assert len(ids) > 2
    for length in range(len(ids) + 1):
        pieces, reader = shown(ids[:length], toy_tokenizer, tools)
        assert "".join(pieces) == reader.answer.content == read_answer(ids[:length], toy_tokenizer, tools).content


def test_no_ids_make_the_reader_raise_or_lose_text(toy_tokenizer):
    """1,000 random answers, blank ones and undefined ids included, cut by assistant tags; seed 0."""
    random_of, tag = random.Random(0), toy_tokenizer.control("<|assistant|>")
    often = [tag, *toy_tokenizer.encode("\n `"), *toy_tokenizer.encode("get_weather\n"), *toy_tokenizer.encode(CALL)]
    for _ in range(1000):
        ids = [
            random_of.choice([random_of.choice(often), random_of.randrange(-1, 2500)])
            for _ in range(random_of.randint(0, 30))
        ]
        pieces, reader = shown(ids, toy_tokenizer, ("get_weather", "g"))
        assert "".join(pieces) == reader.answer.content
        segments = [[]]
        for id_ in ids:
            segments.append([]) if id_ == tag else segments[-1].append(id_)
        whole = "".join(split_answer(decode(segment, toy_tokenizer))[1] for segment in segments)
        assert read_answer(ids, toy_tokenizer).content == whole


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
        ("想一想\n```python\ntool_call(\n  text='a\\nb',\n)\n```\n好", {"text": "a\nb"}),
    ],
)
def test_a_call_of_literals_is_read(source, arguments):
    assert parse_tool_call("get_weather", source) == ToolCall("get_weather", arguments, source)


@pytest.mark.parametrize(
    "source",
    [
        "",
        "北京",
        "tool_call(",
        "tool_call('北京')",
        "tool_call(**{'a': 1})",
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
def test_anything_but_a_call_of_named_literals_is_none(source):
    assert parse_tool_call("get_weather", f"```python\n{source}\n```") is None


@pytest.mark.parametrize(
    "value",
    ["{1, 2}", "b'1'", "1 + 2j", "...", "1e999", "-1e999", "{(1, 2): 3}", "'\\ud800'", "0x" + "f" * 5000],
    ids=lambda value: value[:10],
)
def test_a_literal_that_json_cannot_hold_is_no_argument(value):
    """The call is handed on as JSON: whoever writes it must not fail on what a model wrote."""
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
def test_a_call_nested_or_long_beyond_reason_is_none(before, middle, after):
    """50,000 levels; the last one is an integer of 50,001 digits."""
    assert parse_tool_call("get_weather", f"tool_call(a={before * 50_000}{middle}{after * 50_000})") is None


def test_code_in_a_call_is_not_run(tmp_path):
    """L1."""
    file = tmp_path / "pwn"
    assert parse_tool_call("x", f"```python\ntool_call(a=__import__('os').system('touch {file}'))\n```") is None
    assert not file.exists()
