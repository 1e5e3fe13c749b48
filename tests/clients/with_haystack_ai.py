"""Haystack: OpenAIChatGenerator with tools and a callback for the stream."""

import os

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"

import json

from contract import (
    MODEL,
    PERSON_QUESTION,
    QUESTION,
    UNKNOWN_MODEL,
    WEATHER_QUESTION,
    by_response_format,
    get_weather,
    run,
)  # fmt: skip
from haystack.components.agents import Agent
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.tools import create_tool_from_function
from haystack.utils import Secret
from pydantic import BaseModel


class Person(BaseModel):
    name: str
    age: int


def generator(url, name=MODEL, **options):
    key = Secret.from_token("unused")
    return OpenAIChatGenerator(api_key=key, model=name, api_base_url=url, max_retries=0, **options)


def ask(url, text, name=MODEL, **options):
    return generator(url, name, **options).run([ChatMessage.from_user(text)])["replies"][0].text


def chat(url):
    return ask(url, QUESTION)


def stream(url):
    pieces = []
    ask(url, QUESTION, streaming_callback=lambda chunk: pieces.append(chunk.content))
    return [piece for piece in pieces if piece]


def tool_loop(url):
    agent = Agent(chat_generator=generator(url), tools=[create_tool_from_function(get_weather)])
    return agent.run([ChatMessage.from_user(WEATHER_QUESTION)])["messages"][-1].text


def structured(url):
    options = {"generation_kwargs": {"response_format": Person}}
    return by_response_format(json.loads(ask(url, PERSON_QUESTION, **options)))


def error(url):
    try:
        return ask(url, QUESTION, UNKNOWN_MODEL)
    except Exception as error:  # noqa: BLE001 - the message is what is shown
        return str(error)


if __name__ == "__main__":
    run(globals())
