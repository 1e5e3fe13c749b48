"""The documented shapes: each example row of the guide is recognized and read as the conversation that it is."""

import json
import random
import re
from pathlib import Path

import pytest

from entrypoints.chat_format.openai_messages import from_openai_messages
from entrypoints.chat_format.prompt import Message
from entrypoints.chat_format.tool_calls import TOOLS_INTRODUCTION
from entrypoints.dataset.columns import FORMATS, Columns
from entrypoints.dataset.convert import convert, messages_row
from entrypoints.dataset.json_stream import Row
from entrypoints.dataset.reader import Example, examples, read_rows, stream_examples, stream_rows
from entrypoints.errors import UserError

GUIDE = Path(__file__).parents[3] / "entrypoints" / "dataset"
WEATHER = {"name": "weather", "description": "Weather of a city, now"} | {
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}
}
BERGEN = [
    Message("user", "Is it raining in Bergen?"),
    Message("assistant", "```python\ntool_call(city='Bergen')\n```", "weather"),
    Message("observation", "rain, 9 degrees"),
    Message("assistant", "Yes, at 9 degrees."),
]
SHANGHAI = [
    Message("user", "北京天气怎么样？"),
    Message("assistant", "北京今天晴。"),
    Message("user", "那上海呢？"),
    Message("assistant", "上海今天多云。"),
]
DRESS = [Message("user", "类型#裙*风格#简约"), Message("assistant", "简约的连衣裙，线条干净利落。")]
OFFERED = ({"name": "weather", "parameters": {"type": "object"}},)
# heading of the guide, names of the shapes of its rows, and their turns, written by hand
EXAMPLES = {
    "Prompt and response": [("columns content and summary", DRESS)],
    "History": [("prompt and response", SHANGHAI)] * 3,
    "Alpaca": [
        (
            "Alpaca",
            [
                Message("system", "你是一名翻译。"),
                Message("user", "翻译成英文：早"),
                Message("assistant", "Good morning."),
                Message("user", "翻译成英文\n今天下雨。"),
                Message("assistant", "It is raining today."),
            ],
        )
    ],
    "ShareGPT": [("ShareGPT", [Message("system", "Answer in one sentence.", tools=(WEATHER,)), *BERGEN])],
    "Messages": [
        ("messages", [Message("system", TOOLS_INTRODUCTION, tools=(WEATHER,)), *BERGEN]),
        (
            "messages",
            [
                Message("system", "Be exact."),
                Message("user", "2+2"),
                Message("assistant", "5", learn=False),
                Message("user", "Sure?"),
                Message("assistant", "No, it is 4."),
            ],
        ),
        (
            "messages",
            [
                Message("system", "查天气", tools=OFFERED),
                Message("user", "北京天气"),
                Message("assistant", "```python\ntool_call(city='北京')\n```", "weather"),
                Message("observation", "31度"),
                Message("assistant", "北京31度。"),
            ],
        ),
    ],
    "ChatGLM3's fine-tuning formats": [
        (
            "messages",
            [
                Message("system", TOOLS_INTRODUCTION, tools=OFFERED),
                Message("user", "北京天气"),
                Message("assistant", "我查一下。", learn=False),
                Message("assistant", "```python\ntool_call(city='北京')\n```", "weather"),
                Message("observation", '{"temperature": 31}'),
                Message("assistant", "北京31度。"),
            ],
        ),
        ("prompt and response", DRESS),
    ],
    "TRL prompt and completion": [
        ("prompt and completion", [Message("user", "The sea is"), Message("assistant", "salty and deep.")]),
        (
            "prompt and completion",
            [
                Message("system", "Be brief."),
                Message("user", "How is the sea?"),
                Message("assistant", "Salty and deep."),
            ],
        ),
    ],
    "Firefly": [
        ("Firefly", [Message("user", "上联：风吹柳绿"), Message("assistant", "下联：雨润花红")]),
        (
            "Firefly",
            [
                Message("user", "想一个店名"),
                Message("assistant", "晨光书屋"),
                Message("user", "再想一个"),
                Message("assistant", "海边小馆"),
            ],
        ),
    ],
    "MOSS": [
        (
            "MOSS",
            [
                Message("system", "You are a helpful assistant.\n"),
                Message("user", "推荐一种茶"),
                Message("assistant", "可以试试龙井。"),
            ],
        ),
        (
            "MOSS",
            [
                Message("system", "You are a helpful assistant."),
                Message("user", "Name a tea"),
                Message("assistant", "Longjing."),
            ],
        ),
    ],
}


