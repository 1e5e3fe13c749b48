"""OpenAI's own client on /v1/responses: answers and the arguments of calls, parsed."""

import openai
from contract import MODEL, PERSON_QUESTION, WEATHER_QUESTION, run
from pydantic import BaseModel


class Person(BaseModel):
    name: str
    age: int


class Weather(BaseModel):
    city: str


def responses(url):
    return openai.OpenAI(base_url=url, api_key="unused", max_retries=0).responses


def structured(url):
    request = {"model": MODEL, "input": PERSON_QUESTION, "text_format": Person}
    parsed = responses(url).parse(**request)
    with responses(url).stream(**request) as events:
        streamed = events.get_final_response()
    return [answer.output_parsed.model_dump() for answer in (parsed, streamed)]


def tool_loop(url):
    tool = openai.pydantic_function_tool(Weather, name="get_weather")
    function = {"type": "function", **tool["function"]}
    (call,) = responses(url).parse(model=MODEL, input=WEATHER_QUESTION, tools=[function]).output
    return [call.name, call.parsed_arguments]


if __name__ == "__main__":
    run(globals())
