"""The evaluation harness lm-eval scores a multiple-choice task over the API, with equal results on every engine."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
import torch
from conftest import FOLDER, VENV
from serving_process import GLM, serving
from transformers import GlmForCausalLM

from entrypoints.checkpoint.tokenizer import load_tokenizer

REPOSITORY = FOLDER.parents[1]
TASK = FOLDER / "lm_eval"
ROWS = [json.loads(line) for line in (TASK / "clothes.jsonl").read_text(encoding="utf-8").splitlines()]
# of a sum over up to 20 tokens; llama.cpp computes in half precision
TOLERANCE = {"transformers": 1e-3, "llamacpp": 3e-2, "vllm": 1e-3}
VLLM_VENV = Path(os.environ.get("VLLM_VENV", REPOSITORY / ".venv-vllm"))


@pytest.fixture(scope="module")
def url_of(
    toy_native: Path, toy_gguf: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], str]]:
    """Address of a server with the untrained tiny model by engine; each starts when it is first needed."""
    folder, urls = tmp_path_factory.mktemp("toys"), {}
    flags = {
        "transformers": [toy_native, "--dtype", "float32"],
        "llamacpp": [toy_gguf],
        "vllm": [toy_native, "--dtype", "float32", "--engine", "vllm"],
    }
    with ExitStack() as running:

        def get(engine: str) -> str:
            if engine == "vllm" and not (VLLM_VENV / ".ready").is_file():
                pytest.skip("needs the environment of vLLM: make test-vllm runs this")
            if engine not in urls:
                glm = [str(VLLM_VENV / "bin" / "python"), *GLM[1:]] if engine == "vllm" else GLM
                command = [*glm, "serve", "--served-model-name", "toy", "--model", *flags[engine]]
                urls[engine] = running.enter_context(serving(command, folder / engine)).wait_ready(300).url
            return urls[engine]

        yield get


@pytest.fixture(scope="module")
def expected(toy_native: Path) -> list[list[float]]:
    """Log probability of each choice of each row, from the logits of transformers."""
    tokenizer, model = load_tokenizer(toy_native), GlmForCausalLM.from_pretrained(toy_native, dtype=torch.float32)
    start = [tokenizer.special_token_id(name) for name in ("[gMASK]", "<sop>")]

    def score(context: str, continuation: str) -> float:
        ids, whole = ([*start, *tokenizer.encode(text)] for text in (context, context + continuation))
        with torch.inference_mode():
            logprobs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        return sum(float(logprobs[place - 1, whole[place]]) for place in range(len(ids), len(whole)))

    return [[score(f"问题：{row['question']}\n回答：", choice) for choice in row["choices"]] for row in ROWS]


def run_harness(task: str, model: str, arguments: str, output: Path, *flags: str) -> tuple[dict[int, dict], dict]:
    """Samples by row and the results of a task of the folder lm_eval."""
    command = [VENV / "bin" / "lm_eval", "--model", model, "--model_args", arguments, "--tasks", task]
    command += ["--include_path", TASK.relative_to(REPOSITORY), "--output_path", output, "--log_samples", *flags]
    environment = {**os.environ, "HF_HOME": str(output / "hf"), "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = output.rglob(f"samples_{task}_*.jsonl")
    found = map(json.loads, samples.read_text(encoding="utf-8").splitlines())
    (results,) = output.rglob("results_*.json")
    return {sample["doc_id"]: sample for sample in found}, json.loads(results.read_text())["results"][task]


def test_a_task_with_generated_answers_runs_through_chat_completions(url_of, tmp_path):
    """As GSM8K does; the answers are those that a client gets for the same question."""
    url = f"{url_of('transformers')}/v1/chat/completions"
    arguments = f"model=toy,base_url={url},num_concurrent=2"
    samples, results = run_harness(
        "clothes_open", "local-chat-completions", arguments, tmp_path, "--apply_chat_template"
    )
    assert len(samples) == len(ROWS) == 6
    expected = []
    for row in ROWS:
        body = {"model": "toy", "messages": [{"role": "user", "content": row["question"]}], "temperature": 0}
        reply = httpx.post(url, json={**body, "max_tokens": 8, "stop": ["\n"]}, timeout=60)
        expected.append(reply.json()["choices"][0]["message"]["content"])
    assert [samples[number]["resps"][0][0] for number in range(6)] == expected
    right = [answer == row["choices"][row["answer"]] for answer, row in zip(expected, ROWS, strict=True)]
    assert results["exact_match,none"] == pytest.approx(sum(right) / 6)


@pytest.mark.parametrize("engine", list(TOLERANCE))
def test_every_engine_gives_the_scores_of_the_logits(engine, url_of, expected, toy_native, tmp_path):
    arguments = (
        f"model=toy,base_url={url_of(engine)}/v1/completions,tokenizer={toy_native},tokenizer_backend=huggingface,"
        "add_bos_token=True,max_length=1024,num_concurrent=2"
    )
    samples, results = run_harness("clothes", "local-completions", arguments, tmp_path)
    found = {number: [float(response[0][0]) for response in sample["resps"]] for number, sample in samples.items()}
    assert len(found) == len(ROWS) == 6
    for number, scores in enumerate(expected):
        assert found[number] == pytest.approx(scores, abs=TOLERANCE[engine]), number
    right = [scores.index(max(scores)) == row["answer"] for scores, row in zip(expected, ROWS, strict=True)]
    assert results["acc,none"] == pytest.approx(sum(right) / len(right))
