"""Serve a model over the OpenAI-compatible HTTP API: chat, completions, tools, streaming, adapters, metrics.

Listens before the weights are loaded: /healthz responds at once, /readyz when requests are accepted. SIGTERM waits for
running requests; a second signal exits at once.
"""

import argparse
import contextlib
import logging
import socket
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from entrypoints import flags
from entrypoints.engines.options import DEFAULT_SLOTS, GPU_SLOTS
from entrypoints.errors import UserError
from entrypoints.settings import Settings

if TYPE_CHECKING:
    from entrypoints.api.auth import KeyRing
    from entrypoints.api.state import ServerOptions
    from entrypoints.engines.base import Engine
    from entrypoints.engines.llamacpp.embeddings import EmbeddingEngine
    from entrypoints.engines.options import EngineOptions

logger = logging.getLogger(__name__)
ENGINES = ("auto", "transformers", "llamacpp", "vllm")
UNLIMITED = 10**9
BOUNDS = {
    "slots": (1, UNLIMITED),
    "tensor_parallel_size": (1, UNLIMITED),
    "data_parallel_size": (1, UNLIMITED),
    "gpu_memory_utilization": (0.1, 1),
    "queue": (0, UNLIMITED),
    "drain_seconds": (0, UNLIMITED),
    "keep_alive_seconds": (1, UNLIMITED),
    "max_body_bytes": (1, UNLIMITED),
    "threads": (1, UNLIMITED),
    "prefix_cache_gb": (1, UNLIMITED),
    "port": (0, 65535),  # the socket module would silently truncate a larger port
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `glm serve`."""
    _add_chat_model_flags(parser)
    _add_embeddings_flags(parser.add_argument_group("embeddings"))
    _add_service_flags(parser.add_argument_group("service"))


def _add_chat_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that have no effect if only embeddings are served."""
    _add_engine_flags(parser.add_argument_group("model"))
    flags.add_vllm_flags(parser.add_argument_group("vLLM"))
    flags.add_gguf_flags(parser.add_argument_group("GGUF files"))


def _add_engine_flags(group: argparse._ArgumentGroup) -> None:
    flags.add_model_flags(group)
    flags.add_named_adapters_flag(group)
    flags.add_loading_flags(group)
    group.add_argument("--served-model-name", help="name in /v1/models; default: the name of the folder or file")
    group.add_argument(
        "--engine", choices=ENGINES, default="auto", help="auto: llamacpp for a GGUF file, else transformers"
    )
    group.add_argument(
        "--slots",
        type=int,
        help=f"responses generated at a time; default: what the GPU holds, up to {DEFAULT_SLOTS}; "
        f"vLLM: {GPU_SLOTS} for each copy of the model",
    )
    group.add_argument(
        "--speculative",
        choices=("ngram",),
        help="prompt lookup decoding, for answers that repeat parts of the conversation (GGUF files, vLLM)",
    )


def _add_embeddings_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--embeddings",
        type=Path,
        metavar="FILE",
        help="also serve /v1/embeddings from this GGUF file of an embedding model; without --model only that",
    )
    group.add_argument("--served-embeddings-name", help="its name in /v1/models; default: the name of the file")