def guide_rows(name="README.md"):
    """The example rows of each shape, by the number of its section."""
    text = (GUIDE / name).read_text(encoding="utf-8")
    sections = re.split(r"^#{2,3} ", text, flags=re.MULTILINE)
    rows = {section.partition("\n")[0]: re.findall(r"^\{.*\}$", section, re.MULTILINE) for section in sections}
    return {heading: lines for heading, lines in rows.items() if lines}


def read(path, *fields, columns=None):
    """Name of the shape and the examples; no row may be skipped."""
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in fields), encoding="utf-8")
    reader = stream_examples(stream_rows(path), columns or Columns())
    found = list(reader)
    assert reader.skipped.total == 0, reader.skipped.counts()
    return reader.shape.name, [example.messages() for example in found], dict(reader.unused)


@pytest.mark.parametrize("heading", EXAMPLES)
def test_the_examples_of_a_shape_are_recognized_and_read(heading, tmp_path):
    rows = guide_rows()[heading]
    assert len(rows) == len(EXAMPLES[heading])
    for row, (shape, turns) in zip(rows, EXAMPLES[heading], strict=True):
        found, messages, _ = read(tmp_path / "rows.jsonl", row)
        assert found == shape
        assert messages == [turns]


def test_both_languages_of_the_guide_have_the_same_example_rows():
    english, chinese = guide_rows(), guide_rows("README.zh-CN.md")
    assert list(english) == list(EXAMPLES)
    assert list(english.values()) == list(chinese.values())


@pytest.mark.parametrize("heading", EXAMPLES)
def test_converted_rows_are_messages_with_the_same_turns(heading, tmp_path):
    """Read back by the reader, and as the API reads a request."""
    for number, (row, (_, turns)) in enumerate(zip(guide_rows()[heading], EXAMPLES[heading], strict=True)):
        source, target = tmp_path / "rows.jsonl", tmp_path / f"{number}.jsonl"
        source.write_text(row, encoding="utf-8")
        assert convert(stream_examples(stream_rows(source), Columns()), target, 0, overwrite=False) == 1
        written = json.loads(target.read_text(encoding="utf-8"))
        assert set(written) <= {"messages", "tools"}
        assert from_openai_messages(written["messages"], written.get("tools", ())) == turns
        assert examples(read_rows(target), Columns())[0][0].messages() == turns


FORMAT_OF = {
    "Alpaca": "alpaca", "ShareGPT": "sharegpt", "Messages": "messages", "Firefly": "firefly", "MOSS": "moss",
    "TRL prompt and completion": "prompt-completion", "History": "prompt-response", "Prompt and response": "columns",
}  # fmt: skip


@pytest.mark.parametrize("heading", FORMAT_OF)
def test_the_format_that_the_guide_names_reads_its_examples(heading, tmp_path):
    assert sorted({*FORMAT_OF.values(), "auto"}) == sorted(FORMATS)
    columns = Columns(format=FORMAT_OF[heading])
    for row, (_, turns) in zip(guide_rows()[heading], EXAMPLES[heading], strict=True):
        assert read(tmp_path / "rows.jsonl", row, columns=columns)[1] == [turns]


def test_a_format_overrules_what_the_first_rows_look_like(tmp_path):
    both = {"instruction": "a", "output": "b", "content": "c", "summary": "d"}
    assert read(tmp_path / "rows.jsonl", both)[0] == "Alpaca"
    name, messages, unused = read(tmp_path / "rows.jsonl", both, columns=Columns(format="columns"))
    assert (name, messages[0][0].content) == ("columns content and summary", "c")
    assert unused == {"instruction": 1, "output": 1}
    with pytest.raises(UserError, match=r"no column 'messages' in rows\.jsonl"):
        read(tmp_path / "rows.jsonl", both, columns=Columns(format="messages"))
    with pytest.raises(UserError, match="no column 'instruction' and no column 'output'"):
        read(tmp_path / "rows.jsonl", {"content": "c", "summary": "d"}, columns=Columns(format="alpaca"))


def test_named_columns_are_used_alone_and_the_others_are_named(tmp_path):
    row = {
        "q": "问",
        "a": "答",
        "context": "据此",
        "role": "系统",
        "history": [["x", "y"]],
        "id": 0,
        "note": "",
        "tags": [],
    }
    path = tmp_path / "rows.jsonl"
    _, messages, unused = read(path, row, row, columns=Columns("q", "a"))
    assert messages == [[Message("user", "问"), Message("assistant", "答")]] * 2
    assert unused == {"context": 2, "role": 2, "history": 2, "id": 2}
    columns = Columns("q", "a", "history", input="context", system="role")
    name, messages, unused = read(path, row, columns=columns)
    assert (name, unused) == ("columns q and a", {"id": 1})
    assert [turn.content for turn in messages[0]] == ["系统", "x", "y", "问\n据此", "答"]


