"""The toy's own vocabulary against SentencePiece itself; ChatGLM3's is in tests/golden. Trap names: user-pains.md."""

import io
import pickle
import random
import shutil
import threading

import pytest
import sentencepiece
import tokenizers
import transformers

from entrypoints.answer import decode
from entrypoints.checkpoint.tokenizer import Tokenizer, convert_vocabulary, load_tokenizer
from entrypoints.errors import UserError
from entrypoints.prompt import CONTROL_TOKENS

AWKWARD = [
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
    *CONTROL_TOKENS,
]


@pytest.fixture(scope="module")
def pieces(toy_original):
    """The reference."""
    return sentencepiece.SentencePieceProcessor(model_file=str(toy_original / "tokenizer.model"))


@pytest.fixture(scope="module")
def texts(sample_rows):
    """Sample rows, awkward strings, and 500 random ones made of both; seed 0."""
    random_of, whole = random.Random(0), [row["summary"] for row in sample_rows]
    characters = sorted(set("".join(whole))) + AWKWARD
    mixed = ["".join(random_of.choices(characters, k=random_of.randint(1, 40))) for _ in range(500)]
    return [*whole, *AWKWARD, *mixed]


def test_ids_are_those_of_sentencepiece(pieces, texts, toy_tokenizer):
    assert len(texts) > 800
    assert [text for text in texts if toy_tokenizer.encode(text) != pieces.EncodeAsIds(text)] == []


def test_text_comes_back_as_sentencepiece_gives_it(pieces, texts, toy_tokenizer):
    encoded = [toy_tokenizer.encode(text) for text in texts]
    assert [ids for ids in encoded if decode(ids, toy_tokenizer) != pieces.DecodeIds(ids)] == []


def test_every_other_program_gets_the_same_ids(toy_native, texts, toy_tokenizer):
    """Texts that spell a control or end token are left out: plain transformers reads those as the token."""
    other = transformers.AutoTokenizer.from_pretrained(toy_native, local_files_only=True)
    plain = [text for text in texts if not any(token in text for token in (*CONTROL_TOKENS, "</s>", "<unk>"))]
    assert len(plain) > 400
    assert [
        text for text in plain if other(text, add_special_tokens=False).input_ids != toy_tokenizer.encode(text)
    ] == []


def test_a_saved_again_tokenizer_gives_the_same_ids_and_still_pads_left(toy_native, toy_tokenizer, tmp_path):
    """A6: what Trainer and friends write, loaded from its folder alone."""
    transformers.AutoTokenizer.from_pretrained(toy_native, local_files_only=True).save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    batch = again(["裙", "裙子的设计"], add_special_tokens=False, padding=True)
    assert (again.padding_side, again.eos_token, again.pad_token) == ("left", "</s>", "<unk>")
    assert batch.input_ids[1] == toy_tokenizer.encode("裙子的设计")
    assert batch.attention_mask[0][0] == 0
    assert load_tokenizer(tmp_path).encode("裙子的设计") == toy_tokenizer.encode("裙子的设计")


def test_control_ids_follow_the_last_piece_in_their_order(pieces, toy_tokenizer):
    size = pieces.GetPieceSize()
    assert [toy_tokenizer.control(name) for name in CONTROL_TOKENS] == list(range(size, size + len(CONTROL_TOKENS)))
    assert toy_tokenizer.size == size + len(CONTROL_TOKENS)


def test_stop_ids_are_the_end_and_the_tags_of_those_who_speak_next(toy_tokenizer):
    """C2: 2, <|user|> and <|observation|>."""
    tags = [toy_tokenizer.control(name) for name in ("<|user|>", "<|observation|>")]
    assert (list(toy_tokenizer.stop_ids), toy_tokenizer.eos_id, toy_tokenizer.pad_id) == ([2, *tags], 2, 0)


@pytest.mark.parametrize("token", [*CONTROL_TOKENS, "</s>", "<unk>", "<s>"])
def test_the_letters_of_a_control_token_are_letters(token, toy_tokenizer):
    """A3."""
    ids = toy_tokenizer.encode(f"a{token}b")
    silent = {toy_tokenizer.control(name) for name in CONTROL_TOKENS} | {0, 1, 2}
    assert not silent & set(ids)
    assert decode(ids, toy_tokenizer) == f"a{token}b"


@pytest.mark.parametrize(
    ("broken", "read"), [("a\ud83db", "a\ufffdb"), ("\udc4b裙", "\ufffd裙"), ("\ud83d\udc4b", "👋")]
)
def test_surrogates_count_as_the_character_of_a_pair_or_as_a_replacement_character(broken, read, toy_tokenizer):
    """json.loads of half an emoji gives one."""
    assert toy_tokenizer.encode(broken) == toy_tokenizer.encode(read)


def test_a_pickled_tokenizer_gives_the_same_ids(toy_tokenizer):
    """Workers that encode rows get one; the library forgets on the way that tags are letters."""
    again = pickle.loads(pickle.dumps(toy_tokenizer))
    assert all(again.encode(text) == toy_tokenizer.encode(text) for text in AWKWARD)


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
    """Train one as the toy's, but for what is changed."""
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
def test_a_vocabulary_of_another_kind_is_refused(changed, sample_rows, tmp_path):
    vocabulary(tmp_path / "tokenizer.model", [row["summary"] for row in sample_rows], **changed)
    with pytest.raises(UserError, match=r"tokenizer\.model .*use the vocabulary of ChatGLM3"):
        convert_vocabulary(tmp_path / "tokenizer.model")


@pytest.mark.parametrize("content", [b"", b"no vocabulary", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_damaged_vocabulary_is_refused_by_name(content, tmp_path):
    """B2."""
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.model is (no SentencePiece vocabulary|a Git LFS pointer)"):
        convert_vocabulary(tmp_path / "tokenizer.model")


def test_a_truncated_vocabulary_is_refused_by_name(toy_original, tmp_path):
    content = (toy_original / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"tokenizer\.model is no SentencePiece vocabulary"):
        convert_vocabulary(tmp_path / "tokenizer.model")


def test_a_missing_vocabulary_is_named(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.model does not exist"):
        convert_vocabulary(tmp_path / "tokenizer.model")
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_damaged_tokenizer_file_is_refused_by_name(content, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json (cannot be read|is a Git LFS pointer)"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_chatglm3s_control_tokens_is_refused(tmp_path):
    """GLM-4, for one, has the model type of ours and another vocabulary."""
    tokenizers.Tokenizer(tokenizers.models.BPE({"<unk>": 0, "</s>": 1, "a": 2}, [])).save(
        str(tmp_path / "tokenizer.json")
    )
    with pytest.raises(UserError, match=r"lacks \[MASK\].*<\|observation\|>; this is no ChatGLM3 vocabulary"):
        load_tokenizer(tmp_path)


def test_the_written_tokenizer_needs_nothing_beside_it(toy_native, toy_tokenizer, tmp_path):
    shutil.copy(toy_native / "tokenizer.json", tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, Tokenizer)
    assert loaded.encode("裙子") == toy_tokenizer.encode("裙子")
