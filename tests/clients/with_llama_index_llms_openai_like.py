"""LlamaIndex: OpenAILike, the class for other servers of the API."""

import asyncio

from contract import MODEL, PERSON_QUESTION, QUESTION, UNKNOWN_MODEL, WEATHER_QUESTION, get_weather, run
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


class Profile(BaseModel):
    name: str
    age: int


def model(url, name=MODEL):
    return OpenAILike(
        model=name, api_base=url, api_key="unused", is_chat_model=True, is_function_calling_model=True, max_retries=0
    )


def user(text):
    return [ChatMessage(role="user", content=text)]


def chat(url):
    return model(url).chat(user(QUESTION)).message.content


def stream(url):
    return [chunk.delta for chunk in model(url).stream_chat(user(QUESTION)) if chunk.delta]


def tool_loop(url):
    async def loop():
        agent = FunctionAgent(tools=[FunctionTool.from_defaults(get_weather)], llm=model(url), streaming=False)
        return str(await agent.run(WEATHER_QUESTION))

    return asyncio.run(loop())


def structured(url):
    answer = model(url).structured_predict(Profile, PromptTemplate(PERSON_QUESTION))
    return {"by": "tool", **answer.model_dump()}


def error(url):
    try:
        return model(url, UNKNOWN_MODEL).chat(user(QUESTION))
    except Exception as error:  # noqa: BLE001 - the message is what is shown
        return str(error)


if __name__ == "__main__":
    run(globals())
