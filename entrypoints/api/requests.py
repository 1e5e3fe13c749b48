"""From a request body to generation tasks: model, prompt ids and parameters are all checked before any task runs."""

from collections.abc import Sequence
from dataclasses import replace

from entrypoints.api.errors import ApiError
from entrypoints.api.generation import GenerationTask
from entrypoints.api.openai_schema import ChatMessage, ChatRequest, CompletionRequest, TokenizeRequest, Tool
from entrypoints.api.state import ServerState
from entrypoints.api.tools import required_call_grammar, to_prompt_messages
from entrypoints.chat_format.sampling import Sampling
from entrypoints.engines.base import Engine
from entrypoints.errors import UserError

SYSTEM_ROLES = ("system", "developer")
TEXT_START = ("[gMASK]", "<sop>")  # special tokens before a text without the chat format
MAX_CHOICES = 64  # of one request: prompts times n
IDS_PER_PIECE = 10_000


def build_chat_tasks(state: ServerState, body: ChatRequest) -> list[GenerationTask]:
    """One task for each of the `n` choices. Raises ApiError that names the field at fault."""
    engine, adapter = state.require_engine(), _adapter(state, body.model)
    tools = [] if body.tool_choice == "none" else body.tools or []
    try:
        grammar = required_call_grammar(body.tool_choice, tools, engine.tokenizer.family)
    except UserError as error:
        raise ApiError(400, str(error), "tool_choice") from error
    sampling = replace(body.sampling(), grammar=grammar)
    _check_features(engine, sampling)
    if grammar and sampling.json_schema is not None:
        raise ApiError(400, "a required tool call and response_format cannot be combined", "response_format")
    prompt = encode_messages(engine, adapter, body.messages, tools)
    task = GenerationTask(
        prompt=prompt,
        sampling=sampling,
        adapter=adapter,
        stop=body.stop_strings(),
        tools=[tool.function.name for tool in tools],
        single_call=body.parallel_tool_calls is False,
    )
    return _repeat(engine, [task], body.n or 1, "messages")


def build_completion_tasks(state: ServerState, body: CompletionRequest) -> list[GenerationTask]:
    """Prompts times n tasks; the choices of one prompt are adjacent. Raises ApiError that names the field at fault."""
    engine, adapter = state.require_engine(), _adapter(state, body.model)
    sampling = body.sampling()
    _check_features(engine, sampling)
    if body.echo and sampling.top_logprobs is not None and "prompt_logprobs" not in engine.features:
        problem = f"the engine {engine.name} does not support echo with logprobs"
        raise ApiError(400, problem, "echo", "unsupported_parameter")
    tasks = [
        GenerationTask(
            prompt=_encode_prompt(engine, prompt),
            sampling=sampling,
            adapter=adapter,
            stop=body.stop_strings(),
            is_chat=False,
            # without the special tokens that precede a text
            echo_from=(len(TEXT_START) if isinstance(prompt, str) else 0) if body.echo else None,
            continues=body.max_tokens != 0,
        )
        for prompt in _prompts(body.prompt)
    ]
    return _repeat(engine, tasks, body.n or 1, "prompt")


def tokenize_request(state: ServerState, body: TokenizeRequest) -> str:
    """JSON with the ids of the prompt of these messages, or of the text alone.

    It is written in pieces: json.dumps of the million ids of a long text lets no other thread run for 0.2 s.
    Raises ApiError that names the field at fault.
    """
    engine, adapter = state.require_engine(), _adapter(state, body.model)
    if body.prompt is not None:
        ids = engine.tokenizer.encode(body.prompt)
    else:
        ids = encode_messages(engine, adapter, body.messages or [], body.tools or [])
    pieces = (",".join(map(str, ids[start : start + IDS_PER_PIECE])) for start in range(0, len(ids), IDS_PER_PIECE))
    return f'{{"tokens":[{",".join(pieces)}],"count":{len(ids)},"max_model_len":{engine.context_length}}}'


def _adapter(state: ServerState, model: str | None) -> str | None:
    """Adapter of a model name; None for the base model."""
    if model is None:
        return None
    models = state.models()
    if model not in models:
        raise state.model_not_found(model, models)
    return models[model]


