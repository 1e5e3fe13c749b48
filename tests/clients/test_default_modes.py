"""Clients whose default mode is /v1/responses run a loop of two tools in it, complete and streamed."""

import pytest
from contract import PERSON
from serving_process import SCRIPTED, serving

ANSWER = "北京晴，八点"
CALL = "raw {}\n```python\ntool_call(city='北京')\n```"
TWO_TOOLS = "\n---\n".join(["steps " + CALL.format("get_weather"), CALL.format("get_time"), f"say {ANSWER}"])


@pytest.fixture(scope="module")
def url(toy_native, tmp_path_factory):
    log = tmp_path_factory.mktemp("scripted") / "log"
    with serving([*SCRIPTED, "--model", toy_native, "--served-model-name", "toy"], log) as server:
        yield f"{server.wait_ready().url}/v1"


@pytest.mark.parametrize(
    "file",
    [
        pytest.param("responses_openai_agents.py", id="openai-agents"),
        pytest.param("responses_ai_sdk_openai.mjs", id="Node: @ai-sdk/openai"),
    ],
)
def test_the_default_mode_runs_a_loop_of_two_tools(file, url, run_client, monkeypatch):
    monkeypatch.setenv("TWO_TOOLS", TWO_TOOLS)
    steps = run_client(file, {"scripted": url})["scripted"]
    refused = steps.pop("error", None)
    assert (refused is not None) == file.endswith(".mjs")
    if refused:  # with the remedy that the step `tool_loop` takes
        assert "the type 'item_reference' is not supported" in refused["shown"]
        assert "clients must set store to false" in refused["shown"]
    assert {step: result.get("failed") for step, result in steps.items()} == {"stream": None, "tool_loop": None}
    assert steps["tool_loop"]["shown"] == [ANSWER, "再见"]
    assert steps["stream"]["shown"] == [ANSWER, ANSWER]
    assert [result["calls"] for result in steps.values()] == [["北京", "time in 北京"]] * 2


def test_the_parsed_responses_of_openai_have_the_shape_of_the_schema(urls, run_client):
    """`client.responses.parse` with a text format and, as a stream, with `client.responses.stream`."""
    engines = run_client("responses_openai.py", urls)
    assert sorted(engines) == ["llamacpp", "transformers"]
    for steps in engines.values():
        assert {step: result.get("failed") for step, result in steps.items()} == {"structured": None, "tool_loop": None}
        assert steps["structured"]["shown"] == [PERSON, PERSON]
        assert steps["tool_loop"]["shown"] == ["get_weather", {"city": "北京"}]
