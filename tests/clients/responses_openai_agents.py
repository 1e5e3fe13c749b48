"""openai-agents in its default mode, which is /v1/responses: a loop of two tools, and the same as a stream."""

import asyncio
import os

import agents
import openai
from contract import MODEL, calls, get_weather, run

QUESTION = os.environ["TWO_TOOLS"]


def get_time(city: str, zone: int | None = None) -> str:
    """Look up the time in a city."""
    calls.append(f"time in {city}")
    return "8:00"


def agent(url):
    agents.set_tracing_disabled(True)
    agents.set_default_openai_client(openai.AsyncOpenAI(base_url=url, api_key="unused", max_retries=0))
    tools = [agents.function_tool(tool) for tool in (get_weather, get_time)]
    return agents.Agent("assistant", instructions="简短", model=MODEL, tools=tools)


def tool_loop(url):
    async def two_turns():
        result = await agents.Runner.run(agent(url), QUESTION)
        again = [*result.to_input_list(), {"role": "user", "content": "say 再见"}]
        return [result.final_output, (await agents.Runner.run(agent(url), again)).final_output]

    return asyncio.run(two_turns())


def stream(url):
    async def pieces():
        result = agents.Runner.run_streamed(agent(url), QUESTION)
        raw = [event.data async for event in result.stream_events() if event.type == "raw_response_event"]
        assert len(raw) > 20
        return [result.final_output, "".join(d.delta for d in raw if d.type == "response.output_text.delta")]

    return asyncio.run(pieces())


if __name__ == "__main__":
    run(globals())