def test_fields_of_messages_without_an_effect_are_named(tmp_path):
    turns = [
        {"role": "user", "content": "a", "name": "li", "time": "12:00", "mood": None},
        {"role": "assistant", "content": "b", "reasoning_content": "hm", "refusal": None},
    ]
    assert read(tmp_path / "rows.jsonl", {"messages": turns})[2] == {
        "messages.time": 1,
        "messages.reasoning_content": 1,
    }
    pairs = {"conversation": [{"human": "a", "assistant": "b", "score": 3}], "id": 7}
    assert read(tmp_path / "rows.jsonl", pairs)[2] == {"conversation.score": 1, "id": 1}
    turn = {"Human": "<|Human|>: a<eoh>", "Inner Thoughts": "<|Inner Thoughts|>: hm<eot>", "MOSS": "<|MOSS|>: b<eom>"}
    assert read(tmp_path / "rows.jsonl", {"chat": {"turn_1": turn}})[2] == {"chat.Inner Thoughts": 1}


@pytest.mark.parametrize(
    ("fields", "contents"),
    [
        ({"instruction": "a", "output": "b", "input": None}, ["a", "b"]),
        ({"query": "a", "response": "b"}, ["a", "b"]),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "tools": ""}, ["a", "b"]),
        ({"conversations": ["a", "b", "c", "d"]}, ["a", "b", "c", "d"]),
        ({"conversations": [["a", "b"], ["c", "d"]]}, ["a", "b", "c", "d"]),
        (
            {"messages": json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])},
            ["a", "b"],
        ),
        ({"chat": {f"turn_{n}": {"Human": f"q{n}", "MOSS": f"a{n}"} for n in (10, 9)}}, ["q9", "a9", "q10", "a10"]),
        ({"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}, ["a", "b"]),
    ],
)
def test_near_variants_are_read(fields, contents, tmp_path):
    _, messages, _ = read(tmp_path / "rows.jsonl", fields)
    assert [turn.content for turn in messages[0]] == contents


CALL_TEXT = "```python\ntool_call(x=1)\n```"
HUMAN = {"from": "human", "value": "a"}


@pytest.mark.parametrize(
    "call",
    [
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "function_call", "value": '{"name": "f", "arguments": "{\\"x\\": 1}"}'},
        {"from": "function_call", "value": {"name": "f", "arguments": {"x": 1}}},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]},
        {"role": "assistant", "content": None, "tool_calls": '[{"function": {"name": "f", "arguments": {"x": 1}}}]'},
        {"role": "tool", "name": "f", "parameters": {"x": 1}},
    ],
)
def test_a_call_in_every_public_form_is_the_same_turn(call, tmp_path):
    _, messages, unused = read(tmp_path / "rows.jsonl", {"conversations": [HUMAN, call]})
    assert messages == [[Message("user", "a"), Message("assistant", CALL_TEXT, "f")]]
    assert unused == {}


@pytest.mark.parametrize("role", ["observation", "tool", "tool_response", "function"])
@pytest.mark.parametrize("result", ["31度", {"t": 31}, [1, 2], 5])
def test_a_result_that_is_not_text_is_its_json(role, result, tmp_path):
    call = {"from": "function_call", "value": '[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]'}
    row = {
        "conversations": [
            HUMAN,
            call,
            {"from": role, "value": result},
            {"from": role, "value": "x"},
            {"from": "gpt", "value": "b"},
        ]
    }
    _, messages, _ = read(tmp_path / "rows.jsonl", row)
    text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
    assert [turn.metadata for turn in messages[0][1:3]] == ["f", "g"]
    assert [turn.content for turn in messages[0][3:]] == [text, "x", "b"]


