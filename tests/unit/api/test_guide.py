"""The tables of the serving guide agree with the code, in both languages."""

import ast
import re
from pathlib import Path

import pytest
from asgi import send
from prometheus_client.parser import text_string_to_metric_families

from entrypoints.api.openai_schema import ChatRequest, CompletionRequest
from entrypoints.api.responses_schema import ResponsesRequest

API = Path(__file__).parents[3] / "entrypoints" / "api"
GUIDES = ("README.md", "README.zh-CN.md")
CODE_ARGUMENT = {"ApiError": 3, "ErrorReply": 3, "RequestRejected": 1}  # position of `code`


def rows(guide, heading_number):
    """Cells of the table in the n-th section."""
    section = re.split(r"^## ", (API / guide).read_text(encoding="utf-8"), flags=re.M)[heading_number]
    lines = [line for line in section.splitlines() if line.startswith("| `") or re.match(r"\| \d", line)]
    return [[cell.strip() for cell in line.strip("|").split(" |")] for line in lines]


def error_codes():
    """Every code that the API passes to one of its error classes."""
    for path in API.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CODE_ARGUMENT:
                position = CODE_ARGUMENT[node.func.id]
                values = [keyword.value for keyword in node.keywords if keyword.arg == "code"]
                values += node.args[position : position + 1]
                yield from (value.value for value in values if isinstance(value, ast.Constant))


@pytest.mark.parametrize("guide", GUIDES)
def test_the_guide_lists_every_metric(app, guide):
    body = {"messages": [{"role": "user", "content": "count 4"}]}
    send(app, "POST", "/v1/chat/completions", body)
    families = text_string_to_metric_families(send(app, "GET", "/metrics").body.decode())
    expected = []
    for family in families:
        if family.name.endswith("_created"):
            continue
        labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
        cells = [f"`{family.name}`", family.type, ", ".join(f"`{label}`" for label in labels), family.documentation]
        expected.append(cells if guide == "README.md" else cells[:3])
    assert len(expected) == 14
    assert [row[: len(expected[0])] for row in rows(guide, 9)] == sorted(expected)


@pytest.mark.parametrize("guide", GUIDES)
def test_the_guide_lists_every_error_code(guide):
    codes = set(error_codes())
    assert len(codes) == 17
    listed = {code for row in rows(guide, 6) for code in re.findall(r"`(\w+)`", row[2])}
    assert listed == codes | {"missing", "extra_forbidden"}


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize(("body", "column"), [(ChatRequest, 2), (CompletionRequest, 3)])
def test_the_guide_lists_every_request_field(guide, body, column):
    listed = [name for row in rows(guide, 3) if row[column] == "✓" for name in re.findall(r"`([a-z_]+)`", row[0])]
    expected = set(body.model_fields) - {"logprobs", "top_logprobs"}
    assert expected <= set(listed)
    assert set(listed) - set(body.model_fields) <= {"max_completion_tokens"}


@pytest.mark.parametrize("guide", GUIDES)
def test_the_guide_lists_every_field_of_a_response_request(guide):
    listed = [name for row in rows(guide, 11) for name in re.findall(r"`([a-z_]+)`", row[0])]
    assert sorted(listed) == sorted(ResponsesRequest.model_fields)


def test_both_languages_have_the_same_commands_and_sections():
    commands, counts = [], []
    for guide in GUIDES:
        text = (API / guide).read_text(encoding="utf-8")
        commands.append(re.findall(r"^\$ .*", text, re.M))
        counts.append((text.count("\n## "), text.count("\n|"), text.count("\n```")))
    assert commands[0] == commands[1]
    assert counts[0] == counts[1]
