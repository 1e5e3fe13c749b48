"""The real API with a scripted engine, as a process that a test can kill; every prompt is recorded in a file.

python recording_server.py MODEL PORT RECORD KEYS: tokenizer folder, output file with one JSON line per answer, keys.
In addition to the scripts, a tool result is quoted, unless there is a script of steps, and a few questions of the
screenshots have fixed answers.
"""

import json
import sys
from collections.abc import Generator
from pathlib import Path

import uvicorn
from scripted_engine import ScriptedEngine

from entrypoints.api.app import create_app
from entrypoints.api.auth import KeyRing
from entrypoints.api.state import ServerOptions, ServerState
from entrypoints.chat_format.answer_parser import decode
from entrypoints.chat_format.prompt import ROLES, PromptFormat
from entrypoints.checkpoint.tokenizer import load_tokenizer

CANNED = {
    "北京今天天气怎么样？": "raw get_weather\n ```python\ntool_call(city='北京')\n```",
    "你好": "你好！我是一个部署在本机的对话模型，可以帮你写文案、写代码，也能聊聊天。",
    "用 Python 写一个求平方和的函数，并给出公式": (
        "**函数**如下，输入 `n`，返回前 n 个正整数的平方和：\n\n```python\ndef squares(n: int) -> int:\n"
        "    return sum(k * k for k in range(1, n + 1))\n```\n\n它等于\n\n"
        "\\[\\sum_{k=1}^{n} k^2 = \\frac{n(n+1)(2n+1)}{6}\\]"
        "\n\n- 例如 $n=3$ 时，结果是 14\n- 对很大的 n，直接用公式更快"
    ),
}


class RecordingEngine(ScriptedEngine):
    """Records each prompt and the number of tokens generated for it."""

    def __init__(self, record: Path, *args: object, **options: object) -> None:
        super().__init__(*args, **options)
        self.record = record

    def generate(self, prompt, sampling, adapter=None, cancelled=None) -> Generator:
        said, turns = 0, self.turns(prompt)
        role, text = turns[-1]
        scripted = any(role == "user" and text.startswith("steps ") for role, text in turns)
        answer = f"工具说：{text}" if role == "observation" and not scripted else CANNED.get(text)
        acted = self.tokenizer.encode(answer if answer.startswith("raw ") else f"say {answer}") if answer else prompt
        try:
            for token in super().generate(acted, sampling, adapter, cancelled):
                said += 1
                yield token
        finally:
            line = {"turns": turns, "said": said, "temperature": sampling.temperature, "adapter": adapter}
            with self.record.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({**line, "top_p": sampling.top_p}, ensure_ascii=False) + "\n")

    def turns(self, prompt: list[int]) -> list[list[str]]:
        """[role, text] of each turn, decoded from the ids."""
        tags = {self.tokenizer.special_token_id(f"<|{role}|>"): role for role in ROLES}
        turns = []
        for id_ in prompt:
            if id_ in tags:
                turns.append([tags[id_], []])
            elif turns:
                turns[-1][1].append(id_)
        *complete, _ = turns  # the last one is the assistant's, which is not generated yet
        return [[role, decode(ids, self.tokenizer).removeprefix("\n").removeprefix(" ")] for role, ids in complete]


def main(model: str, port: str, record: str, keys: str) -> None:
    state = ServerState(ServerOptions(model="demo", slots=4), KeyRing(Path(keys)), "scripted")
    state.engine = RecordingEngine(
        Path(record), load_tokenizer(Path(model)), slots=4, adapters={"poet": PromptFormat()}
    )
    uvicorn.run(create_app(state), port=int(port), log_level="warning", timeout_graceful_shutdown=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
