"""OpenAI's own client."""

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


def user(text):
    return [{"role": "user", "content": text}]


def completions(url):
    return openai.OpenAI(base_url=url, api_key="unused", max_retries=0).chat.completions


def chat(url):
    return completions(url).create(model=MODEL, messages=user(QUESTION)).choices[0].message.content


def stream(url):
    chunks = completions(url).create(model=MODEL, messages=user(QUESTION), stream=True)
    return [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]


def tool_loop(url):
    messages = user(WEATHER_QUESTION)
    while True:
        message = completions(url).create(model=MODEL, messages=messages, tools=[WEATHER_TOOL]).choices[0].message
        if not message.tool_calls:
            return message.content
        messages.append(message)
        for call in message.tool_calls:
            result = get_weather(**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})


def structured(url):
    answer = completions(url).parse(model=MODEL, messages=user(PERSON_QUESTION), response_format=Person)
    return by_response_format(answer.choices[0].message.parsed.model_dump())


def error(url):
    try:
        return completions(url).create(model=UNKNOWN_MODEL, messages=user(QUESTION))
    except openai.NotFoundError as error:
        return str(error)


if __name__ == "__main__":
    run(globals())
