"""The knowledge base of the serving guide runs as it is written, against both models of one server."""

import json
import os
import re
import subprocess

import contract
import known_model
import numpy as np
import pytest
from client_table import API
from embedding_models import write_bert
from serving_process import GLM, serving

EXAMPLE = re.compile(r"```python\n(from langchain_core\.vectorstores .*?)```", re.S)
TEXTS = ["退货须在签收后七天内申请。", "真丝裙子用冷水手洗，不可拧干。", "满两百元包邮。"]


@pytest.mark.parametrize("guide", ["README.md", "README.zh-CN.md"])
def test_the_example_of_the_guide_finds_facts_and_answers(guide, clients_python, tmp_path):
    (code,) = EXAMPLE.findall((API / guide).read_text(encoding="utf-8"))
    alphabet = "".join(dict.fromkeys("".join(TEXTS) + "怎么"))
    bge = write_bert(tmp_path / "bge.gguf", alphabet)
    model = known_model.write(tmp_path / "models")["llamacpp"]
    argv = [*GLM, "serve", "--model", model, "--served-model-name", "tuned", "--embeddings", bge.file]
    with serving(argv, tmp_path / "log") as server:
        program = code.replace("http://127.0.0.1:8000", server.wait_ready().url)
        assert program != code
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            [clients_python, "-c", program],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.stdout.strip() == contract.ANSWER, done.stderr
        assert server.metric('glm_requests_total{path="/v1/embeddings",status="200"}') == 2
    stored = list(json.loads((tmp_path / "knowledge.json").read_text(encoding="utf-8")).values())
    found = {one.get("text") or one["kwargs"]["text"]: one.get("vector") or one["kwargs"]["vector"] for one in stored}
    assert list(found) == TEXTS
    for text, vector in found.items():
        assert np.dot(vector, bge.vector(bge.ids(text))) > 0.999
