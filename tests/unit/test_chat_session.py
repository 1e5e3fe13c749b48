"""Conversations: history, context length, streaming, tool calls."""

import itertools
import json
import re
import threading
from dataclasses import fields
from pathlib import Path

import pytest

import entrypoints
from entrypoints.chat_format.prompt import Message, as_messages
from entrypoints.chat_format.sampling import Sampling
from entrypoints.chat_format.tool_calls import ToolCall
from entrypoints.chat_session import Chat, with_reply
from entrypoints.engines.options import EngineOptions
from entrypoints.engines.transformers.engine import TransformersEngine
from entrypoints.errors import UserError
from entrypoints.families import CHATGLM3

GREEDY = {"temperature": 0, "max_new_tokens": 12}


@pytest.fixture
def chat(toy_engine):
    return Chat(toy_engine)


@pytest.fixture
def resized(toy_engine):
    """Creates the tiny model with another context length; it records its prompts in `prompts`."""

    class Recording(TransformersEngine):
        def generate(self, prompt, *settings, **named):
            self.prompts.append(list(prompt))
            yield from super().generate(prompt, *settings, **named)

    def make(context_length):
        engine = Recording(toy_engine.model, toy_engine.tokenizer, toy_engine.prompt_format, context_length)
        engine.prompts = []
        return engine

    return make


def finished(chat, turns, **sampling):
    """The complete reply."""
    *_, (reply, _) = chat.reply(as_messages(turns), Sampling(**{**GREEDY, **sampling}))
    return reply


def test_two_lines_load_a_model_and_generate_an_answer(toy_native):
    chat = entrypoints.load_chat(toy_native, EngineOptions(device="cpu", dtype="float32"))
    response, history = chat.chat("你好", history=[], **GREEDY)
    assert history == [
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": response, "metadata": ""},
    ]


