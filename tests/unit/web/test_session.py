"""What a visitor does with a conversation, without a server."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from entrypoints.api.openai_schema import ChatRequest
from entrypoints.chat_format.sampling import Sampling
from entrypoints.web.client import AnswerTask, ApiClient, CompletionRequest, drop_oldest_round
from entrypoints.web.request_errors import ErrorMessage
from entrypoints.web.session import MAX_TOOL_RESULTS, ChatOptions, ChatSession, RunningAnswer, slider_ranges
from entrypoints.web.tool_use import EXAMPLE_TOOLS, parse_tools, run_tool

NOWHERE = ApiClient("http://127.0.0.1:9/v1")


def said(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


def call(id_: str) -> dict:
    return {"id": id_, "type": "function", "function": {"name": "f", "arguments": "{}"}}


def test_the_sliders_have_the_bounds_of_the_schema_and_the_defaults_of_sampling():
    ranges, default = slider_ranges(4096), Sampling()
    assert (ranges["max_tokens"].maximum, ranges["max_tokens"].default) == (4096, default.max_new_tokens)
    assert (ranges["temperature"].default, ranges["top_p"].default) == (default.temperature, default.top_p)
    for name, bounds in ranges.items():
        for value in (bounds.minimum, bounds.maximum, bounds.default):
            ChatRequest(messages=[{"role": "user", "content": "x"}], **{name: value})
        with pytest.raises(ValueError, match=name):
            ChatRequest(
                messages=[{"role": "user", "content": "x"}], **{name: bounds.minimum - 0.02 if bounds.step < 1 else 0}
            )
    assert slider_ranges(64)["max_tokens"].default == 64


def talk(*messages: dict) -> ChatSession:
    """A session whose conversation consists of these messages."""
    session = ChatSession()
    for message in messages:
        session.conversation.add(message, session.conversation.leaves[0])
    return session


def finished(session: ChatSession, **answer: object) -> None:
    """End the answer in progress as if the server had sent this."""
    running = session.running[0]
    running.task.done.wait(60)
    for name, value in {"error": None, **answer}.items():
        setattr(running.task.answer, name, value)
    running.task.stopped = False
    session.finish_answers()


def test_an_answer_that_several_threads_finish_is_appended_once():
    """In Streamlit an old run of the page continues beside the new one, and both finish the answer."""
    for _ in range(50):
        session = talk(*said("问"))
        task = AnswerTask(NOWHERE, said("问"), CompletionRequest("m", 16, 0.8, 0.8))
        task.answer.text = "答"
        session.running[0] = RunningAnswer(task, 1, "m", "")
        with ThreadPoolExecutor(8) as threads:
            results = list(threads.map(lambda _, session=session: session.finish_answers(), range(8)))
        assert results.count(True) == 1
        assert session.conversation.prompt() == said("问", "答")


def test_inputs_answer_the_pending_tool_calls_in_order():
    session = talk(
        {"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call("1"), call("2")]}
    )
    assert [pending["id"] for pending in session.conversation.pending_tool_calls()] == ["1", "2"]
    for text in ("r1", "r2"):
        session.ask(NOWHERE, ChatOptions(), text)
        session.running.clear()
    assert session.conversation.prompt()[-2:] == [
        {"role": "tool", "tool_call_id": "1", "content": "r1"},
        {"role": "tool", "tool_call_id": "2", "content": "r2"},
    ]
    assert session.conversation.pending_tool_calls() == []


def test_invalid_tools_leave_the_conversation_unchanged():
    session = talk(*said("q", "a"))
    assert not session.ask(NOWHERE, ChatOptions(tool_mode=True, tools="[{"), "q2")
    assert session.conversation.prompt() == said("q", "a")
    assert session.error == ErrorMessage("tools_not_json", {"line": 1, "column": 3})


def test_a_question_without_an_answer_is_marked_and_not_part_of_the_next_prompt():
    session = ChatSession()
    session.ask(NOWHERE, ChatOptions(), "q1")
    finished(session, error=ErrorMessage("unreachable", {"url": "u"}))
    assert session.conversation.path()[-1].error == ErrorMessage("unreachable", {"url": "u"})
    session.ask(NOWHERE, ChatOptions(), "q2")
    assert session.conversation.prompt() == said("q2")
    finished(session, text="a2")
    session.regenerate(NOWHERE, ChatOptions(), session.conversation.path()[0])
    assert session.conversation.prompt() == said("q2", "a2", "q1")  # asked again, at the end
    finished(session, text="a1")
    assert [node.message["content"] for node in session.conversation.path()] == ["q2", "a2", "q1", "a1"]


def test_an_empty_answer_is_kept_visible_and_its_round_is_not_sent_again():
    session = ChatSession()
    session.ask(NOWHERE, ChatOptions(), "q1")
    finished(session, text=" \n", finish_reason="stop")
    assert [node.message["content"] for node in session.conversation.path()] == ["q1", " \n"]
    session.ask(NOWHERE, ChatOptions(), "q2")
    assert session.conversation.prompt() == said("q2")
    session.stop_answers()


def test_two_models_answer_one_question_and_continue_their_own_conversations():
    session, options = ChatSession(), ChatOptions(model="a", compare_model="b")
    for question in ("q1", "q2"):
        session.ask(NOWHERE, options, question)
        for side, running in session.running.items():
            running.task.done.wait(60)
            running.task.answer.error, running.task.answer.text = None, f"{question} of {side}"
        session.finish_answers()
    texts = [[node.message["content"] for node in session.conversation.path(side)] for side in (0, 1)]
    assert texts == [["q1", "q1 of 0", "q2", "q2 of 0"], ["q1", "q1 of 1", "q2", "q2 of 1"]]
    assert [node.model for node in session.conversation.path(1)] == ["", "b", "", "b"]
    session.ask(NOWHERE, ChatOptions(model="a"), "q3")  # without a comparison the first side is continued
    assert len(session.conversation.leaves) == 1
    assert session.conversation.prompt()[1]["content"] == "q1 of 0"
    session.stop_answers()


def test_a_continued_answer_grows_and_keeps_its_place():
    session = talk(*said("q", "一二"))
    session.continue_answer(NOWHERE, ChatOptions(), session.conversation.path()[-1], "继续")
    finished(session, text="三", finish_reason="stop")
    assert session.conversation.prompt() == said("q", "一二三")


def test_demo_tools_run_by_themselves_and_stop_at_a_limit():
    session, options = talk(*said("q")), ChatOptions()
    for number in range(MAX_TOOL_RESULTS):
        calls = [{**call(str(number)), "function": {"name": "calculate", "arguments": '{"expression": "2 * 3"}'}}]
        session.conversation.add(
            {"role": "assistant", "content": "", "tool_calls": calls}, session.conversation.leaves[0]
        )
        assert session.run_demo_tools(NOWHERE, options)
        assert session.conversation.path()[-1].message["content"] == '{"result": 6}'
        session.running.clear()
    session.conversation.add({"role": "assistant", "content": "", "tool_calls": calls}, session.conversation.leaves[0])
    assert not session.run_demo_tools(NOWHERE, options)


def test_the_oldest_round_is_dropped_first_and_system_and_last_question_are_kept():
    system = [{"role": "system", "content": "s"}]
    assert drop_oldest_round(system + said("q1", "a1", "q2")) == system + said("q2")
    assert drop_oldest_round(system + said("q2")) is None


def test_tools_are_accepted_in_both_forms():
    plain = parse_tools(EXAMPLE_TOOLS)
    assert [tool["function"]["name"] for tool in plain] == ["get_weather", "calculate", "current_time", "roll_dice"]
    assert parse_tools('[{"type": "function", "function": {"name": "f"}}]') == [
        {"type": "function", "function": {"name": "f"}}
    ]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "1", "[1]", '[{"name": ""}]', '[{"name": "a b"}]', "[" * 100000])
def test_invalid_tools_are_an_error_message(text):
    error = parse_tools(text)
    assert isinstance(error, ErrorMessage)
    assert error.values
    assert ChatOptions(tool_mode=True, tools=text).to_request() == error
    assert isinstance(ChatOptions(tool_mode=False, tools=text).to_request(), CompletionRequest)


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("(1 + 2) * 3", {"result": 9}),
        ("7 // 2 - -1", {"result": 4}),
        ("2 ** 10", {"result": 1024.0}),
        ("1 / 0", {"error": "ZeroDivisionError: division by zero"}),
    ],
)
def test_the_calculator_computes(expression, result):
    assert json.loads(run_tool(calculation(expression))) == result


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "9 ** 9 ** 9",
        "2 ** 10000",
        "x",
        "'a' * 10**9",
        "1" * 300,
        "(" * 150,
        "",
        "a.b",
    ],
)
def test_the_calculator_refuses_everything_but_arithmetic(expression):
    assert list(json.loads(run_tool(calculation(expression)))) == ["error"]


def test_a_tool_that_the_page_does_not_have_is_left_to_the_visitor():
    assert run_tool(call("1")) is None


def calculation(expression: str) -> dict:
    return {"id": "1", "function": {"name": "calculate", "arguments": json.dumps({"expression": expression})}}
