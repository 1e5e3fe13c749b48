"""DSPy: its JSON adapter asks for response_format, and in the prompt where that is refused.

Its streams and its tools need fields that its own prompt describes, which only a real model writes.
"""

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # prices from the package, not from the network

import dspy
from contract import MODEL, PERSON_QUESTION, QUESTION, UNKNOWN_MODEL, run

dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=False)


class Extract(dspy.Signature):
    text: str = dspy.InputField()
    name: str = dspy.OutputField()
    age: int = dspy.OutputField()


def model(url, name=MODEL):
    return dspy.LM(f"openai/{name}", api_base=url, api_key="unused", num_retries=0)


def chat(url):
    return model(url)(QUESTION)[0]


def structured(url):
    with dspy.context(lm=model(url), adapter=dspy.JSONAdapter()):
        return dict(dspy.Predict(Extract)(text=PERSON_QUESTION).items())


def error(url):
    try:
        return model(url, UNKNOWN_MODEL)(QUESTION)
    except Exception as error:  # noqa: BLE001 - the message is what is shown
        return str(error)


if __name__ == "__main__":
    run(globals())
