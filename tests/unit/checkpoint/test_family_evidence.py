"""The family of a folder is identified by its files, which are read as text; otherwise it is rejected."""

import json
import shutil

import pytest

from entrypoints.checkpoint.conversion import convert_to_native, original_format
from entrypoints.checkpoint.family_evidence import families_in_name
from entrypoints.errors import UserError

# written for this test after the public notes on each file
CHATGLM3_MODELING = "class R:\n    def forward(self):\n        base = base * self.rope_ratio\n"
CHATGLM2_32K_MODELING = "class R:\n    def forward(self):\n        seq_idx = torch.arange(n) / self.rope_ratio\n"
CHATGLM3_TOKENIZATION = "class T:\n    def build_chat_input(self, query): ...\n    def build_prompt(self): ...\n"
CHATGLM2_TOKENIZATION = "class T:\n    def build_prompt(self, query, history=None): ...\n"


@pytest.fixture
def folder(toy_original, tmp_path):
    """The toy without anything that names its family."""
    target = shutil.copytree(toy_original, tmp_path / "original")
    edit(target, _name_or_path=None)
    return target


def edit(folder, **changed):
    config = json.loads((folder / "config.json").read_text()) | changed
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def family_of(folder, requested=None):
    return original_format(folder, requested).family


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("THUDM/chatglm3-6b-32k", "chatglm3"),
        ("/data/models/ChatGLM2-6B-32k/", "chatglm2"),
        ("C:\\models\\chatglm2_6b", "chatglm2"),
        ("someone/CodeGeeX2-6B-int4", "codegeex2"),
    ],
)
def test_the_name_in_the_configuration_tells_the_family(name, family, folder):
    edit(folder, _name_or_path=name)
    assert family_of(folder) == family


@pytest.mark.parametrize("name", ["", "chatglm-6b", "chatglm3/checkpoint-500", None, 5, "llama", "chatglm2/../x"])
def test_other_names_tell_nothing(name):
    assert families_in_name(name) == set()


@pytest.mark.parametrize(
    ("file", "text", "family"),
    [
        ("modeling_chatglm.py", CHATGLM2_32K_MODELING, "chatglm2"),
        ("tokenization_chatglm.py", CHATGLM2_TOKENIZATION, "chatglm2"),
        ("modeling_chatglm.py", CHATGLM3_MODELING, "chatglm3"),
        ("tokenization_chatglm.py", CHATGLM3_TOKENIZATION, "chatglm3"),
    ],
)
def test_code_is_stronger_than_family_and_must_agree_with_names(file, text, family, folder):
    other = {"chatglm2": "chatglm3", "chatglm3": "chatglm2"}[family]
    (folder / file).write_text(text)
    assert family_of(folder, family) == family
    with pytest.raises(UserError, match=rf"different model families \({file}: .*; --family: {other}\)"):
        family_of(folder, other)
    edit(folder, _name_or_path=f"THUDM/{other}-6b")
    with pytest.raises(UserError, match=rf"{file}: .*; _name_or_path of config.json: {other}\)"):
        family_of(folder)
    edit(folder, _name_or_path=f"THUDM/{family}-6b")
    assert family_of(folder) == family


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2\n", "is a Git LFS pointer.*git lfs pull"),
        (b"", "is empty; download the file again"),
    ],
)
@pytest.mark.parametrize("requested", [None, "glm4"])
def test_a_vocabulary_that_git_left_out_is_named_and_not_taken_for_another_family(requested, content, problem, folder):
    """Without Git LFS a clone of GLM-4 has no ranks in tokenizer.model, as if it were a file of sentencepiece."""
    edit(folder, _name_or_path="THUDM/glm-4-9b-chat")
    (folder / "tokenization_chatglm.py").write_text("class ChatGLM4Tokenizer: ...\n")
    (folder / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match=f"tokenizer.model {problem}"):
        original_format(folder, requested)


def test_code_is_read_as_text_and_never_run(folder, tmp_path):
    (folder / "modeling_chatglm.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n{CHATGLM3_MODELING}")
    (folder / "tokenization_chatglm.py").write_bytes(b"\xff\xfe not python " + CHATGLM3_TOKENIZATION.encode())
    assert family_of(folder) == "chatglm3"
    assert not (tmp_path / "ran").exists()


def test_the_record_of_a_download_tells_the_family_before_the_configuration(folder):
    edit(folder, _name_or_path="THUDM/chatglm3-6b")
    (folder / "download.json").write_text(json.dumps({"model": "THUDM/chatglm2-6b-32k"}))
    assert family_of(folder) == "chatglm2"


def test_the_configuration_of_the_tokenizer_tells_the_family_last(folder):
    (folder / "tokenizer_config.json").write_text(json.dumps({"name_or_path": "THUDM/chatglm3-6b"}))
    assert family_of(folder) == "chatglm3"
    edit(folder, _name_or_path="THUDM/chatglm2-6b")
    assert family_of(folder) == "chatglm2"


def test_a_folder_that_names_no_family_is_refused_until_family_names_it(folder, tmp_path):
    with pytest.raises(UserError, match=r"cannot be identified: chatglm2 or .*chatglm3.*; name it with --family"):
        original_format(folder)
    convert_to_native(folder, tmp_path / "native", original_format(folder, "chatglm3"))
    assert json.loads((tmp_path / "native" / "prompt.json").read_text())["family"] == "chatglm3"


def test_a_name_of_two_families_is_refused(folder):
    edit(folder, _name_or_path="me/chatglm2-to-chatglm3")
    with pytest.raises(UserError, match="cannot be identified"):
        original_format(folder)


def test_family_must_agree_with_the_name_in_the_configuration(folder):
    edit(folder, _name_or_path="THUDM/chatglm2-6b")
    with pytest.raises(UserError, match=r"config.json: chatglm2 or codegeex2; --family: chatglm3\).* be corrected in"):
        original_format(folder, "chatglm3")
    assert family_of(folder, "codegeex2") == "codegeex2"  # equal to ChatGLM2 in everything that is converted
    edit(folder, _name_or_path="me/tuned")
    assert family_of(folder, "chatglm3") == "chatglm3"


def test_another_rotary_embedding_is_refused(folder):
    edit(folder, original_rope=False)
    with pytest.raises(UserError, match="original_rope=False"):
        original_format(folder, "chatglm3")


def test_a_template_that_the_vocabulary_cannot_express_is_refused(folder):
    with pytest.raises(UserError, match="ChatGLM2-6B has no prompt template 'chatglm3'; use round"):
        original_format(folder, "chatglm2", "chatglm3")
    assert original_format(folder, "chatglm2").template == "round"
    assert original_format(folder, "chatglm3", "round").template == "round"