def skipped_reason(path, fields, columns=None):
    good = {key: value for key, value in fields.items() if key not in ("system", "tools")}
    path.write_text("\n".join(json.dumps(row) for row in (fields, good)), encoding="utf-8")
    try:
        _, skipped = examples(read_rows(path), columns or Columns())
    except UserError as error:
        return error.problem
    return skipped[0].reason


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"content": "a", "summary": "b", "system": 5}, "column 'system' is a number, not a string"),
        ({"conversations": [HUMAN]}, "does not end with an answer"),
        ({"conversations": [HUMAN, {"from": "narrator", "value": "x"}]}, "turn 1 has role 'narrator'"),
        ({"conversations": [HUMAN, {"from": "function_call", "value": "f()"}]}, "turn 1 has a call that is not JSON"),
        ({"conversations": [HUMAN, {"from": "gpt", "value": "b", "weight": 0}]}, "no answer is learned"),
        (
            {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "a"},
                          {"role": "assistant", "content": "b"}], "system": "y"},
            "column 'system' and the first turn hold different system texts",
        ),
        (
            {"chat": {"turn_1": {"Human": "a", "Commands": '<|Commands|>: Search("x")<eoc>', "MOSS": "b"}}},
            "turn_1 has Commands of a MOSS plugin",
        ),
        ({"plain_text": "[Human]: a<eoh> and [MOSS]: b<eoa>"}, "plain_text has text outside"),
        ({"instruction": "a", "input": ["x"], "output": "b"}, "column 'input' is an array, not a string"),
        ({"instruction": "a", "chosen": "b", "rejected": "c"}, "the row has two answers, chosen and rejected"),
    ],
)  # fmt: skip
def test_rows_that_would_lose_something_are_skipped_with_the_reason(fields, reason, tmp_path):
    assert reason in skipped_reason(tmp_path / "rows.jsonl", fields)


def test_columns_that_have_no_effect_on_conversations_are_refused(tmp_path):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "h": [["x", "y"]]}
    with pytest.raises(UserError, match="--history-column has no effect on rows in the shape messages"):
        read(tmp_path / "rows.jsonl", row, columns=Columns(history="h"))


def test_the_shape_is_that_of_most_of_the_first_rows(tmp_path):
    alpaca, pair = {"instruction": "a", "output": "b"}, {"content": "c", "summary": "d"}
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, [pair, alpaca, alpaca])), encoding="utf-8")
    used, skipped = examples(read_rows(path), Columns())
    assert ([example.prompt for example in used], [row.line for row in skipped]) == (["a", "a"], [1])
    assert skipped[0].reason == "no column 'instruction'"


def test_a_row_longer_than_a_chunk_is_recognized(tmp_path, monkeypatch):
    from entrypoints.dataset import json_stream

    monkeypatch.setattr(json_stream, "CHUNK_BYTES", 16)
    assert read(tmp_path / "rows.jsonl", *guide_rows()["ShareGPT"])[0] == "ShareGPT"


JUNK = [
    None, 0, 1.5, True, "", "x", "[", '{"a":1}', "[1]", "\ud800", [], {}, [None], [[]], [{}], ["a", "b"], [["a", "b"]],
    [{"role": "user", "content": "q"}], {"role": "user"}, [{"from": 1}], {"turn_1": None}, [{"function": {}}], "None",
]  # fmt: skip
NAMES = [
    "role",
    "from",
    "value",
    "content",
    "weight",
    "tool_calls",
    "parameters",
    "turn_2",
    "Human",
    "name",
    "function",
]


def mutated(value, rng):
    """The value with some parts replaced, removed or renamed."""
    if rng.random() < 0.1:
        return rng.choice(JUNK)
    if isinstance(value, list):
        return [mutated(item, rng) for item in value] + ([rng.choice(JUNK)] if rng.random() < 0.05 else [])
    if isinstance(value, dict):
        kept = [key for key in value if rng.random() > 0.05]
        return {key if rng.random() < 0.95 else rng.choice(NAMES): mutated(value[key], rng) for key in kept}
    return value


def test_no_row_makes_the_reader_fail_and_every_usable_one_survives_the_conversion():
    """4,000 damaged versions of the documented rows, seed 0: each is an example or has a reason."""
    rng, used, refused = random.Random(0), 0, 0
    documented = [json.loads(row) for rows in guide_rows().values() for row in rows]
    for _ in range(4000):
        row = mutated(rng.choice(documented), rng)
        columns = Columns(format=rng.choice([*FORMATS, *["auto"] * 20]))
        try:
            found = list(stream_examples([Row(Path("rows.jsonl"), 1, row if isinstance(row, dict) else {})], columns))
        except UserError:  # no usable row
            refused += 1
            continue
        for example in found:
            assert isinstance(example, Example)
            written = json.loads(json.dumps(messages_row(example.messages())))
            assert from_openai_messages(written["messages"], written.get("tools", ())) == example.messages()
            used += 1
    assert used > 500
    assert refused > 500
