"""What every client asks, and the answers of the model that it asks. Imported in both environments: no packages here.

A script defines functions named after STEPS, each of which takes the base URL of the API and returns what its client
made of the answers. `run` calls them for each URL on the command line and prints one JSON object per step.
"""

import json
import sys
import traceback
from collections.abc import Callable, Mapping

MODEL = "toy"
STEPS = ("chat", "stream", "tool_loop", "structured", "error")

QUESTION = "你好，请介绍一下自己"
ANSWER = "我是答案已知的测试模型。"
WEATHER_QUESTION = "北京今天天气怎么样"
WEATHER = "晴，31度"  # what the tool get_weather returns
WEATHER_ANSWER = "今天北京晴天，最高31度，出门请防晒。"
CITY = "北京"
PERSON_QUESTION = "张三今年30岁，住在上海"
PERSON = {"name": "张三", "age": 30}
PERSON_JSON = '{"name":"张三","age":30}'
UNKNOWN_MODEL = "no-such-model"
NOT_FOUND = "not found; available models: toy"  # part of the API's message for it

calls: list[str] = []  # the city of each call of the tool


def get_weather(city: str) -> str:
    """Look up the weather of a city.

    Args:
        city: name of the city
    """
    calls.append(city)
    return WEATHER


def run(steps: Mapping[str, object]) -> None:
    """Run the steps of a script; a step that raises shows its traceback."""
    for url in sys.argv[1:]:
        for name in STEPS:
            if name in steps:
                print(json.dumps({"url": url, "step": name, **_outcome(steps[name], url)}), flush=True)


def _outcome(step: Callable[[str], object], url: str) -> dict[str, object]:
    calls.clear()
    try:
        return {"shown": step(url), "calls": list(calls)}
    except Exception:  # noqa: BLE001 - the test shows it
        return {"failed": traceback.format_exc(), "calls": list(calls)}


def by_response_format(answer: Mapping[str, object]) -> dict[str, object]:
    """The answer, marked as made by `response_format`."""
    return {"by": "response_format", **answer}
