"""openai-agents in its chat completions mode."""

import asyncio

import agents
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

agents.set_tracing_disabled(True)
weather = agents.function_tool(get_weather)


class Person(BaseModel):
    name: str
    age: int


def agent(url, name=MODEL, **options):
    client = openai.AsyncOpenAI(base_url=url, api_key="unused", max_retries=0)
    return agents.Agent("assistant", model=agents.OpenAIChatCompletionsModel(name, client), **options)


def chat(url):
    return agents.Runner.run_sync(agent(url), QUESTION).final_output


def stream(url):
    async def pieces():
        events = agents.Runner.run_streamed(agent(url), QUESTION).stream_events()
        raw = [event.data async for event in events if event.type == "raw_response_event"]
        return [data.delta for data in raw if data.type == "response.output_text.delta"]

    return asyncio.run(pieces())


def tool_loop(url):
    return agents.Runner.run_sync(agent(url, tools=[weather]), WEATHER_QUESTION).final_output


def structured(url):
    result = agents.Runner.run_sync(agent(url, output_type=Person), PERSON_QUESTION)
    return by_response_format(result.final_output.model_dump())


def error(url):
    try:
        return agents.Runner.run_sync(agent(url, UNKNOWN_MODEL), QUESTION).final_output
    except openai.NotFoundError as error:
        return str(error)


if __name__ == "__main__":
    run(globals())
