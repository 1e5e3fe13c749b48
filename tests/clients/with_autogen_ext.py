"""AutoGen: OpenAIChatCompletionClient in an AssistantAgent."""

import asyncio
import json

from autogen_agentchat.agents import AssistantAgent
from autogen_core.models import ModelFamily, UserMessage
from autogen_ext.models.openai import OpenAIChatCompletionClient
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
from pydantic import BaseModel

ABILITIES = {
    "vision": False, "function_calling": True, "json_output": True, "family": ModelFamily.UNKNOWN,
    "structured_output": True,
}  # fmt: skip


class Person(BaseModel):
    name: str
    age: int


def client(url, name=MODEL):
    return OpenAIChatCompletionClient(model=name, base_url=url, api_key="unused", model_info=ABILITIES, max_retries=0)


def user(text):
    return [UserMessage(content=text, source="user")]


def ask(url, text, name=MODEL, **options):
    return asyncio.run(client(url, name).create(user(text), **options)).content


def chat(url):
    return ask(url, QUESTION)


def stream(url):
    async def pieces():
        return [piece async for piece in client(url).create_stream(user(QUESTION)) if isinstance(piece, str)]

    return asyncio.run(pieces())


def tool_loop(url):
    agent = AssistantAgent("assistant", client(url), tools=[get_weather], reflect_on_tool_use=True, system_message=None)
    return asyncio.run(agent.run(task=WEATHER_QUESTION)).messages[-1].content


def structured(url):
    return by_response_format(json.loads(ask(url, PERSON_QUESTION, json_output=Person)))


def error(url):
    try:
        return ask(url, QUESTION, UNKNOWN_MODEL)
    except Exception as error:  # noqa: BLE001 - the message is what is shown
        return str(error)


if __name__ == "__main__":
    run(globals())