def encode_messages(
    engine: Engine, adapter: str | None, messages: Sequence[ChatMessage], tools: Sequence[Tool]
) -> list[int]:
    """Ids of the prompt of a conversation. Raises ApiError (400): it has no valid form, or is too long.

    A system message at the end, with which clients ask for a summary or the next speaker, is a question.
    """
    prompt_format = engine.adapters[adapter] if adapter else engine.prompt_format
    try:
        if messages and messages[-1].role in SYSTEM_ROLES:
            messages = [*messages[:-1], messages[-1].model_copy(update={"role": "user"})]
        prompt_messages = to_prompt_messages(messages, tools)
        _check_minimum_length(engine, sum(len(message.content) for message in prompt_messages), "messages")
        return prompt_format.encode(prompt_messages, engine.tokenizer)
    except UserError as error:
        raise ApiError(400, str(error), "messages", "invalid_messages") from error


def _check_minimum_length(engine: Engine, characters: int, param: str) -> None:
    """Reject a text that is too long for any encoding of it: encoding megabytes takes seconds."""
    minimum = characters // engine.tokenizer.max_token_bytes
    if minimum >= engine.context_length:
        raise _context_length_error(f"{minimum} or more", engine, param)


def _context_length_error(tokens: str, engine: Engine, param: str) -> ApiError:
    message = f"the prompt has {tokens} tokens, the context length is {engine.context_length}"
    return ApiError(400, message, param, "context_length_exceeded")


def _check_features(engine: Engine, sampling: Sampling) -> None:
    """Reject what this engine does not support, instead of ignoring it."""
    fields = {
        "seed": (sampling.seed is not None, "seed"),
        "top_logprobs": (sampling.top_logprobs is not None, "logprobs"),
        "json_schema": (sampling.json_schema is not None, "response_format"),
        "grammar": (sampling.grammar is not None, "tool_choice"),
        "repetition_penalty": (sampling.repetition_penalty != 1, "repetition_penalty"),
        "frequency_penalty": (sampling.frequency_penalty != 0, "frequency_penalty"),
        "presence_penalty": (sampling.presence_penalty != 0, "presence_penalty"),
    }
    for feature, (is_used, param) in fields.items():
        if is_used and feature not in engine.features:
            raise ApiError(400, f"the engine {engine.name} does not support {param}", param, "unsupported_parameter")


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """The prompts of a completion request, each as text or ids."""
    if isinstance(prompt, str):
        return [prompt]
    ids = [item for item in prompt if isinstance(item, int)]
    return [ids] if ids else [item for item in prompt if not isinstance(item, int)]


def _encode_prompt(engine: Engine, prompt: str | list[int]) -> list[int]:
    tokenizer = engine.tokenizer
    if isinstance(prompt, str):
        _check_minimum_length(engine, len(prompt), "prompt")
        special = [tokenizer.special_token_id(name) for name in TEXT_START]
        return [*special, *tokenizer.encode(prompt)]
    if not prompt or max(prompt) >= tokenizer.size:
        raise ApiError(
            400, f"a prompt of token ids must not be empty, and each id must be below {tokenizer.size}", "prompt"
        )
    return prompt


def _repeat(engine: Engine, tasks: list[GenerationTask], n: int, param: str) -> list[GenerationTask]:
    """Each task n times with its own seed and token limit; `param` is the field that the prompts came from."""
    if not tasks or len(tasks) * n > MAX_CHOICES:
        raise ApiError(400, f"the request has {len(tasks) * n} choices, allowed are 1 to {MAX_CHOICES}", param)
    longest = max(len(task.prompt) for task in tasks)
    if longest >= engine.context_length:
        raise _context_length_error(str(longest), engine, param)
    return [_choice_task(task, engine.context_length, index) for task in tasks for index in range(n)]


def _choice_task(task: GenerationTask, context_length: int, index: int) -> GenerationTask:
    """The task of choice `index` of a prompt."""
    sampling = task.sampling
    max_new_tokens = min(sampling.max_new_tokens, context_length - len(task.prompt))
    seed = None if sampling.seed is None else (sampling.seed + index) % 2**32
    return replace(task, sampling=replace(sampling, max_new_tokens=max_new_tokens, seed=seed))
