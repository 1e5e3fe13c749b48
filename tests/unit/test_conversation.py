"""Trap names (A4, C2, C4, D3, D4, E1) are those of the list of reported pains."""

import itertools
import json
import threading

import pytest

import entrypoints
from entrypoints.answer import ToolCall
from entrypoints.conversation import Chat, answered
from entrypoints.engines.transformers_engine import TransformersEngine
from entrypoints.errors import UserError
from entrypoints.prompt import CONTROL_TOKENS, Message, as_messages
from entrypoints.sampling import Sampling

GREEDY = {"temperature": 0, "max_new_tokens": 12}


@pytest.fixture
def chat(toy_engine):
    return Chat(toy_engine)


@pytest.fixture
def windowed(toy_engine):
    """The toy with a window of its own; `prompts` of it are all that it was asked."""

    class Recording(TransformersEngine):
        def generate(self, prompt, *settings, **named):
            self.prompts.append(list(prompt))
            yield from super().generate(prompt, *settings, **named)

    def make(window):
        engine = Recording(toy_engine.model, toy_engine.tokenizer, toy_engine.prompt_format, window)
        engine.prompts = []
        return engine

    return make


def finished(chat, turns, **sampling):
    """The reply when it is done."""
    *_, (reply, _) = chat.reply(as_messages(turns), Sampling(**{**GREEDY, **sampling}))
    return reply


def test_two_lines_load_a_model_and_ask_it(toy_native):
    chat = entrypoints.load_chat(toy_native, device="cpu", dtype="float32")
    response, history = chat.chat("你好", history=[], **GREEDY)
    assert history == [
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": response, "metadata": ""},
    ]


def test_a_folder_that_cannot_work_is_told_before_anything_slow(tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        entrypoints.load_chat(tmp_path / "nothing")


def test_the_history_goes_back_in_through_json_and_is_not_changed_in_place(chat):
    _, history = chat.chat("你好", **GREEDY)
    again = json.loads(json.dumps(history))
    _, longer = chat.chat("裙子", again, **GREEDY)
    assert again == history == longer[:2]
    assert [turn["role"] for turn in longer] == ["user", "assistant", "user", "assistant"]


def test_pairs_and_dicts_as_history_give_the_same_answer(chat):
    """A4."""
    dicts = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "您好"}]
    answers = {chat.chat("裙子", history, **GREEDY)[0] for history in ([["你好", "您好"]], [("你好", "您好")], dicts)}
    assert len(answers) == 1


def test_a_bad_turn_is_refused_with_its_index(chat):
    with pytest.raises(UserError, match="turn 1 of the history"):
        chat.chat("裙子", [["你好", "您好"], "a"])


@pytest.mark.parametrize("query", [None, 5, ["你好"], {"role": "user", "content": "你好"}])
def test_a_query_that_is_no_text_is_refused(query, chat):
    with pytest.raises(UserError, match="the query is"):
        chat.chat(query)


def test_a_streamed_answer_only_grows_and_ends_as_the_whole_one(chat):
    """D3: for every number of tokens from the first on."""
    for length in (1, 2, 3, 12):
        sampling = {**GREEDY, "max_new_tokens": length}
        parts = list(chat.stream_chat("裙子", **sampling))
        texts = [text for text, _ in parts]
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
        assert parts[-1] == chat.chat("裙子", **sampling)
        assert [history[-1]["content"] for _, history in parts] == texts


def test_an_emoji_is_streamed_whole(scripted):
    """D2: four ids of one byte each."""
    chat = Chat(scripted([243, 162, 148, 142, 2]))
    assert [text for text, _ in chat.stream_chat("你好", **GREEDY)] == ["👋", "👋"]


@pytest.mark.parametrize("stop", range(3))
def test_every_stop_id_ends_the_answer_and_shows_in_no_text(stop, scripted, toy_tokenizer):
    """C2: </s>, <|user|>, <|observation|>."""
    ids = toy_tokenizer.encode("裙子的设计")
    chat = Chat(scripted([*ids, toy_tokenizer.stop_ids[stop], 300, 301]))
    reply = finished(chat, [["a", "b"], {"role": "user", "content": "c"}])
    assert (reply.answer.content, reply.finish_reason) == ("裙子的设计", "stop")
    assert reply.completion_tokens == len(ids)


def test_a_reply_counts_its_tokens_and_says_that_it_was_cut(scripted, toy_tokenizer):
    """D4: max_new_tokens 3."""
    chat = Chat(scripted([*toy_tokenizer.encode("裙子的设计很好看"), 2]))
    reply = finished(chat, [{"role": "user", "content": "a"}], max_new_tokens=3)
    prompt = chat.engine.prompt_format.encode([{"role": "user", "content": "a"}], toy_tokenizer)
    assert (reply.finish_reason, reply.completion_tokens, reply.prompt_tokens) == ("length", 3, len(prompt))


def test_an_answer_that_ends_with_the_last_allowed_token_before_its_stop_id_was_cut(scripted, toy_tokenizer):
    """Nobody knows whether more was to come; with room for the stop id it is known."""
    ids = toy_tokenizer.encode("裙子")
    chat = Chat(scripted([*ids, 2]))
    question = [{"role": "user", "content": "a"}]
    assert finished(chat, question, max_new_tokens=len(ids)).finish_reason == "length"
    assert finished(chat, question, max_new_tokens=len(ids) + 1).finish_reason == "stop"


def test_a_closed_reply_is_cancelled_and_the_next_one_is_answered(chat):
    answer = chat.reply(as_messages([{"role": "user", "content": "裙子"}]), Sampling(temperature=0, max_new_tokens=500))
    reply, _ = next(answer)
    answer.close()
    assert (reply.finish_reason, reply.completion_tokens) == ("cancelled", 1)
    assert finished(chat, [{"role": "user", "content": "裙子"}]).finish_reason == "length"


