"""Answers of the transformers engine that a grammar constrains."""

import pytest
import torch
from gbnf_regex import compile_grammar

from entrypoints.chat_format.answer_parser import parse_answer
from entrypoints.chat_format.sampling import Sampling
from entrypoints.chat_format.tool_grammar import tool_call_grammar
from entrypoints.engines.options import EngineOptions
from entrypoints.engines.transformers.engine import TransformersEngine
from entrypoints.engines.transformers.grammar import GrammarProcessor

TOOLS = {"get_weather": {"properties": {"days": {"type": "integer"}, "wet": {"type": "boolean"}}}, "clock": None}


@pytest.fixture(scope="module")
def engine(toy_native):
    engine = TransformersEngine.load(toy_native, EngineOptions(dtype="float32", device="cpu", slots=2))
    yield engine
    engine.close()


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"seed": 1}, {"temperature": 1.5, "top_p": 1}, {"top_k": 3}])
def test_an_untrained_model_is_made_to_call_an_offered_tool(engine, sampling):
    prompt = engine.tokenizer.encode("天气")
    grammar = tool_call_grammar(TOOLS)
    answer = parse_answer(engine.generate(prompt, Sampling(300, grammar=grammar, **sampling)), engine.tokenizer, TOOLS)
    assert (answer.content, [call.name in TOOLS for call in answer.tool_calls]) == ("", [True])


def test_the_mask_is_that_of_testing_every_token(engine):
    """The processor stops when the tokens that are left no longer count."""
    tokenizer, pattern_text = engine.tokenizer, 'root ::= "ab" [0-9]{1,3} "。"?\n'
    generator = torch.Generator().manual_seed(0)
    for text in ("", "ab", "ab12", "ab123"):
        answer = tokenizer.encode(text)
        ids = torch.tensor([[5, *answer]])
        processor = GrammarProcessor(pattern_text, tokenizer, 1, 1.0)
        data = b"".join(map(tokenizer.token_bytes, answer))
        pattern = compile_grammar(pattern_text)
        allowed = set()
        for id_ in range(tokenizer.size):
            added = (data + tokenizer.token_bytes(id_)).decode("utf-8", "replace")
            if tokenizer.token_bytes(id_) and pattern.fullmatch(added, partial=True):
                allowed.add(id_)
        complete = text in ("ab12", "ab123") and not data.startswith(b" ")
        for _ in range(3):
            logits = torch.randn(1, tokenizer.size, generator=generator) * 5
            found = set(torch.isfinite(processor(ids, logits)[0]).nonzero().flatten().tolist())
            expected = (allowed | set(tokenizer.stop_ids)) if complete else allowed or set(tokenizer.stop_ids)
            partial = {id_ for id_ in found if not tokenizer.token_bytes(id_).isascii()}  # first bytes of a character
            assert found - partial <= expected
            lost = logits[0].softmax(-1)[list(expected - found)].sum() if expected - found else 0
            assert lost <= 1e-3 * logits[0].softmax(-1)[list(found)].sum()
