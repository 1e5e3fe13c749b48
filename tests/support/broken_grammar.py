"""Broken tool calls and broken messages by chance: the same ones for the same seed."""

import random
from collections.abc import Callable, Sequence

TEXTS = (
    "你好", "<|user|>", "<|assistant|>\n", "```", "python\n", "tool_call(", ")", "\n", " ", "\u2028", "\ud800", "👋",
    "\x00", "'", '"', "\\", "{", "a=1",
)  # fmt: skip
SOUND = ("1", "'北京'", "[1, 2]", "{'a': None}", "-1.5", "True")
BROKEN = (
    "1_000", "1e999", "nan", "1j", "b'x'", "...", "f'{1}'", '"\\ud800"', "'\\N{DASH}'", "u'x'", "0x" + "f" * 40,
    "9" * 5000,
    "open('/etc/passwd')", "__import__('os')", "lambda: 0", "x", "", "[" * 200 + "]" * 200, "(" * 100 + ")" * 100,
    "-" * 300 + "1", "{1: 2}", "{(): 1}", "{'a': {1, 2}}", "1 +", "'", "'''", "\\",
)  # fmt: skip
CLOCK = {"type": "function", "function": {"name": "clock"}}


class Grammar:
    """Makes bodies of chat requests, about half of them in order."""

    def __init__(self, seed: int | str) -> None:
        self.chance = random.Random(seed)

    def one(self, *choices: object) -> object:
        """One of them; a function is called."""
        choice = self.chance.choice(choices)
        return choice() if callable(choice) else choice

    def mostly(self, right: object, *wrong: object, share: float = 0.95) -> object:
        """The right one for that share, else one of the wrong ones."""
        return self.one(right) if self.chance.random() < share else self.one(*wrong)

    def text(self) -> str:
        return "".join(self.chance.choices(TEXTS, k=self.chance.randrange(8)))

    def value(self, depth: int = 0) -> object:
        """Any JSON value."""
        if depth > 3:
            return None
        return self.one(
            None, True, 0, -1, 1.5, 1e308, 10**30, "", self.text,
            lambda: [self.value(depth + 1) for _ in range(self.chance.randrange(3))],
            lambda: {self.text(): self.value(depth + 1) for _ in range(self.chance.randrange(3))},
        )  # fmt: skip

    def literal(self, depth: int = 0) -> str:
        """What might stand for a value in Python."""
        if depth > 4:
            return "1"
        inner = [self.literal(depth + 1) for _ in range(self.chance.randrange(3))]
        nested = (f"[{', '.join(inner)}]", f"{{'k': {', '.join(inner) or 1}}}", f"({', '.join(inner)},)")
        return self.one(*(SOUND if self.chance.random() < 0.7 else BROKEN), *nested)

    def answer(self) -> str:
        """What a model might write in place of a tool call."""
        forms = ("**{}", "*{}", "{}", "ci ty={}", "if={}", "城市={}")
        arguments = [
            self.mostly("city={}", *forms, share=0.8).replace("{}", self.literal())
            for _ in range(self.chance.randrange(3))
        ]
        name = self.mostly("get_weather", "clock", "get_weather ", "nobody", "", "get_", share=0.7)
        head = self.mostly("```python\n", "```\n", "``", "", "```python", "```json\n", share=0.7)
        call = self.mostly("tool_call({})", "tool_call({}", "toolcall({})", "{}", "a.tool_call({})", share=0.7)
        tail = self.mostly("\n```", "```", "", "\n```\n再见", "\n``", share=0.7)
        return f"{name}\n{head}{call.replace('{}', ', '.join(arguments))}{tail}"

    def call(self) -> object:
        arguments = ('{"a": 1}', '{"a": [1, null]}', "", '{"\\ud800": 1}')
        return {
            "id": self.mostly(lambda: "c1", "", None, 5),
            "type": self.mostly(lambda: "function", "code", None),
            "function": self.mostly(
                lambda: {"name": "get_weather", "arguments": self.mostly(lambda: self.one(*arguments), "{", self.text)},
                {"name": self.text()}, {}, None, self.value,
            ),
        }  # fmt: skip

    def message(self) -> object:
        content = self.mostly(
            lambda: self.one(self.text, "", [{"type": "text", "text": self.text()}]), None, self.value
        )
        whole = {
            "role": self.mostly(
                lambda: self.one("user", "assistant", "system", "tool", "observation", "developer"), "root", None
            ),
            "content": content,
        }
        if whole["role"] == "assistant" and self.chance.random() < 0.5:
            whole |= {
                "tool_calls": [self.call() for _ in range(self.chance.randrange(1, 3))],
                "content": self.one(None, content),
            }
        for field, made in (
            ("tool_call_id", lambda: self.one("c1", None)), ("name", self.text), ("metadata", self.text),
            ("refusal", self.text),
        ):  # fmt: skip
            if self.chance.random() < 0.1:
                whole[field] = self.mostly(made, self.value)
        return self.mostly(lambda: whole, self.value, {**whole, self.text(): self.value()})

    def tool(self) -> object:
        parameters = {"type": "object", "properties": {self.text(): self.value()}}
        return {
            "type": self.mostly(lambda: "function", "web_search"),
            "function": {
                "name": self.mostly(lambda: self.one("get_weather", "clock"), "", "a b", self.text),
                "description": self.text(),
                "parameters": self.mostly(lambda: self.one({}, None, parameters), self.value),
            },
        }

    def body(self) -> dict:
        """A request; the last turn is a script whose answer is broken in some way."""
        body = {"messages": [self.message() for _ in range(self.chance.randrange(4))]}
        body["messages"].append({"role": "user", "content": "raw " + self.answer()})
        fields: Sequence[tuple[str, float, Callable]] = (
            ("tools", 0.7, lambda: [self.tool() for _ in range(self.chance.randrange(3))]),
            ("stream", 0.7, lambda: self.one(True, False, None)),
            ("n", 0.1, lambda: self.one(1, 2, None)),
            ("tool_choice", 0.2, lambda: self.one("none", "auto", "auto", "required", CLOCK)),
            ("stop", 0.2, lambda: self.one("a", ["你", "```"], [])),
            ("max_tokens", 0.2, lambda: self.one(1, 7, None)),
            ("logprobs", 0.1, lambda: self.one(True, False)),
            ("temperature", 0.1, lambda: self.one(0, 1e-300, 2)),
            ("seed", 0.1, lambda: self.one(0, -1, 2**63 - 1)),
            ("response_format", 0.05, lambda: self.one({"type": "text"}, {"type": "json_object"})),
            ("stream_options", 0.2, lambda: self.one({"include_usage": True}, None)),
        )
        for field, likely, made in fields:
            if self.chance.random() < likely:
                body[field] = self.mostly(made, self.value, 99, [""])
        return body