def test_a_long_chat_loses_its_oldest_turns_says_how_many_and_keeps_its_frame(windowed, toy_tokenizer):
    """C4: 30 questions in a window of 128."""
    engine = windowed(128)
    turns = [
        Message("system", "用中文"),
        *as_messages([[f"问题{n}", "好"] for n in range(29)]),
        Message("user", "最后"),
    ]
    reply = finished(Chat(engine), turns)
    (prompt,) = engine.prompts
    kept = [turns[0], *turns[1 + reply.dropped_turns :]]
    names = {toy_tokenizer.control(name): name for name in CONTROL_TOKENS}
    assert 0 < reply.dropped_turns < 58
    assert prompt == engine.prompt_format.encode(kept, toy_tokenizer)
    assert [names.get(id_) for id_ in (*prompt[:3], prompt[-1])] == ["[gMASK]", "<sop>", "<|system|>", "<|assistant|>"]
    assert reply.prompt_tokens == len(prompt) <= 128 - 12


def test_a_chat_of_30_turns_never_leaves_the_window(windowed):
    """C4: as a user does it, each answer going back in."""
    chat, history = Chat(windowed(64)), [{"role": "system", "content": "短"}]
    for number in range(30):
        _, history = chat.chat(f"问题{number}", history, temperature=0, max_new_tokens=8)
    assert len(history) == 1 + 2 * 30
    assert len(chat.engine.prompts) == 30
    assert max(len(prompt) for prompt in chat.engine.prompts) <= 64 - 8
    assert all(prompt[:3] == chat.engine.prompts[0][:3] for prompt in chat.engine.prompts)


def test_a_question_over_the_window_is_refused_with_both_numbers_and_the_next_is_answered(windowed, toy_tokenizer):
    """C4: 200 characters, window 64."""
    chat = Chat(windowed(64))
    length = len(chat.engine.prompt_format.encode([{"role": "user", "content": "字" * 200}], toy_tokenizer))
    with pytest.raises(UserError, match=f"{length} tokens and 52 fit"):
        chat.chat("字" * 200, **GREEDY)
    assert chat.engine.prompts == []
    assert chat.chat("好", **GREEDY)[1][0]["content"] == "好"


def test_asking_for_more_tokens_than_the_window_leaves_half_of_it_to_the_prompt(windowed):
    chat = Chat(windowed(64))
    reply = finished(
        chat, [*[[f"问题{n}", "好"] for n in range(9)], {"role": "user", "content": "裙"}], max_new_tokens=5000
    )
    assert reply.prompt_tokens <= 32
    assert reply.prompt_tokens + reply.completion_tokens <= 64


class Says:
    """Stands in for a model that calls a tool, which no toy is clever enough to do."""

    def __init__(self, engine, answers):
        self.tokenizer, self.prompt_format, self.window = engine.tokenizer, engine.prompt_format, engine.window
        self.answers = answers

    def generate(self, *_, **__):
        yield from self.answers.pop(0)


def test_a_tool_call_and_its_result_go_through_the_history(toy_engine, toy_tokenizer):
    call = "```python\ntool_call(city='北京')\n```"
    spoken = [*toy_tokenizer.encode("get_weather\n"), *toy_tokenizer.encode(call)]
    chat = Chat(Says(toy_engine, [spoken, toy_tokenizer.encode("晴")]))
    tools = [{"name": "get_weather"}, {"type": "function", "function": {"name": "other"}}]
    response, history = chat.chat("北京天气", [{"role": "system", "content": "助手", "tools": tools}])
    assert response == ""
    assert history[0]["tools"] == tools
    assert history[-1] == {"role": "assistant", "content": call, "metadata": "get_weather"}
    turns = [*as_messages(json.loads(json.dumps(history))), Message("observation", "31C")]
    reply = finished(chat, turns)
    assert [turn.content for turn in answered(turns, reply)][-2:] == ["31C", "晴"]


def test_text_before_a_call_stays_a_turn_of_its_own(toy_engine, toy_tokenizer):
    call = "tool_call()"
    spoken = [
        *toy_tokenizer.encode("查一下"),
        toy_tokenizer.control("<|assistant|>"),
        *toy_tokenizer.encode("look\n"),
        *toy_tokenizer.encode(f"```\n{call}\n```"),
    ]
    turns = as_messages(
        [{"role": "system", "content": "", "tools": [{"name": "look"}]}, {"role": "user", "content": "a"}]
    )
    reply = finished(Chat(Says(toy_engine, [spoken])), turns)
    assert reply.answer.tool_calls == [ToolCall("look", {}, f"```\n{call}\n```")]
    assert [(turn.content, turn.metadata) for turn in answered(turns, reply)[2:]] == [
        ("查一下", ""),
        (f"```\n{call}\n```", "look"),
    ]


def test_two_chats_share_an_engine_without_mixing(chat):
    """E1: four conversations at once, each as if it were alone."""
    queries = ["裙子", "上衣*风格#简约", "你好", "裤"]
    alone = {query: chat.chat(f"{query}还有吗", chat.chat(query, **GREEDY)[1], **GREEDY) for query in queries}
    together = {}

    def talk(query):
        own = Chat(chat.engine)
        together[query] = own.chat(f"{query}还有吗", own.chat(query, **GREEDY)[1], **GREEDY)

    threads = [threading.Thread(target=talk, args=(query,)) for query in queries]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
    assert len({response for response, _ in alone.values()}) > 1
