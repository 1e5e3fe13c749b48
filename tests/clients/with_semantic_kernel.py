"""Semantic Kernel: OpenAIChatCompletion with automatic function calls."""

import asyncio
import json

import openai
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
from semantic_kernel import Kernel
from semantic_kernel.connectors.ai import FunctionChoiceBehavior
from semantic_kernel.connectors.ai.open_ai import OpenAIChatCompletion, OpenAIChatPromptExecutionSettings
from semantic_kernel.contents import ChatHistory
from semantic_kernel.functions import kernel_function


class Person(BaseModel):
    name: str
    age: int


class Weather:
    @kernel_function(name="get_weather", description="Look up the weather of a city.")
    def get_weather(self, city: str) -> str:
        return get_weather(city)


def service(url, name=MODEL):
    return OpenAIChatCompletion(
        ai_model_id=name, async_client=openai.AsyncOpenAI(base_url=url, api_key="unused", max_retries=0)
    )


def ask(url, text, name=MODEL, kernel=None, **options):
    history = ChatHistory()
    history.add_user_message(text)
    settings = OpenAIChatPromptExecutionSettings(**options)
    answer = service(url, name).get_chat_message_content(history, settings, kernel=kernel)
    return str(asyncio.run(answer))


def chat(url):
    return ask(url, QUESTION)


def stream(url):
    async def pieces():
        history = ChatHistory()
        history.add_user_message(QUESTION)
        chunks = service(url).get_streaming_chat_message_content(history, OpenAIChatPromptExecutionSettings())
        return [str(chunk) async for chunk in chunks if str(chunk)]

    return asyncio.run(pieces())


def tool_loop(url):
    kernel = Kernel()
    kernel.add_plugin(Weather(), "weather")
    return ask(url, WEATHER_QUESTION, kernel=kernel, function_choice_behavior=FunctionChoiceBehavior.Auto())


def structured(url):
    return by_response_format(json.loads(ask(url, PERSON_QUESTION, response_format=Person)))


def error(url):
    try:
        return ask(url, QUESTION, UNKNOWN_MODEL)
    except Exception as error:  # noqa: BLE001 - the message is what is shown
        return str(error)


if __name__ == "__main__":
    run(globals())
