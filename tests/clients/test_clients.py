"""Real clients against real engines: each must show what the table of the serving guide says."""

import pytest
from client_table import script, table
from contract import ANSWER, CITY, NOT_FOUND, PERSON, STEPS, WEATHER_ANSWER

CLIENTS = [pytest.param(client, script(client), id=client) for client in table()]


@pytest.mark.parametrize("engine", ["transformers", "llamacpp"])
@pytest.mark.parametrize(("client", "script"), CLIENTS)
def test_a_client_shows_what_the_guide_says(client, script, engine, shown):
    steps = shown(script)[engine]
    assert {step: result["failed"] for step, result in steps.items() if "failed" in result} == {}
    chat, stream, tool_loop, structured, error = table()[client][1]
    claimed = dict(zip(STEPS, (chat, stream, tool_loop, structured, error), strict=True))
    assert set(steps) == {step for step, cell in claimed.items() if cell}
    results = {step: result["shown"] for step, result in steps.items()}
    assert results["chat"] == ANSWER
    assert NOT_FOUND in results["error"]
    if stream:
        assert "".join(results["stream"]) == ANSWER
        assert len(results["stream"]) > 1
    if tool_loop:
        assert steps["tool_loop"]["calls"] == [CITY]
        assert results["tool_loop"] == WEATHER_ANSWER or "31" in results["tool_loop"]
    kind = results["structured"].pop("by", "prompt")
    assert (kind, results["structured"]) == (structured.strip("`"), PERSON)
