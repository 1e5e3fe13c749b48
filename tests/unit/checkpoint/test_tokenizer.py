"""The tiny model's vocabulary against SentencePiece; ChatGLM3's own is tested in tests/golden."""

import io
import json
import pickle
import random
import shutil
import threading

import pytest
import sentencepiece
import tokenizers
import transformers

from entrypoints.chat_format.answer_parser import decode
from entrypoints.checkpoint.tokenizer import Tokenizer, convert_vocabulary, load_tokenizer
from entrypoints.errors import UserError
from entrypoints.families import CHATGLM3

EDGE_CASES = [
    "",
    " ",
    "  ",
    "\n",
    " a",
    "a ",
    "▁",
    "▁▁x",
    "\t表\r\n",
    "👋👨‍👩‍👧",
    "é①Ａ",
    "\u200b\ufeff",
    "<0x41>",
    "</s><unk>",
    *CHATGLM3.special_tokens,
]


@pytest.fixture(scope="module")
def pieces(toy_original):
    """The reference implementation."""
    return sentencepiece.SentencePieceProcessor(model_file=str(toy_original / "tokenizer.model"))


@pytest.fixture(scope="module")
def texts(sample_rows):
    """Sample rows, edge cases, and 500 random mixtures of both (seed 0)."""
    generator, complete = random.Random(0), [row["summary"] for row in sample_rows]
    characters = sorted(set("".join(complete))) + EDGE_CASES
    mixed = ["".join(generator.choices(characters, k=generator.randint(1, 40))) for _ in range(500)]
    return [*complete, *EDGE_CASES, *mixed]


def test_ids_equal_those_of_sentencepiece(pieces, texts, toy_tokenizer):
    assert len(texts) > 800
    assert [text for text in texts if toy_tokenizer.encode(text) != pieces.EncodeAsIds(text)] == []


def test_decoded_text_equals_that_of_sentencepiece(pieces, texts, toy_tokenizer):
    encoded = [toy_tokenizer.encode(text) for text in texts]
    assert [ids for ids in encoded if decode(ids, toy_tokenizer) != pieces.DecodeIds(ids)] == []


def test_plain_transformers_gives_the_same_ids(toy_native, texts, toy_tokenizer):
    """Except texts that contain the name of a special token, which plain transformers encodes as the token."""
    other = transformers.AutoTokenizer.from_pretrained(toy_native, local_files_only=True)
    plain = [text for text in texts if not any(token in text for token in (*CHATGLM3.special_tokens, "</s>", "<unk>"))]
    assert len(plain) > 400
    assert [
        text for text in plain if other(text, add_special_tokens=False).input_ids != toy_tokenizer.encode(text)
    ] == []


def test_a_tokenizer_saved_by_transformers_gives_the_same_ids_and_pads_left(toy_native, toy_tokenizer, tmp_path):
    """As the Trainer writes it, loaded from that folder."""
    transformers.AutoTokenizer.from_pretrained(toy_native, local_files_only=True).save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    batch = again(["裙", "裙子的设计"], add_special_tokens=False, padding=True)
    assert (again.padding_side, again.eos_token, again.pad_token) == ("left", "</s>", "<unk>")
    assert batch.input_ids[1] == toy_tokenizer.encode("裙子的设计")
    assert batch.attention_mask[0][0] == 0
    assert load_tokenizer(tmp_path).encode("裙子的设计") == toy_tokenizer.encode("裙子的设计")


def test_special_token_ids_follow_the_last_piece_in_order(pieces, toy_tokenizer):
    size = pieces.GetPieceSize()
    assert [toy_tokenizer.special_token_id(name) for name in CHATGLM3.special_tokens] == list(
        range(size, size + len(CHATGLM3.special_tokens))
    )
    assert toy_tokenizer.size == size + len(CHATGLM3.special_tokens)


def test_stop_ids_are_the_end_and_the_roles_that_follow_an_answer(toy_tokenizer):
    """2, <|user|> and <|observation|>."""
    roles = [toy_tokenizer.special_token_id(name) for name in ("<|user|>", "<|observation|>")]
    assert (list(toy_tokenizer.stop_ids), toy_tokenizer.eos_id, toy_tokenizer.pad_id) == ([2, *roles], 2, 0)


@pytest.mark.parametrize("token", [*CHATGLM3.special_tokens, "</s>", "<unk>", "<s>"])
def test_the_name_of_a_special_token_in_a_text_is_encoded_as_ordinary_characters(token, toy_tokenizer):
    """Otherwise a user could forge roles and end an answer."""
    ids = toy_tokenizer.encode(f"a{token}b")
    special = {toy_tokenizer.special_token_id(name) for name in CHATGLM3.special_tokens} | {0, 1, 2}
    assert not special & set(ids)
    assert decode(ids, toy_tokenizer) == f"a{token}b"


@pytest.mark.parametrize(
    ("broken", "read"), [("a\ud83db", "a\ufffdb"), ("\udc4b裙", "\ufffd裙"), ("\ud83d\udc4b", "👋")]
)
def test_surrogates_count_as_the_character_of_a_pair_or_as_a_replacement_character(broken, read, toy_tokenizer):
    """json.loads returns one for half an emoji."""
    assert toy_tokenizer.encode(broken) == toy_tokenizer.encode(read)


def test_a_pickled_tokenizer_gives_the_same_ids(toy_tokenizer):
    """Worker processes that encode rows receive one; pickling loses the library's settings for special tokens."""
    again = pickle.loads(pickle.dumps(toy_tokenizer))
    assert all(again.encode(text) == toy_tokenizer.encode(text) for text in EDGE_CASES)