def test_an_unknown_sampling_parameter_is_an_error_that_lists_the_known_ones(chat):
    with pytest.raises(UserError, match=r"unknown sampling parameter max_length, do_sample; use max_new_tokens, temp"):
        chat.chat("你好", max_length=10, do_sample=True)


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_the_documentation_lists_every_sampling_parameter_with_its_default(page):
    text = (Path(entrypoints.__file__).parent / "chat_format" / page).read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| (`.*?) \| (.*?) \|", text.split("chat.chat(")[1], re.M))
    listed = {name: default for names, default in table.items() for name in re.findall(r"`(\w+)`", names)}
    sampling = {each.name: each.default for each in fields(Sampling) if each.name not in ("top_logprobs", "cache_salt")}
    assert [*listed] == [*sampling]
    numbers = {name: default for name, default in sampling.items() if default is not None}
    assert {name: float(listed[name]) for name in numbers} == numbers


def test_a_missing_folder_is_reported_before_anything_slow(tmp_path):
    with pytest.raises(UserError, match="folder not found"):
        entrypoints.load_chat(tmp_path / "nothing")


def test_the_history_survives_json_and_is_not_modified_in_place(chat):
    _, history = chat.chat("你好", **GREEDY)
    again = json.loads(json.dumps(history))
    _, longer = chat.chat("裙子", again, **GREEDY)
    assert again == history == longer[:2]
    assert [turn["role"] for turn in longer] == ["user", "assistant", "user", "assistant"]


def test_pairs_and_dicts_as_history_give_the_same_answer(chat):
    """Histories of ChatGLM2 and ChatGLM3 differ; users have both."""
    dicts = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "您好"}]
    answers = {chat.chat("裙子", history, **GREEDY)[0] for history in ([["你好", "您好"]], [("你好", "您好")], dicts)}
    assert len(answers) == 1


def test_an_invalid_turn_is_rejected_with_its_index(chat):
    with pytest.raises(UserError, match="turn 1 of the history"):
        chat.chat("裙子", [["你好", "您好"], "a"])


@pytest.mark.parametrize("query", [None, 5, ["你好"], {"role": "user", "content": "你好"}])
def test_a_query_that_is_not_a_string_is_rejected(query, chat):
    with pytest.raises(UserError, match="the query is"):
        chat.chat(query)


def test_a_streamed_answer_only_grows_and_ends_as_the_complete_one(chat):
    """From the first token on; a chunk that is revised later could not be unprinted."""
    for length in (1, 2, 3, 12):
        sampling = {**GREEDY, "max_new_tokens": length}
        parts = list(chat.stream_chat("裙子", **sampling))
        texts = [text for text, _ in parts]
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
        assert parts[-1] == chat.chat("裙子", **sampling)
        assert [history[-1]["content"] for _, history in parts] == texts


def test_an_emoji_is_streamed_as_one_chunk(scripted):
    """It has four ids of one byte each; an incomplete character must not become U+FFFD."""
    chat = Chat(scripted([243, 162, 148, 142, 2]))
    assert [text for text, _ in chat.stream_chat("你好", **GREEDY)] == ["👋", "👋"]


@pytest.mark.parametrize("stop", range(3))
def test_every_stop_id_ends_the_answer_and_is_not_in_its_text(stop, scripted, toy_tokenizer):
    """</s>, <|user|> and <|observation|>."""
    ids = toy_tokenizer.encode("裙子的设计")
    chat = Chat(scripted([*ids, toy_tokenizer.stop_ids[stop], 300, 301]))
    reply = finished(chat, [["a", "b"], {"role": "user", "content": "c"}])
    assert (reply.answer.content, reply.finish_reason) == ("裙子的设计", "stop")
    assert reply.completion_tokens == len(ids)


def test_a_reply_counts_its_tokens_and_reports_that_it_was_cut(scripted, toy_tokenizer):
    chat = Chat(scripted([*toy_tokenizer.encode("裙子的设计很好看"), 2]))
    reply = finished(chat, [{"role": "user", "content": "a"}], max_new_tokens=3)
    prompt = chat.engine.prompt_format.encode([{"role": "user", "content": "a"}], toy_tokenizer)
    assert (reply.finish_reason, reply.completion_tokens, reply.prompt_tokens) == ("length", 3, len(prompt))


def test_an_answer_that_uses_all_allowed_tokens_without_a_stop_id_counts_as_cut(scripted, toy_tokenizer):
    """Only a stop id shows that the answer is complete."""
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


def test_a_long_conversation_drops_its_oldest_turns_and_keeps_its_structure(resized, toy_tokenizer):
    """30 questions with a context length of 128; the system prompt and the special tokens must remain."""
    engine = resized(128)
    turns = [
        Message("system", "用中文"),
        *as_messages([[f"问题{n}", "好"] for n in range(29)]),
        Message("user", "最后"),
    ]
    reply = finished(Chat(engine), turns)
    (prompt,) = engine.prompts
    kept = [turns[0], *turns[1 + reply.dropped_turns :]]
    names = {toy_tokenizer.special_token_id(name): name for name in CHATGLM3.special_tokens}
    assert 0 < reply.dropped_turns < 58
    assert prompt == engine.prompt_format.encode(kept, toy_tokenizer)
    assert [names.get(id_) for id_ in (*prompt[:3], prompt[-1])] == ["[gMASK]", "<sop>", "<|system|>", "<|assistant|>"]
    assert reply.prompt_tokens == len(prompt) <= 128 - 12


def test_a_conversation_of_30_turns_never_exceeds_the_context_length(resized):
    """As a user does it: each answer becomes part of the history."""
    chat, history = Chat(resized(64)), [{"role": "system", "content": "短"}]
    for number in range(30):
        _, history = chat.chat(f"问题{number}", history, temperature=0, max_new_tokens=8)
    assert len(history) == 1 + 2 * 30
    assert len(chat.engine.prompts) == 30
    assert max(len(prompt) for prompt in chat.engine.prompts) <= 64 - 8
    assert all(prompt[:3] == chat.engine.prompts[0][:3] for prompt in chat.engine.prompts)


def test_a_question_over_the_context_length_is_rejected_with_both_numbers_and_the_next_is_answered(
    resized, toy_tokenizer
):
    """200 characters, context length 64."""
    chat = Chat(resized(64))
    length = len(chat.engine.prompt_format.encode([{"role": "user", "content": "字" * 200}], toy_tokenizer))
    with pytest.raises(UserError, match=f"{length} tokens and 52 fit"):
        chat.chat("字" * 200, **GREEDY)
    assert chat.engine.prompts == []
    assert chat.chat("好", **GREEDY)[1][0]["content"] == "好"


def test_half_of_the_context_remains_for_the_prompt_however_many_tokens_are_requested(resized):
    chat = Chat(resized(64))
    reply = finished(
        chat, [*[[f"问题{n}", "好"] for n in range(9)], {"role": "user", "content": "裙"}], max_new_tokens=5000
    )
    assert reply.prompt_tokens <= 32
    assert reply.prompt_tokens + reply.completion_tokens <= 64


class ToolCallingEngine:
    """Returns prepared answers: the tiny model cannot call tools."""

    def __init__(self, engine, answers):
        self.tokenizer, self.prompt_format, self.context_length = (
            engine.tokenizer,
            engine.prompt_format,
            engine.context_length,
        )
        self.answers = answers

    def generate(self, *_, **__):
        yield from self.answers.pop(0)


def test_a_tool_call_and_its_result_go_through_the_history(toy_engine, toy_tokenizer):
    call = "```python\ntool_call(city='北京')\n```"
    spoken = [*toy_tokenizer.encode("get_weather\n"), *toy_tokenizer.encode(call)]
    chat = Chat(ToolCallingEngine(toy_engine, [spoken, toy_tokenizer.encode("晴")]))
    tools = [{"name": "get_weather"}, {"type": "function", "function": {"name": "other"}}]
    response, history = chat.chat("北京天气", [{"role": "system", "content": "助手", "tools": tools}])
    assert response == ""
    assert history[0]["tools"] == tools
    assert history[-1] == {"role": "assistant", "content": call, "metadata": "get_weather"}
    turns = [*as_messages(json.loads(json.dumps(history))), Message("observation", "31C")]
    reply = finished(chat, turns)
    assert [turn.content for turn in with_reply(turns, reply)][-2:] == ["31C", "晴"]


def test_text_before_a_tool_call_is_a_separate_turn(toy_engine, toy_tokenizer):
    call = "tool_call()"
    spoken = [
        *toy_tokenizer.encode("查一下"),
        toy_tokenizer.special_token_id("<|assistant|>"),
        *toy_tokenizer.encode("look\n"),
        *toy_tokenizer.encode(f"```\n{call}\n```"),
    ]
    turns = as_messages(
        [{"role": "system", "content": "", "tools": [{"name": "look"}]}, {"role": "user", "content": "a"}]
    )
    reply = finished(Chat(ToolCallingEngine(toy_engine, [spoken])), turns)
    assert reply.answer.tool_calls == [ToolCall("look", {}, f"```\n{call}\n```")]
    assert [(turn.content, turn.metadata) for turn in with_reply(turns, reply)[2:]] == [
        ("查一下", ""),
        (f"```\n{call}\n```", "look"),
    ]


def test_concurrent_conversations_on_one_engine_do_not_mix(chat):
    """Four at the same time; each gives the answers that it gives alone."""
    queries = ["裙子", "上衣*风格#简约", "你好", "裤"]
    alone = {query: chat.chat(f"{query}还有吗", chat.chat(query, **GREEDY)[1], **GREEDY) for query in queries}
    together = {}

    def converse(query):
        own = Chat(chat.engine)
        together[query] = own.chat(f"{query}还有吗", own.chat(query, **GREEDY)[1], **GREEDY)

    threads = [threading.Thread(target=converse, args=(query,)) for query in queries]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
    assert len({response for response, _ in alone.values()}) > 1
