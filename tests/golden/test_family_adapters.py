"""Training, saving, loading and serving of adapters on the tiny checkpoints of the related families."""

import json

import pytest

from entrypoints.__main__ import main
from entrypoints.checkpoint.conversion import convert_to_native, original_format
from entrypoints.checkpoint.manifest import check_base_weights
from entrypoints.checkpoint.prompt_file import read_prompt_format
from entrypoints.errors import UserError

ROWS = [{"content": "你好", "summary": "你好！"}, {"content": "再见", "summary": "再见，明天见。"}]


@pytest.fixture(scope="module", params=["chatglm2-32k-tiny", "glm4-tiny"])
def native(request, golden_family, tmp_path_factory):
    source, folder = golden_family / request.param, tmp_path_factory.mktemp("adapters")
    convert_to_native(source, folder / "native", original_format(source))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS))
    return folder / "native"


@pytest.fixture(scope="module", params=["lora", "ptuning"])
def adapter(request, native):
    target = native.parent / request.param
    flags = {"model-name-or-path": native, "train-file": native.parent / "rows.jsonl", "output-dir": target}
    flags |= {"method": request.param, "max-steps": 2, "learning-rate": 0.1, "device": "cpu"}
    flags |= {"max-source-length": 48, "max-target-length": 24}
    assert main(["train", *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]) == 0
    return target


@pytest.mark.slow
def test_a_trained_adapter_is_saved_with_its_family_and_changes_the_answer(native, adapter, capsys):
    assert read_prompt_format(adapter) == read_prompt_format(native)
    answers = []
    for extra in ([], ["--adapter", str(adapter)]):
        flags = ["--prompt", "你好", "--temperature", "0", "--max-new-tokens", "6", "--dtype", "float32", "--json"]
        capsys.readouterr()
        assert main(["chat", "--model", str(native), *flags, *extra]) == 0
        answers.append(json.loads(capsys.readouterr().out)["response"])
    assert answers[0] != answers[1]


def test_an_adapter_of_another_family_is_refused_by_name(native, adapter, toy_native):
    family = read_prompt_format(native).family
    with pytest.raises(UserError, match=f"was made for the model family {family}, .* is of chatglm3"):
        check_base_weights(adapter, toy_native)
