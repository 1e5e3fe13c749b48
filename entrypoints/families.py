"""The model families that share the architecture: one description each, and nothing about them anywhere else.

ChatGLM2, CodeGeeX2, ChatGLM3 and GLM-4 have the same layers and tensor names. They differ in what is written here.
Sources: the modeling, configuration and tokenization files of the models' repositories.
"""

from dataclasses import dataclass, replace
from typing import Literal

from entrypoints.errors import UserError

ROLE_TAGS = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
# `sop` and `eop` get brackets in tokenizer.json: other programs split text at its special tokens, and without brackets
# would split "people" too.
MASK_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>")


VISION_TOKENS = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")


@dataclass(frozen=True)
class Family:
    """One family of checkpoints."""

    name: str  # value of --family
    title: str  # in messages
    repository: str  # on Hugging Face; written to converted originals as `_name_or_path`
    names: tuple[str, ...]  # parts of a repository name, in lower case without separators, that belong to it only
    templates: tuple[str, ...]  # prompt templates that its vocabulary can express; the first is its own
    special_tokens: tuple[str, ...]  # in the order of their ids, which follow the last token of the vocabulary
    stop_tokens: tuple[str, ...] = ()  # end an answer, as `eos_token` does
    eos_token: str = "</s>"
    pad_token: str = "<unk>"
    vocabulary: Literal["sentencepiece", "tiktoken"] = "sentencepiece"  # what its tokenizer.model is
    tool_format: Literal["python", "json"] | None = None  # how a call is written
    text_end: str | None = None  # the token that training appends to an answer; None: `eos_token`
    call_end: str | None = None  # the same of a tool call
    # what `rope_ratio` changes: it multiplies the base of the rotary embedding, or divides the positions
    rope_ratio_scales: Literal["base", "positions"] = "base"
    tokenizer_class: str = "ChatGLMTokenizer"  # in the original tokenization_chatglm.py
    stops_in_config: bool = False  # whether the original config.json names all stop ids

    @property
    def blank_before_text(self) -> bool:
        """Whether encoding puts a blank before a text, SentencePiece's dummy prefix, which decoding removes."""
        return self.vocabulary == "sentencepiece"

    @property
    def omits_empty_turns(self) -> bool:
        """Whether the prompt has no tag for a turn without text."""
        return self.tool_format == "json"


CHATGLM3 = Family(
    name="chatglm3",
    title="ChatGLM3-6B",
    repository="THUDM/chatglm3-6b",
    names=("chatglm3",),
    templates=("chatglm3", "round"),
    special_tokens=(*MASK_TOKENS, *ROLE_TAGS),
    stop_tokens=("<|user|>", "<|observation|>"),
    tool_format="python",
)
CHATGLM2 = Family(
    name="chatglm2",
    title="ChatGLM2-6B",
    repository="THUDM/chatglm2-6b",
    names=("chatglm2",),
    templates=("round",),
    special_tokens=MASK_TOKENS,
    rope_ratio_scales="positions",
)
CODEGEEX2 = replace(
    CHATGLM2, name="codegeex2", title="CodeGeeX2-6B", repository="THUDM/codegeex2-6b", names=("codegeex2",)
)
GLM4 = Family(
    name="glm4",
    title="GLM-4-9B",
    repository="THUDM/glm-4-9b-chat",
    names=("glm49b",),
    templates=("glm4",),
    special_tokens=("<|endoftext|>", *MASK_TOKENS, *ROLE_TAGS, *VISION_TOKENS),
    stop_tokens=("<|user|>", "<|observation|>"),
    eos_token="<|endoftext|>",
    pad_token="<|endoftext|>",
    vocabulary="tiktoken",
    tool_format="json",
    text_end="<|user|>",
    call_end="<|observation|>",
    tokenizer_class="ChatGLM4Tokenizer",
    stops_in_config=True,
)
FAMILIES = {family.name: family for family in (CHATGLM3, CHATGLM2, CODEGEEX2, GLM4)}
DEFAULT_FAMILY = CHATGLM3.name  # of files that were written before they named one


def family_named(name: str) -> Family:
    """The family of this name. Raises UserError: there is none."""
    if name not in FAMILIES:
        raise UserError(f"unknown model family {str(name)!r:.40}", f"use one of {', '.join(FAMILIES)}")
    return FAMILIES[name]
