"""LiteLLM, as a library."""

import json
import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # prices from the package, not from the network

import litellm
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


class Person(BaseModel):
    name: str
    age: int


WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def ask(url, messages, name=MODEL, **fields):
    return litellm.completion(
        model=f"openai/{name}", api_base=url, api_key="unused", messages=messages, max_retries=0, **fields
    )


def user(text):
    return [{"role": "user", "content": text}]


def chat(url):
    return ask(url, user(QUESTION)).choices[0].message.content


def stream(url):
    chunks = ask(url, user(QUESTION), stream=True)
    return [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]


def tool_loop(url):
    messages = user(WEATHER_QUESTION)
    while True:
        message = ask(url, messages, tools=[WEATHER_TOOL]).choices[0].message
        if not message.tool_calls:
            return message.content
        messages.append(message)
        for call in message.tool_calls:
            result = get_weather(**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})


def structured(url):
    answer = ask(url, user(PERSON_QUESTION), response_format=Person)
    return by_response_format(json.loads(answer.choices[0].message.content))


def error(url):
    try:
        return ask(url, user(QUESTION), UNKNOWN_MODEL)
    except litellm.NotFoundError as error:
        return str(error)


if __name__ == "__main__":
    run(globals())
