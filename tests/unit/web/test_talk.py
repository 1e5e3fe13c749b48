"""A visitor's conversation, without a server."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from entrypoints.api.openai_schema import ChatRequest
from entrypoints.dataset.reading import Columns, examples, parse_rows
from entrypoints.sampling import Sampling
from entrypoints.web.client import Answering, Api, Problem, without_oldest_round
from entrypoints.web.talk import EXAMPLE_TOOLS, Options, Talk, parse_tools, sliders


def said(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


def call(id_: str) -> dict:
    return {"id": id_, "type": "function", "function": {"name": "f", "arguments": "{}"}}


def test_the_sliders_have_the_bounds_of_the_schema_and_the_defaults_of_sampling():
    bars, default = sliders(4096), Sampling()
    assert (bars["max_tokens"].highest, bars["max_tokens"].default) == (4096, default.max_new_tokens)
    assert (bars["temperature"].default, bars["top_p"].default) == (default.temperature, default.top_p)
    for name, bar in bars.items():
        for value in (bar.lowest, bar.highest, bar.default):
            ChatRequest(messages=[{"role": "user", "content": "x"}], **{name: value})
        with pytest.raises(ValueError, match=name):
            ChatRequest(messages=[{"role": "user", "content": "x"}], **{name: bar.lowest - 0.02 if bar.step < 1 else 0})
    assert sliders(64)["max_tokens"].default == 64


def test_an_empty_talk_has_no_rows_to_export():
    assert Talk().training_rows() == ""
    assert Talk(said("q")).training_rows() == ""
    assert Talk(said("q", " ")).training_rows() == ""


def test_rounds_with_tools_are_not_exported():
    tool_round = [
        {"role": "user", "content": "t"},
        {"role": "assistant", "content": "", "tool_calls": [call("1")]},
        {"role": "tool", "tool_call_id": "1", "content": "r"},
        {"role": "assistant", "content": "a"},
    ]
    talk = Talk([*said("q1", "a1"), *tool_round, *said("q2\n", 'a"2')])
    (row,), skipped = examples(parse_rows(talk.training_rows().encode(), "x"), Columns(history="history"))
    assert skipped == []
    assert (row.prompt, row.response, row.history) == ("q2\n", 'a"2', [("q1", "a1")])


def test_results_answer_the_calls_in_their_order():
    talk = Talk(
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call("1"), call("2")]}]
    )
    assert [waiting["id"] for waiting in talk.waiting_calls()] == ["1", "2"]
    talk.say("r1")
    talk.say("r2")
    assert [(turn["tool_call_id"], turn["content"]) for turn in talk.messages[-2:]] == [("1", "r1"), ("2", "r2")]
    assert talk.waiting_calls() == []
    talk.say("q2")
    assert talk.messages[-1]["role"] == "user"


def test_an_answer_that_several_threads_take_is_one_turn():
    """A page whose old run goes on beside the new one takes twice."""
    for _ in range(50):
        talk = Talk(said("问"))
        talk.answering = Answering(Api("http://127.0.0.1:9/v1"), said("问"), {"model": "m"})
        talk.answering.growth.text = "答"
        with ThreadPoolExecutor(8) as threads:
            taken = list(threads.map(lambda _, talk=talk: talk.take(), range(8)))
        assert len([growth for growth in taken if growth]) == 1
        assert talk.messages == said("问", "答")


def test_taking_back_a_question_takes_all_that_followed():
    talk = Talk(said("q1", "a1", "q2", "a2"))
    assert talk.forget_question() == "q2"
    assert talk.messages == said("q1", "a1")
    assert talk.forget_question() == "q1"
    assert talk.forget_question() is None


def test_an_answer_can_be_asked_for_again_only_after_a_question():
    talk = Talk(said("q", "a"))
    assert talk.forget_answer()
    assert talk.messages == said("q")
    assert not Talk().forget_answer()


def test_the_oldest_round_goes_first_and_system_and_last_question_stay():
    system = [{"role": "system", "content": "s"}]
    assert without_oldest_round(system + said("q1", "a1", "q2")) == system + said("q2")
    assert without_oldest_round(system + said("q2")) is None


def test_tools_are_taken_in_both_forms():
    plain = parse_tools(EXAMPLE_TOOLS)
    assert plain[0]["function"]["name"] == "get_weather"
    assert parse_tools('[{"type": "function", "function": {"name": "f"}}]') == [
        {"type": "function", "function": {"name": "f"}}
    ]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "1", "[1]", '[{"name": ""}]', '[{"name": "a b"}]', "[" * 100000])
def test_tools_that_are_none_are_a_problem(text):
    problem = parse_tools(text)
    assert isinstance(problem, Problem)
    assert problem.values["detail"]
    assert Options(tool_mode=True, tools=text).request() == problem
    assert isinstance(Options(tool_mode=False, tools=text).request(), dict)
