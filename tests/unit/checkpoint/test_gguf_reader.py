"""Opening a GGUF file: what is rejected, and with which message. Complete files: test_gguf_writer.py."""

import struct
import subprocess
import sys

import pytest

from entrypoints.checkpoint.gguf_reader import PROMPT_KEY, TOKENIZER_KEY, open_gguf
from entrypoints.errors import UserError


def pack(*, architecture=b"chatglm", pairs=(), version=3, tail=b""):
    """Bytes of a GGUF file with string values and no tensors."""
    entries = [(b"general.architecture", architecture), *pairs]
    texts = [struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, len(value)) + value for key, value in entries]
    return b"GGUF" + struct.pack("<IQQ", version, 0, len(entries)) + b"".join(texts) + tail


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "file not found"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
        (b"", "is not a GGUF file"),
        (b"PK\x03\x04 a zip", "is not a GGUF file"),
        (pack(version=2), "has GGUF version 2"),
        (pack(architecture=b"llama"), "architecture 'llama'"),
        (pack(), rf"created by another program: it lacks {TOKENIZER_KEY}, {PROMPT_KEY}"),
        (pack(pairs=[(TOKENIZER_KEY.encode(), b"{}"), (PROMPT_KEY.encode(), b"{}")]), "lacks 'chatglm.block_count'"),
        (pack()[:-3], "is truncated"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_unusable_file_is_rejected_with_the_reason(content, message, tmp_path):
    file = tmp_path / "model.gguf"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_gguf(file)


def test_a_folder_is_rejected_as_a_gguf_file(tmp_path):
    with pytest.raises(UserError, match="file not found"):
        open_gguf(tmp_path)


def test_a_file_truncated_anywhere_is_rejected(toy_gguf, tmp_path):
    """A complete header states the size of the file; an incomplete header is recognized itself."""
    content, file = toy_gguf.read_bytes(), tmp_path / "cut.gguf"
    for share in (0.00001, 0.001, 0.01, 0.1, 0.5, 0.9, 0.999):
        file.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(UserError, match=r"is truncated.*copy or create the file again"):
            open_gguf(file)


@pytest.mark.parametrize("offset", [4, 8, 16, 24, 60])
def test_a_damaged_header_is_a_user_error(offset, toy_gguf, tmp_path):
    content = bytearray(toy_gguf.read_bytes())
    content[offset : offset + 8] = b"\xff" * 8
    (tmp_path / "damaged.gguf").write_bytes(content)
    with pytest.raises(UserError, match=r"damaged\.gguf"):
        open_gguf(tmp_path / "damaged.gguf")


def _array(content, key):
    """Where type, length and values of an array begin."""
    start = content.index(key) + len(key) + 4
    return start, start + 4, start + 12


def _repeat_a_token(content):
    _, _, values = _array(content, b"tokenizer.ggml.tokens")
    end = values
    sizes = []
    for _ in range(2):
        sizes.append(8 + struct.unpack_from("<Q", content, end)[0])
        end += sizes[-1]
    texts = content[values : values + sizes[0]] * 2
    return content[:values] + texts + content[end:]


def _shorten_the_scores(content):
    _, length, values = _array(content, b"tokenizer.ggml.scores")
    count = struct.unpack_from("<Q", content, length)[0]
    return content[:length] + struct.pack("<Q", 1) + content[values : values + 4] + content[values + 4 * count :]


def _change_the_type_of_scores(content):
    kind, _, _ = _array(content, b"tokenizer.ggml.scores")
    return content[:kind] + struct.pack("<I", 5) + content[kind + 4 :]


def _rename(old, new):
    assert len(old) == len(new)
    return lambda content: content.replace(old, new)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_repeat_a_token, "the same token twice"),
        (_shorten_the_scores, r"tokenizer\.ggml\.scores of another type or length"),
        (_change_the_type_of_scores, r"tokenizer\.ggml\.scores of another type or length"),
        (_rename(b"tokenizer.ggml.token_type", b"tokenizer.ggml.token_typo"), r"another vocabulary \(.*token_typo\)"),
        (_rename(b"tokenizer.ggml.model", b"tokenizer.ggml.mode1"), "another vocabulary"),
    ],
)
def test_a_vocabulary_that_llama_cpp_would_abort_for_is_rejected(change, problem, toy_gguf, tmp_path):
    """It compares neither types nor lengths of these arrays, and asserts that no token occurs twice."""
    (tmp_path / "crafted.gguf").write_bytes(change(toy_gguf.read_bytes()))
    with pytest.raises(UserError, match=rf"crafted\.gguf is damaged: it has {problem}"):
        open_gguf(tmp_path / "crafted.gguf")


def test_opening_needs_no_torch(toy_gguf):
    """The image that serves GGUF files does not contain torch."""
    code = (
        "import sys; from pathlib import Path; from entrypoints.checkpoint.gguf_reader import open_gguf;"
        f"open_gguf(Path({str(toy_gguf)!r}));"
        "print(sorted({'torch', 'transformers', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
