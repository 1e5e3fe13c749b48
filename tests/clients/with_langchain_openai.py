"""LangChain: ChatOpenAI with bound tools and structured output."""

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
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

weather = tool(get_weather)


class Person(BaseModel):
    name: str
    age: int


def model(url, name=MODEL):
    return ChatOpenAI(base_url=url, api_key="unused", model=name, max_retries=0)


def chat(url):
    return model(url).invoke(QUESTION).content


def stream(url):
    return [chunk.content for chunk in model(url).stream(QUESTION) if chunk.content]


def tool_loop(url):
    with_tools, messages = model(url).bind_tools([weather]), [HumanMessage(WEATHER_QUESTION)]
    while True:
        answer = with_tools.invoke(messages)
        if not answer.tool_calls:
            return answer.content
        messages += [answer, *(weather.invoke(call) for call in answer.tool_calls)]


def structured(url):
    structured_model = model(url).with_structured_output(Person, method="json_schema")
    return by_response_format(structured_model.invoke(PERSON_QUESTION).model_dump())


def error(url):
    try:
        return model(url, UNKNOWN_MODEL).invoke(QUESTION).content
    except Exception as error:  # noqa: BLE001 - the message is what is shown
        return str(error)


if __name__ == "__main__":
    run(globals())