def _add_service_flags(group: argparse._ArgumentGroup) -> None:
    flags.add_listen_flags(group, port=8000, secret="API keys")
    group.add_argument("--api-keys-file", type=Path, help="key file, written by glm key; overrides API_KEYS_FILE")
    group.add_argument(
        "--usage-dir",
        type=Path,
        metavar="DIR",
        help="write the tokens of each request to a file per day in this folder, for glm usage and for quotas",
    )
    group.add_argument(
        "--insecure-no-auth", action="store_true", help="allow a --host other than loopback without API keys"
    )
    group.add_argument(
        "--metrics-need-key", action="store_true", help="/metrics needs a key too, where requests need one"
    )
    group.add_argument("--queue", type=int, default=64, help="responses that may wait for a slot; more receive 429")
    group.add_argument(
        "--drain-seconds", type=int, default=120, help="how long running requests may continue after SIGTERM"
    )
    group.add_argument(
        "--keep-alive-seconds",
        type=int,
        default=flags.KEEP_ALIVE_SECONDS,
        help="how long an idle connection stays open; longer than the reverse proxy keeps it, else it sends 502",
    )
    group.add_argument(
        "--cors-origin", action="append", default=[], metavar="URL", help="web origin to allow; may be repeated"
    )
    group.add_argument("--max-body-bytes", type=int, default=4 << 20, help="maximum size of a request body")
    group.add_argument("--log-prompts", action="store_true", help="log request bodies, which are private otherwise")


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Validate the options, listen, load the model, and serve until a signal.

    Raises UserError: an invalid option, model, adapter or key file, or an address that is not available.
    """
    _check_bounds(args)
    keys = _api_keys(args, settings)
    model = _model(args, settings)
    name = (args.served_model_name or model.resolve().name.removesuffix(".gguf")) if model else None
    adapters = _adapters(args.adapter, name)
    embeddings_name = _embeddings_name(args, {name, *adapters})
    engine_options, load_engine = _engine(args, settings, model, adapters) if model else (None, None)
    load_embedder = _embedder(args.embeddings)
    from entrypoints.api.state import Models, ServerState
    from entrypoints.api.usage import UsageLedger

    listener = _listen(args.host, args.port)
    engine_name = engine_options.engine if engine_options else "llamacpp"
    slots = engine_options.slots if engine_options else DEFAULT_SLOTS
    options = _server_options(args, name, embeddings_name, keys, slots)
    state = ServerState(options, keys, engine_name, UsageLedger(args.usage_dir))
    logger.info("listening on http://%s:%d", *listener.getsockname()[:2])
    from entrypoints.api.server import serve

    def load() -> Models:
        return Models(load_engine() if load_engine else None, load_embedder() if load_embedder else None)

    serve(state, load, listener, args.drain_seconds, args.keep_alive_seconds)
    return 0


def _server_options(
    args: argparse.Namespace, name: str | None, embeddings: str | None, keys: "KeyRing", slots: int
) -> "ServerOptions":
    from entrypoints.api.state import ServerOptions

    return ServerOptions(
        model=name,
        embeddings=embeddings,
        slots=slots,
        queue=args.queue,
        cors_origins=tuple(origin.rstrip("/") for origin in args.cors_origin),
        allowed_hosts=None if keys.required else (args.host, *args.allowed_host),
        max_body_bytes=args.max_body_bytes,
        log_prompts=args.log_prompts,
        metrics_need_key=args.metrics_need_key,
        root_path=args.root_path.rstrip("/"),
    )


def _model(args: argparse.Namespace, settings: Settings) -> Path | None:
    """The chat model; None if only embeddings are served. Raises UserError: there is neither, or a flag needs one."""
    if not args.embeddings or args.model or settings.model_path:
        return flags.required_model(args, settings)
    chat_model_flags = argparse.ArgumentParser()
    _add_chat_model_flags(chat_model_flags)
    defaults = vars(chat_model_flags.parse_args([]))
    unused = [name for name, default in defaults.items() if getattr(args, name) != default]
    if unused:
        raise UserError(f"--{unused[0].replace('_', '-')} needs a chat model", "add --model DIR, or omit it")
    return None


def _embeddings_name(args: argparse.Namespace, used: Collection[str | None]) -> str | None:
    """Name of the embedding model; None without --embeddings. Raises UserError: another model has this name."""
    if not args.embeddings:
        if args.served_embeddings_name:
            raise UserError("--served-embeddings-name needs an embedding model", "add --embeddings FILE, or omit it")
        return None
    name: str = args.served_embeddings_name or args.embeddings.resolve().name.removesuffix(".gguf")
    if name in used:
        raise UserError(
            f"--embeddings {args.embeddings}: the name {name} is already in use", "choose a --served-embeddings-name"
        )
    return name


def _embedder(file: Path | None) -> "Callable[[], EmbeddingEngine] | None":
    """A function that loads the embedding model, whose file is checked now; None without one."""
    if file is None:
        return None
    from entrypoints.checkpoint.embedding_gguf import open_embedding_gguf
    from entrypoints.engines.packages import GGUF_PACKAGES, require_packages

    require_packages(*GGUF_PACKAGES)
    open_embedding_gguf(file)
    from entrypoints.engines.llamacpp.embeddings import EmbeddingEngine

    return lambda: EmbeddingEngine.load(file)


def _api_keys(args: argparse.Namespace, settings: Settings) -> "KeyRing":
    """The API keys; raises UserError if there are none and the address is reachable from other machines."""
    from entrypoints.api.auth import KeyRing

    file = args.api_keys_file or settings.api_keys_file or None
    keys = KeyRing(Path(file) if file else None, settings.api_key.value, quotas=args.usage_dir is not None)
    if not keys.required and not args.insecure_no_auth and not flags.is_loopback(args.host):
        raise UserError(
            f"--host {args.host} would serve the network without API keys",
            "add --api-keys-file (see glm key), or --insecure-no-auth",
        )
    return keys


def _engine(
    args: argparse.Namespace, settings: Settings, model: Path, adapters: dict[str, Path]
) -> "tuple[EngineOptions, Callable[[], Engine]]":
    """The engine's options, already checked, and a function that loads it."""
    from entrypoints.api.warm_up import warmed
    from entrypoints.engines.loading import check_engine_options, default_slots, load_engine, select_engine
    from entrypoints.engines.options import EngineOptions

    options = EngineOptions(
        engine=select_engine(model, args.engine),
        adapters=adapters,
        device=args.device or settings.device,
        dtype=args.dtype,
        verify=args.verify,
        load_in=args.load_in,
        context_length=args.context_length,
        speculative=args.speculative is not None,
        **flags.vllm_options(args),
        **flags.gguf_options(args),
    )
    options = replace(options, slots=args.slots or default_slots(model, options))
    check_engine_options(model, options)
    return options, warmed(lambda: load_engine(model, options), args.warm, options.engine)


