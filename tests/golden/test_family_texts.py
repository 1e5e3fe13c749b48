"""Texts and prompts of ChatGLM2 and GLM-4 compared with their reference code."""

import json

import jinja2
import pytest
import transformers

from entrypoints.chat_format.answer_parser import decode
from entrypoints.checkpoint import native
from entrypoints.checkpoint.conversion import original_format
from entrypoints.checkpoint.tokenizer import VOCABULARY_FILE, Tokenizer, convert_vocabulary, load_tokenizer
from entrypoints.families import FAMILIES

CASES = {"chatglm2-tiny": (1503, 31), "glm4-tiny": (1923, 32)}


@pytest.fixture(scope="module", params=CASES)
def case(request, golden_family, tmp_path_factory):
    """Name, prompt format, tokenizer, and the same as another program loads it."""
    source, folder = golden_family / request.param, tmp_path_factory.mktemp("texts")
    prompt_format = original_format(source)
    backend = convert_vocabulary(source / VOCABULARY_FILE, FAMILIES[prompt_format.family])
    native.save_tokenizer(folder, backend)
    native.write_prompt_format(folder, prompt_format)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    other_program = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return request.param, prompt_format, load_tokenizer(folder), other_program


def rows(file, count):
    found = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(found) == count
    return found


def texts_of(case, golden_family):
    return rows(golden_family / f"{case[0]}.text_ids.jsonl", CASES[case[0]][0])


def chats_of(case, golden_family):
    return rows(golden_family / f"{case[0]}.chat_ids.jsonl", CASES[case[0]][1])


def names_a_special_token(text, tokenizer):
    return any(name in text for name in (*tokenizer.family.special_tokens, "</s>", "<unk>"))


@pytest.mark.slow
def test_all_texts_have_the_reference_ids_and_back(case, golden_family):
    _, _, tokenizer, _ = case
    found = texts_of(case, golden_family)
    assert [row["text"] for row in found if tokenizer.encode(row["text"]) != row["ids"]] == []
    assert [row["text"] for row in found if decode(row["ids"], tokenizer) != row["decoded"]] == []


def test_plain_transformers_gives_all_texts_the_reference_ids(case, golden_family):
    _, _, tokenizer, other = case
    plain = [row for row in texts_of(case, golden_family) if not names_a_special_token(row["text"], tokenizer)]
    assert len(plain) > 1400
    assert [row["text"] for row in plain if other(row["text"], add_special_tokens=False).input_ids != row["ids"]] == []


def test_all_conversations_have_the_reference_ids(case, golden_family):
    _, prompt_format, tokenizer, _ = case
    chats = chats_of(case, golden_family)
    assert [row["messages"] for row in chats if prompt_format.encode(row["messages"], tokenizer) != row["ids"]] == []


def test_the_chat_template_gives_the_reference_ids_or_rejects_names_of_special_tokens(case, golden_family):
    """GLM-4's published template encodes header and content together: white space that starts a content joins it."""
    _, _, tokenizer, other = case
    rejected = 0
    for row in chats_of(case, golden_family):
        options = {"add_generation_prompt": True, "return_dict": False}
        if names_a_special_token(json.dumps(row["messages"], ensure_ascii=False), tokenizer):
            rejected += 1
            with pytest.raises(jinja2.TemplateError, match="contains the text of a special token"):
                other.apply_chat_template(row["messages"], **options)
            continue
        found = other.apply_chat_template(row["messages"], **options)
        starts_with_space = any(turn["content"][:1].isspace() for turn in row["messages"])
        assert found == row["ids"] or (starts_with_space and found == row.get("ids_jinja")), row["messages"]
    assert rejected >= 1


@pytest.mark.slow
def test_no_text_becomes_a_control_id(golden_family):
    """The published template of GLM-4 lets texts become control ids; the reference code does not, nor does this."""
    source = golden_family / "glm4-tiny"
    family = FAMILIES["glm4"]
    tokenizer = Tokenizer(convert_vocabulary(source / VOCABULARY_FILE, family), family)
    spelled = [row for row in rows(golden_family / "glm4-tiny.text_ids.jsonl", 1923) if "ids_with_control" in row]
    assert len(spelled) == 9
    for row in spelled:
        assert max(row["ids_with_control"]) >= 151_329 > max(tokenizer.encode(row["text"]))
    prompt = original_format(source).encode([{"role": "user", "content": "".join(family.special_tokens)}], tokenizer)
    assert [id_ for id_ in prompt if id_ >= 151_329] == [151_331, 151_333, 151_336, 151_337]


def test_the_ids_of_control_tokens_are_those_of_the_reference(case):
    name, _, tokenizer, _ = case
    first = {"chatglm2-tiny": 64_789, "glm4-tiny": 151_329}[name]
    special = [tokenizer.special_token_id(token) for token in tokenizer.family.special_tokens]
    assert special == list(range(first, first + {"chatglm2-tiny": 5, "glm4-tiny": 14}[name]))
    assert tokenizer.stop_ids == {"chatglm2-tiny": (2,), "glm4-tiny": (151_329, 151_336, 151_338)}[name]
