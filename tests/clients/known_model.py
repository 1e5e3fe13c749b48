"""The model that the clients talk to, for both engines: the answers of contract.py."""

from pathlib import Path

from contract import ANSWER, CITY, PERSON_JSON, PERSON_QUESTION, WEATHER_ANSWER, WEATHER_QUESTION
from known_answers import Branch, write_model

from entrypoints.quantization.gguf_writer import write_gguf

START, RESULT = "<|assistant|>", "<|observation|>"
CALL = "\n```python\ntool_call("  # after the name of a tool, whether the model or the API wrote it
FINAL = "final_answer"  # a tool of agents that end with a call
CALLED = "Calling tools:"  # an agent that writes calls and results as texts has made its first call
PROFILE_TOOL = "Profile"  # a tool that a client adds for structured output and requires
PLUGIN = "weather-get_weather"  # a tool whose name has the name of its plugin
BRANCHES = (
    Branch(START, ANSWER, 4),
    Branch(START, PERSON_JSON, 0, ((PERSON_QUESTION, 6),)),
    Branch(START, f"get_weather{CALL}", 0, ((WEATHER_QUESTION, 6), (RESULT, -12)), end=""),
    Branch(START, f"{PLUGIN}{CALL}", -3, ((WEATHER_QUESTION, 6), (RESULT, -12), (PLUGIN, 6)), end=""),
    Branch(START, WEATHER_ANSWER, 0, ((RESULT, 8), (FINAL, -6))),
    Branch(START, f"{FINAL}{CALL}", -3, ((CALLED, 8), (FINAL, 6)), end=""),
    Branch(START, f"{PROFILE_TOOL}{CALL}", -6, end=""),  # only if the grammar of a required call allows nothing else
    Branch(CALL, f"city='{CITY}')\n```", 4, end=RESULT),
    Branch(CALL, "name='张三', age=30)\n```", 0, ((PERSON_QUESTION, 6),), end=RESULT),
    Branch(CALL, "answer='sunny, 31 degrees')\n```", -3, ((CALLED, 8), (FINAL, 6)), end=RESULT),
)


def write(folder: Path) -> dict[str, Path]:
    """Write the checkpoint and the GGUF file; the path for each engine."""
    model, file = folder / "model", folder / "model.gguf"
    write_model(model, BRANCHES)
    write_gguf(model, file, "f16")
    return {"transformers": model, "llamacpp": file}
