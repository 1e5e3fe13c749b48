"""/v1/responses through OpenAI's client, which parses every event: create, stream, parse and a loop of two tools."""

import json

import openai
import pytest
from serving_process import SCRIPTED, serving

FUNCTIONS = [
    {"type": "function", "name": name, "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
    for name in ("get_weather", "get_time")
]
LOOP = "steps raw {}\n---\nraw {}\n---\nsay 北京晴，八点".format(
    *(f"{tool['name']}\n```python\ntool_call(city='北京')\n```" for tool in FUNCTIONS)
)


@pytest.fixture(scope="module")
def client(toy_native, tmp_path_factory):
    log = tmp_path_factory.mktemp("responses") / "log"
    with (
        serving([*SCRIPTED, "--model", toy_native, "--served-model-name", "toy"], log) as server,
        openai.OpenAI(base_url=f"{server.wait_ready().url}/v1", api_key="unused", max_retries=0) as client,
    ):
        yield client


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_a_loop_of_two_tools_ends_with_an_answer(client, stream):
    items, called = [{"role": "user", "content": LOOP}], []
    while True:
        fields = {"model": "toy", "input": items, "tools": FUNCTIONS}
        if stream:
            with client.responses.stream(**fields) as events:
                response = events.get_final_response()
        else:
            response = client.responses.create(**fields)
        items += response.output
        calls = [item for item in response.output if item.type == "function_call"]
        if not calls:
            break
        called += [(call.name, json.loads(call.arguments)) for call in calls]
        items += [{"type": "function_call_output", "call_id": call.call_id, "output": "八点"} for call in calls]
    assert called == [("get_weather", {"city": "北京"}), ("get_time", {"city": "北京"})]
    assert response.output_text == "北京晴，八点"


def test_a_streamed_text_arrives_in_parts(client):
    with client.responses.stream(model="toy", input="count 20") as stream:
        parts = [event.delta for event in stream if event.type == "response.output_text.delta"]
        assert stream.get_final_response().output_text == "".join(parts) == "01234567890123456789"
    assert len(parts) == 20


def test_a_failure_and_a_refusal_reach_the_client(client):
    events = list(client.responses.create(model="toy", input="fail 3", stream=True))
    assert events[-1].type == "response.failed"
    assert events[-1].response.error.message == "the engine failed"
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="toy", input="say x", previous_response_id="resp_1")
    assert (caught.value.param, caught.value.code) == ("previous_response_id", "unsupported_parameter")
