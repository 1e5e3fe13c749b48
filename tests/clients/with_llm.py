"""The command `llm` and its library, with a model of extra-openai-models.yaml."""

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
from llm.default_plugins.openai_models import Chat
from pydantic import BaseModel


class Person(BaseModel):
    name: str
    age: int


def model(url, name=MODEL):
    found = Chat("local", model_name=name, api_base=url, supports_schema=True, supports_tools=True)
    found.needs_key, found.key = None, "unused"
    return found


def chat(url):
    return model(url).prompt(QUESTION, stream=False).text()


def stream(url):
    return [piece for piece in model(url).prompt(QUESTION) if piece]


def tool_loop(url):
    return model(url).chain(WEATHER_QUESTION, tools=[get_weather]).text()


def structured(url):
    return by_response_format(json.loads(model(url).prompt(PERSON_QUESTION, schema=Person, stream=False).text()))


def error(url):
    try:
        return model(url, UNKNOWN_MODEL).prompt(QUESTION, stream=False).text()
    except Exception as error:  # noqa: BLE001 - the message is what is shown
        return str(error)


if __name__ == "__main__":
    run(globals())
