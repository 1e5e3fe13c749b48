"""instructor: structured output through a tool, its default mode. It has no tool loop."""

import instructor
import openai
from contract import MODEL, PERSON_QUESTION, QUESTION, UNKNOWN_MODEL, run
from pydantic import BaseModel


class Profile(BaseModel):
    name: str
    age: int


def client(url):
    return instructor.from_openai(openai.OpenAI(base_url=url, api_key="unused", max_retries=0))


def ask(url, text, response_model, name=MODEL, **fields):
    messages = [{"role": "user", "content": text}]
    return client(url).create(model=name, messages=messages, response_model=response_model, max_retries=0, **fields)


def chat(url):
    return ask(url, QUESTION, None).choices[0].message.content


def stream(url):
    chunks = ask(url, QUESTION, None, stream=True)
    return [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]


def structured(url):
    return {"by": "tool", **ask(url, PERSON_QUESTION, Profile).model_dump()}


def error(url):
    try:
        return ask(url, QUESTION, None, UNKNOWN_MODEL)
    except Exception as error:  # noqa: BLE001 - the message is what is shown
        return str(error)


if __name__ == "__main__":
    run(globals())