def _adapters(arguments: list[str], model_name: str | None) -> dict[str, Path]:
    """Folder of each adapter by name; raises UserError for a malformed argument or a name that is in use."""
    adapters: dict[str, Path] = {}
    for argument in arguments:
        name, equals, folder = argument.partition("=")
        if not (name and equals and folder):
            raise UserError(f"--adapter {argument} is not of the form NAME=DIR", "write --adapter NAME=DIR")
        if name in adapters or name == model_name:
            raise UserError(
                f"--adapter {argument}: the name {name} is already in use",
                "give the model and each adapter its own name",
            )
        adapters[name] = Path(folder)
    return adapters


def _check_bounds(args: argparse.Namespace) -> None:
    """Raise UserError with every numeric flag that is out of bounds."""
    given = {name: bounds for name, bounds in BOUNDS.items() if getattr(args, name) is not None}
    wrong = {name: bounds for name, bounds in given.items() if not bounds[0] <= getattr(args, name) <= bounds[1]}
    if wrong:
        names = {name: "--" + name.replace("_", "-") for name in wrong}
        raise UserError(
            f"out of bounds: {', '.join(f'{names[name]} {getattr(args, name)}' for name in wrong)}",
            ", ".join(f"{names[name]} is {minimum} to {maximum}" for name, (minimum, maximum) in wrong.items()),
        )


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket; raises UserError if the address is not available."""
    with contextlib.ExitStack() as on_error:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            listener = on_error.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()  # uvicorn sets its own backlog
        except OSError as error:
            raise UserError(f"cannot listen on {host}:{port} ({error})", "choose another --host or --port") from error
        on_error.pop_all()
        return listener