def test_threads_share_a_tokenizer(toy_tokenizer, texts):
    expected, found = [toy_tokenizer.encode(text) for text in texts], {}

    def encode(number):
        found[number] = [toy_tokenizer.encode(text) for text in texts]

    threads = [threading.Thread(target=encode, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] == expected for number in range(4)] == [True] * 4


def vocabulary(file, texts, **changed):
    """Train one like the tiny model's, with changed settings."""
    model = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "vocab_size": 1400,
        "character_coverage": 1.0,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, **settings | changed)
    file.write_bytes(model.getvalue())


@pytest.mark.parametrize(
    "changed",
    [
        {"byte_fallback": False},
        {"model_type": "unigram"},
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
        {"add_dummy_prefix": False},
    ],
    ids=str,
)
def test_a_vocabulary_of_another_kind_is_rejected(changed, sample_rows, tmp_path):
    vocabulary(tmp_path / "tokenizer.model", [row["summary"] for row in sample_rows], **changed)
    with pytest.raises(UserError, match=r"tokenizer\.model .*use the vocabulary of ChatGLM3"):
        convert_vocabulary(tmp_path / "tokenizer.model")


@pytest.mark.parametrize("content", [b"", b"no vocabulary", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_damaged_vocabulary_is_rejected_by_name(content, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.model is (not a SentencePiece vocabulary|a Git LFS pointer)"):
        convert_vocabulary(tmp_path / "tokenizer.model")


def test_a_truncated_vocabulary_is_rejected_by_name(toy_original, tmp_path):
    content = (toy_original / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"tokenizer\.model is not a SentencePiece vocabulary"):
        convert_vocabulary(tmp_path / "tokenizer.model")


def test_a_missing_vocabulary_is_named(tmp_path):
    with pytest.raises(UserError, match=r"file not found: .*tokenizer\.model"):
        convert_vocabulary(tmp_path / "tokenizer.model")
    with pytest.raises(UserError, match=r"contains no tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_damaged_tokenizer_file_is_rejected_by_name(content, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json (is not valid JSON|is not a tokenizer|is a Git LFS pointer)"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_chatglm3s_special_tokens_is_rejected(tmp_path):
    """GLM-4, for example, has the same model type and another vocabulary."""
    tokenizers.Tokenizer(tokenizers.models.BPE({"<unk>": 0, "</s>": 1, "a": 2}, [])).save(
        str(tmp_path / "tokenizer.json")
    )
    with pytest.raises(UserError, match=r"lacks \[MASK\].*<\|observation\|>, so it is not a vocabulary of ChatGLM3-6B"):
        load_tokenizer(tmp_path)


def test_the_written_tokenizer_needs_no_other_file(toy_native, toy_tokenizer, tmp_path):
    shutil.copy(toy_native / "tokenizer.json", tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, Tokenizer)
    assert loaded.encode("裙子") == toy_tokenizer.encode("裙子")


def _set_prefix(content):
    content["model"]["continuing_subword_prefix"] = "long prefix"  # the library panics while it loads this


def _add_pattern(content):
    content["pre_tokenizer"] = {
        "type": "Split", "pattern": {"Regex": "(a|a)*$"}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip


def _remove_normalizer(content):
    content["normalizer"] = None


def _drop_merges_at_random(content):
    content["model"]["dropout"] = 0.5


def _repeat_an_id(content):
    content["model"]["vocab"]["▁"] = 5  # loads, but cannot be pickled


def _name_an_id_beyond_the_last(content):
    content["model"]["vocab"]["▁"] = 10**9


def _use_another_type_of_id(content):
    content["model"]["vocab"]["▁"] = "5"


def _replace_the_vocabulary(content):
    content["model"]["vocab"] = []


def _refer_to_a_missing_token(content):
    content["model"]["merges"].append(["no such", "piece"])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_set_prefix, "has another model than ChatGLM3"),
        (_add_pattern, "has another pre_tokenizer than ChatGLM3"),
        (_remove_normalizer, "has another normalizer than ChatGLM3"),
        (_drop_merges_at_random, "has another model than ChatGLM3"),
        (_repeat_an_id, "has ids that occur twice or are not from 0 to"),
        (_name_an_id_beyond_the_last, "has ids that occur twice or are not from 0 to"),
        (_use_another_type_of_id, "has ids that occur twice or are not from 0 to"),
        (_replace_the_vocabulary, "is not a tokenizer"),
        (_refer_to_a_missing_token, "cannot be read"),
    ],
)
def test_a_crafted_tokenizer_file_is_rejected_before_the_library_acts_on_it(
    change, problem, toy_native, tmp_path, capfd
):
    """A panic of the library would print a backtrace and end the process."""
    content = json.loads((toy_native / "tokenizer.json").read_text(encoding="utf-8"))
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=rf"tokenizer\.json {problem}"):
        load_tokenizer(tmp_path)
    assert capfd.readouterr().err == ""


def test_a_vocabulary_with_a_piece_that_is_not_utf8_is_rejected(toy_original, tmp_path):
    content = (toy_original / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(content.replace("类型".encode(), b"\xe7\xb1\xff\xff\xff\xff"))
    with pytest.raises(UserError, match=r"tokenizer\.model (has a piece that is not UTF-8|is not a SentencePiece)"):
        convert_vocabulary(tmp_path / "tokenizer.model")
