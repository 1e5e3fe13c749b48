"""pydantic-ai: agents with tools; its default structured output is a tool."""

import asyncio

from contract import MODEL, PERSON_QUESTION, QUESTION, UNKNOWN_MODEL, WEATHER_QUESTION, get_weather, run
from pydantic import BaseModel
from pydantic_ai import Agent, ToolOutput
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Profile(BaseModel):
    name: str
    age: int


def agent(url, name=MODEL, **options):
    provider = OpenAIProvider(base_url=url, api_key="unused")
    return Agent(OpenAIChatModel(name, provider=provider), **options)


def chat(url):
    return agent(url).run_sync(QUESTION).output


def stream(url):
    async def pieces():
        async with agent(url).run_stream(QUESTION) as result:
            return [piece async for piece in result.stream_text(delta=True, debounce_by=None)]

    return asyncio.run(pieces())


def tool_loop(url):
    return agent(url, tools=[get_weather]).run_sync(WEATHER_QUESTION).output


def structured(url):
    return {
        "by": "tool",
        **agent(url, output_type=ToolOutput(Profile, name="Profile")).run_sync(PERSON_QUESTION).output.model_dump(),
    }


def error(url):
    try:
        return agent(url, UNKNOWN_MODEL).run_sync(QUESTION).output
    except ModelHTTPError as error:
        return str(error)


if __name__ == "__main__":
    run(globals())
