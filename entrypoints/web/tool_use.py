"""Tools of the chat pages: their definitions as a visitor writes them, and demo tools that a page runs itself.

The demo tools compute only: they read no file and open no connection. The result of any other tool is typed in.
"""

import ast
import json
import operator
import random
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta, timezone
from typing import Any

from openai.types.chat import ChatCompletionFunctionToolParam
from pydantic import TypeAdapter, ValidationError

from entrypoints.api.openai_schema import Tool
from entrypoints.web.client import ToolCall
from entrypoints.web.request_errors import ErrorMessage

EXAMPLE_TOOLS = """\
[{
  "name": "get_weather",
  "description": "查询城市天气",
  "parameters": {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"]
  }
}, {
  "name": "calculate",
  "description": "计算算式，例如 (1 + 2) * 3",
  "parameters": {
    "type": "object",
    "properties": {"expression": {"type": "string"}},
    "required": ["expression"]
  }
}, {
  "name": "current_time",
  "description": "查询当前时间，utc_offset 为与 UTC 相差的小时数",
  "parameters": {
    "type": "object",
    "properties": {"utc_offset": {"type": "number"}}
  }
}, {
  "name": "roll_dice",
  "description": "掷骰子",
  "parameters": {
    "type": "object",
    "properties": {"sides": {"type": "integer"}}
  }
}]"""
MAX_EXPRESSION = 200  # characters
MAX_EXPONENT = 100
_OPERATORS: dict[type, Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def run_tool(call: ToolCall) -> str | None:
    """The result of a demo tool as JSON text, with the key `error` if it failed; None for any other tool."""
    tool = DEMO_TOOLS.get(call["function"]["name"])
    if tool is None:
        return None
    try:
        arguments = json.loads(call["function"]["arguments"] or "{}")
        result: dict[str, Any] = {"result": tool(arguments)}
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, SyntaxError, RecursionError) as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    return json.dumps(result, ensure_ascii=False)


def is_error(result: str) -> bool:
    """Whether a result of a tool reports an error: a JSON object with the key `error`."""
    try:
        value = json.loads(result)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and "error" in value


def _calculate(arguments: Mapping[str, Any]) -> float:
    expression = str(arguments["expression"])
    if len(expression) > MAX_EXPRESSION:
        raise ValueError(f"an expression has at most {MAX_EXPRESSION} characters")
    return _value(ast.parse(expression.strip(), mode="eval").body)


def _value(node: ast.expr) -> float:
    """Numbers and arithmetic operators only: no name is looked up and nothing is called."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value  # type: ignore[return-value]  # the line above leaves numbers only
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow) and abs(right) <= MAX_EXPONENT and abs(left) <= 1e6:
            return float(left**right)
        if type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](left, right)
    raise ValueError("only numbers and + - * / // % ** are allowed")


def _current_time(arguments: Mapping[str, Any]) -> str:
    zone = timezone(timedelta(hours=float(arguments.get("utc_offset", 0))))
    return datetime.now(zone).isoformat(timespec="seconds")


def _roll_dice(arguments: Mapping[str, Any]) -> int:
    return random.randint(1, int(arguments.get("sides", 6)))


DEMO_TOOLS: dict[str, Callable[[Mapping[str, Any]], object]] = {
    "calculate": _calculate,
    "current_time": _current_time,
    "roll_dice": _roll_dice,
}


def parse_tools(text: str) -> list[ChatCompletionFunctionToolParam] | ErrorMessage:
    """Tools in OpenAI's form or in ChatGLM3's plain form, returned in OpenAI's form."""
    try:
        given = json.loads(text)
        if not isinstance(given, list) or not given or not all(isinstance(tool, dict) for tool in given):
            return ErrorMessage("tools_not_a_list", {"form": '[{"name": …, "description": …, "parameters": {…}}]'})
        wrapped = [tool if "function" in tool else {"type": "function", "function": tool} for tool in given]
        return [_as_tool_param(tool) for tool in TypeAdapter(list[Tool]).validate_python(wrapped)]
    except ValidationError as error:
        tool, *path = error.errors()[0]["loc"]
        field = ".".join(str(part) for part in path if part != "function")
        return ErrorMessage("tools_bad_field", {"number": int(tool) + 1, "field": field})
    except json.JSONDecodeError as error:
        return ErrorMessage("tools_not_json", {"line": error.lineno, "column": error.colno})
    except (ValueError, RecursionError):
        return ErrorMessage("tools_not_json", {"line": 1, "column": 1})


def _as_tool_param(tool: Tool) -> ChatCompletionFunctionToolParam:
    given = tool.function
    param: ChatCompletionFunctionToolParam = {"type": "function", "function": {"name": given.name}}
    if given.description is not None:
        param["function"]["description"] = given.description
    if given.parameters is not None:
        param["function"]["parameters"] = given.parameters
    if given.strict is not None:
        param["function"]["strict"] = given.strict
    return param
