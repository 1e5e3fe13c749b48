"""smolagents: the model alone, and its agent, which requires a call in each step and ends with one."""

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
)
from smolagents import ChatMessage, LogLevel, OpenAIServerModel, ToolCallingAgent, tool

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def model(url, name=MODEL):
    return OpenAIServerModel(name, api_base=url, api_key="unused", client_kwargs={"max_retries": 0})


def user(text):
    return [ChatMessage("user", text)]


def chat(url):
    return model(url).generate(user(QUESTION)).content


def stream(url):
    return [delta.content for delta in model(url).generate_stream(user(QUESTION)) if delta.content]


def tool_loop(url):
    agent = ToolCallingAgent([tool(get_weather)], model(url), max_steps=3, verbosity_level=LogLevel.OFF)
    return agent.run(WEATHER_QUESTION)


def structured(url):
    response_format = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    return by_response_format(
        json.loads(model(url).generate(user(PERSON_QUESTION), response_format=response_format).content)
    )


def error(url):
    try:
        return model(url, UNKNOWN_MODEL).generate(user(QUESTION)).content
    except Exception as error:  # noqa: BLE001 - the message is what is shown
        return str(error)


if __name__ == "__main__":
    run(globals())
