"""Serve a model over OpenAI's HTTP API: chat, completions, tools, streaming, adapters by name, metrics.

Listens before the weights are loaded: /healthz answers at once, /readyz when requests may come. SIGTERM lets running
answers finish; a second signal ends at once.
"""

import argparse
import ipaddress
import logging
import socket
from collections.abc import Callable
from pathlib import Path

from entrypoints.errors import UserError
from entrypoints.settings import DEVICES, LOADS, Settings

logger = logging.getLogger(__name__)
ENGINES = ("auto", "transformers", "llamacpp", "vllm")
NO_END = 10**9
BOUNDS = {
    "slots": (1, NO_END),
    "queue": (0, NO_END),
    "drain_seconds": (0, NO_END),
    "max_body_bytes": (1, NO_END),
    "port": (0, 65535),  # a larger one would lose its upper bits in silence
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `glm serve`."""
    _add_model_arguments(parser)
    _add_service_arguments(parser)


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument("--model", type=Path, help="converted checkpoint or GGUF file; overrides MODEL_PATH")
    model.add_argument(
        "--adapter", action="append", default=[], metavar="NAME=DIR", help="serve an adapter too; may be repeated"
    )
    model.add_argument("--served-model-name", help="name in /v1/models; the folder's name if not given")
    model.add_argument(
        "--engine", choices=ENGINES, default="auto", help="auto: llamacpp for a GGUF file, else transformers"
    )
    model.add_argument("--device", choices=DEVICES, help="overrides DEVICE; a GGUF file runs on the processor")
    model.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of a folder's weights; a GGUF file has its own",
    )
    model.add_argument(
        "--load-in",
        choices=LOADS,
        help="make the weights smaller as they load: by bitsandbytes (CUDA, CPU), 8bit also by vLLM (CUDA)",
    )
    model.add_argument("--slots", type=int, default=4, help="answers generated at the same time")
    model.add_argument(
        "--speculative",
        choices=("ngram",),
        help="draft what the conversation holds already and verify it at once; for answers that repeat it (GGUF files)",
    )
    model.add_argument(
        "--verify",
        action="store_true",
        help="check every file's hash before loading; a GGUF file's against the record that glm prepare writes",
    )


def _add_service_arguments(parser: argparse.ArgumentParser) -> None:
    service = parser.add_argument_group("service")
    service.add_argument("--host", default="127.0.0.1", help="address to listen on; others than loopback need keys")
    service.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one")
    service.add_argument("--api-keys-file", type=Path, help="keys made by glm key; overrides API_KEYS_FILE")
    service.add_argument("--insecure-no-auth", action="store_true", help="listen beyond loopback without keys")
    service.add_argument("--queue", type=int, default=64, help="answers that may wait; more get 429")
    service.add_argument(
        "--drain-seconds", type=int, default=120, help="how long running answers may go on after SIGTERM"
    )
    service.add_argument(
        "--cors-origin", action="append", default=[], metavar="URL", help="web origin to allow; may be repeated"
    )
    service.add_argument("--max-body-bytes", type=int, default=4 << 20, help="largest request")
    service.add_argument("--root-path", default="", help="path under which a reverse proxy shows this server")
    service.add_argument("--log-prompts", action="store_true", help="log what is asked; it is private otherwise")


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Check everything that can be checked, listen, load, serve until a signal."""
    model = Path(args.model or settings.model_path or "")
    if not (args.model or settings.model_path):
        raise UserError("no model is named", "add --model DIR or set MODEL_PATH")
    _check_bounds(args)
    from entrypoints.api.auth import KeyRing
    from entrypoints.api.server import Options, Serving

    keys = KeyRing(
        args.api_keys_file or (Path(settings.api_keys_file) if settings.api_keys_file else None), settings.api_key.value
    )
    if not keys.required and not args.insecure_no_auth and not _is_loopback(args.host):
        raise UserError(
            f"--host {args.host} would let everyone on the network in",
            "add --api-keys-file (see glm key) or --insecure-no-auth",
        )
    name = args.served_model_name or model.resolve().name.removesuffix(".gguf")
    engine, load = _engine(args, settings, model, _adapters(args.adapter, name))
    options = Options(
        model=name,
        slots=args.slots,
        queue=args.queue,
        cors_origins=tuple(args.cors_origin),
        max_body_bytes=args.max_body_bytes,
        log_prompts=args.log_prompts,
        root_path=args.root_path.rstrip("/"),
    )
    serving = Serving(options, keys, engine)
    listener = _listen(args.host, args.port)
    logger.info("listening on http://%s:%d", *listener.getsockname()[:2])
    from entrypoints.api.uvicorn_server import serve

    serve(serving, load, listener, args.drain_seconds)
    return 0


def _engine(
    args: argparse.Namespace, settings: Settings, model: Path, adapters: dict[str, Path]
) -> tuple[str, Callable]:
    """Name of the engine, and how to load it; what can be known of the model is checked now."""
    from entrypoints.engines.loading import check, engine_for, load

    name = engine_for(model) if args.engine == "auto" else args.engine
    device = args.device or settings.device
    speculative = args.speculative is not None
    check(name, model, adapters, args.load_in, device, speculative, args.dtype, args.verify)
    return name, lambda: load(
        name,
        model,
        adapters,
        device=device,
        dtype=args.dtype,
        slots=args.slots,
        verify=args.verify,
        load_in=args.load_in,
        speculative=speculative,
    )


def _adapters(texts: list[str], model: str) -> dict[str, Path]:
    """Folder of each adapter; raises UserError for one that could not be told from another or from the model."""
    found: dict[str, Path] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise UserError(f"--adapter {text} is not understood", "write --adapter NAME=DIR")
        if name in found or name == model:
            raise UserError(f"--adapter {text} takes a name that is taken", "give model and adapters different names")
        found[name] = Path(folder)
    return found


def _check_bounds(args: argparse.Namespace) -> None:
    wrong = {name: bounds for name, bounds in BOUNDS.items() if not bounds[0] <= getattr(args, name) <= bounds[1]}
    if wrong:
        flags = {name: "--" + name.replace("_", "-") for name in wrong}
        raise UserError(
            f"out of bounds: {', '.join(f'{flags[name]} {getattr(args, name)}' for name in wrong)}",
            ", ".join(f"{flags[name]} is {least} to {most}" for name, (least, most) in wrong.items()),
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port} ({error})", "choose another --host or --port") from error
    return listener
