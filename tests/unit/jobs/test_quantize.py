"""`glm quantize`, and `glm chat` with what it makes."""

import json

import pytest

from entrypoints.__main__ import main
from entrypoints.checkpoint.gguf import open_gguf


@pytest.mark.parametrize("type_", ["q4_0", "q8_0", "f16"])
def test_each_type_is_written_and_answers(type_, toy_native, tmp_path, capsys):
    file = tmp_path / "new" / "out.gguf"
    assert main(["quantize", str(toy_native), str(file), "--type", type_]) == 0
    out, err = capsys.readouterr()
    assert out == f"{file}\n"
    assert f"{file.stat().st_size / 1e6:,.0f} MB" in err
    assert open_gguf(file).type == type_
    assert main(["chat", "--model", str(file), "--prompt", "你好", "--max-new-tokens", "8", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["finish_reason"], answer["completion_tokens"]) == ("length", 8)


def test_four_bits_are_the_default_and_smaller_than_eight(toy_native, toy_gguf, tmp_path):
    sizes = []
    for name, flags in (("four.gguf", []), ("eight.gguf", ["--type", "q8_0"])):
        assert main(["quantize", str(toy_native), str(tmp_path / name), *flags]) == 0
        sizes.append((tmp_path / name).stat().st_size)
    assert open_gguf(tmp_path / "four.gguf").type == "q4_0"
    assert sizes[0] < sizes[1] < toy_gguf.stat().st_size


def test_an_existing_file_ends_in_one_line(toy_native, toy_gguf, capsys):
    assert main(["quantize", str(toy_native), str(toy_gguf)]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"glm: {toy_gguf} exists; choose another name, or remove it"


def test_an_original_checkpoint_is_sent_to_convert_first(toy_original, tmp_path, capsys):
    assert main(["quantize", str(toy_original), str(tmp_path / "out.gguf")]) == 1
    assert "convert it first: glm convert" in capsys.readouterr().err
