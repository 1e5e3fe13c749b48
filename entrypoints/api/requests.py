"""From a request to the tasks of the engine: model, prompt ids, features, all checked before any runs."""

from dataclasses import replace

from entrypoints.api.errors import ApiError
from entrypoints.api.generation import Task
from entrypoints.api.openai_schema import ChatRequest, CompletionRequest, Request, TokenizeRequest
from entrypoints.api.server import Serving
from entrypoints.api.tools import call_opening, forced_tool, to_turns
from entrypoints.errors import UserError
from entrypoints.prompt import PromptFormat
from entrypoints.sampling import Sampling

MOST_ANSWERS = 64  # of one request, prompts times n


def chat_tasks(serving: Serving, body: ChatRequest) -> list[Task]:
    """One task for each of the `n` answers. Raises ApiError naming the field that cannot be served."""
    engine, adapter = serving.engine, _adapter(serving, body)
    tools = [] if body.tool_choice == "none" else body.tools or []
    try:
        forced = forced_tool(body.tool_choice, tools)
    except UserError as error:
        raise ApiError(400, str(error), "tool_choice") from error
    sampling = _checked(serving, body.chat_sampling())
    if forced and sampling.json_schema is not None:
        raise ApiError(400, "a forced tool call and a response_format exclude each other", "response_format")
    prompt = _conversation(serving, adapter, body, tools)
    opening = [id_ for text in (call_opening(forced) if forced else ()) for id_ in engine.tokenizer.encode(text)]
    task = Task(
        [*prompt, *opening],
        sampling,
        adapter,
        body.stops(),
        [tool.function.name for tool in tools],
        tuple(opening),
    )
    return _repeated(serving, [task], body.n or 1, "messages")


def completion_tasks(serving: Serving, body: CompletionRequest) -> list[Task]:
    """Prompts times n tasks, the answers to one prompt side by side."""
    adapter = _adapter(serving, body)
    sampling = _checked(serving, body.sampling(top_logprobs=body.logprobs))
    prompts = [_ids(serving, prompt) for prompt in _prompts(body.prompt)]
    tasks = [Task(prompt, sampling, adapter, body.stops(), chat=False) for prompt in prompts]
    return _repeated(serving, tasks, body.n or 1, "prompt")


def token_ids(serving: Serving, body: TokenizeRequest) -> list[int]:
    """Ids of the prompt that these messages make, or of the text alone."""
    adapter = _adapter(serving, body)
    if body.prompt is not None:
        return serving.engine.tokenizer.encode(body.prompt)
    return _conversation(serving, adapter, body, body.tools or [])


def _adapter(serving: Serving, body: Request | TokenizeRequest) -> str | None:
    models = serving.models()
    if body.model is None:
        return None
    if body.model not in models:
        raise ApiError(
            404, f"there is no model {body.model!r}; there are {', '.join(models)}", "model", "model_not_found"
        )
    return models[body.model]


def _conversation(serving: Serving, adapter: str | None, body: ChatRequest | TokenizeRequest, tools: list) -> list[int]:
    try:
        turns = to_turns(body.messages, tools)
        _refuse_hopeless(serving, sum(len(turn.content) for turn in turns), "messages")
        return _format(serving, adapter).encode(turns, serving.engine.tokenizer)
    except UserError as error:
        raise ApiError(400, str(error), "messages", "invalid_messages") from error


def _refuse_hopeless(serving: Serving, letters: int, param: str) -> None:
    """Refuse a text that cannot fit however it is encoded: encoding takes seconds for megabytes."""
    least, window = letters // serving.engine.tokenizer.longest, serving.engine.window
    if least >= window:
        raise ApiError(
            400, f"the prompt has {least} tokens or more, the window {window}", param, "context_length_exceeded"
        )


def _format(serving: Serving, adapter: str | None) -> PromptFormat:
    return serving.engine.adapters[adapter] if adapter else serving.engine.prompt_format


def _checked(serving: Serving, sampling: Sampling) -> Sampling:
    """Refuse what this engine cannot do, rather than leave it out unseen."""
    fields = {
        "seed": (sampling.seed is not None, "seed"),
        "top_logprobs": (sampling.top_logprobs is not None, "logprobs"),
        "json_schema": (sampling.json_schema is not None, "response_format"),
        "repetition_penalty": (sampling.repetition_penalty != 1, "repetition_penalty"),
        "frequency_penalty": (sampling.frequency_penalty != 0, "frequency_penalty"),
        "presence_penalty": (sampling.presence_penalty != 0, "presence_penalty"),
    }
    for feature, (used, param) in fields.items():
        if used and feature not in serving.engine.features:
            raise ApiError(400, f"the engine {serving.engine.name} cannot do {param}", param, "unsupported_parameter")
    return sampling


def _prompts(prompt: str | list) -> list[str | list[int]]:
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    return prompt


def _ids(serving: Serving, prompt: str | list[int]) -> list[int]:
    tokenizer = serving.engine.tokenizer
    if isinstance(prompt, str):
        _refuse_hopeless(serving, len(prompt), "prompt")
        return [tokenizer.control("[gMASK]"), tokenizer.control("<sop>"), *tokenizer.encode(prompt)]
    if not prompt or max(prompt) >= tokenizer.size:
        raise ApiError(400, f"a prompt of ids needs at least one, each below {tokenizer.size}", "prompt")
    return prompt


def _repeated(serving: Serving, tasks: list[Task], n: int, param: str) -> list[Task]:
    """Check the window and give each answer its own seed; `param` is the field that the prompts came from."""
    if not tasks or len(tasks) * n > MOST_ANSWERS:
        raise ApiError(400, f"{len(tasks) * n} answers are asked for, 1 to {MOST_ANSWERS} can be", param)
    window = serving.engine.window
    longest = max(len(task.prompt) for task in tasks)
    if longest >= window:
        raise ApiError(400, f"the prompt has {longest} tokens, the window {window}", param, "context_length_exceeded")
    return [_numbered(task, window, number) for task in tasks for number in range(n)]


def _numbered(task: Task, window: int, number: int) -> Task:
    sampling = task.sampling
    room = min(sampling.max_new_tokens, window - len(task.prompt))
    seed = None if sampling.seed is None else (sampling.seed + number) % 2**32
    return replace(task, sampling=replace(sampling, max_new_tokens=room, seed=seed))
