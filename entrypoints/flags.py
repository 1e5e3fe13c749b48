"""Command-line flags that several commands share: model, loading, sampling, address to listen on."""

import argparse
import ipaddress
from pathlib import Path
from typing import Any

from entrypoints.chat_format.sampling import Sampling
from entrypoints.engines.options import GPU_MEMORY_UTILIZATION, PREFIX_CACHE_GB
from entrypoints.errors import UserError
from entrypoints.families import FAMILIES
from entrypoints.settings import DEVICES, LOAD_IN_BITS, Settings

DTYPES = ("auto", "float32", "bfloat16", "float16")
# of idle connections: nginx and AWS keep theirs for 60 s, Go's clients 90 s, Google's load balancers 600 s
KEEP_ALIVE_SECONDS = 620
Parser = argparse.ArgumentParser | argparse._ArgumentGroup


def add_model_flags(parser: Parser) -> None:
    """--model, --device and --dtype."""
    parser.add_argument("--model", type=Path, help="converted checkpoint or GGUF file; overrides MODEL_PATH")
    parser.add_argument("--device", choices=DEVICES, help="overrides DEVICE; a GGUF file runs on the CPU")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="dtype of the weights; a GGUF file has its own precision"
    )


def add_family_flag(parser: Parser) -> None:
    """--family, of a model in the original layout."""
    parser.add_argument(
        "--family", choices=FAMILIES, help="model family of the original folder, if its files do not tell"
    )


def add_loading_flags(parser: Parser) -> None:
    """--context-length, --load-in and --verify."""
    parser.add_argument(
        "--context-length",
        type=int,
        metavar="TOKENS",
        help="of a prompt and its answer together; a smaller one than the model's, the default, takes less memory",
    )
    parser.add_argument(
        "--load-in",
        choices=LOAD_IN_BITS,
        help="quantize a folder's weights while they load, with bitsandbytes (CUDA, CPU); vLLM supports 8bit (CUDA)",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="check the hash of every file before loading; a GGUF file needs its record",
    )


def add_vllm_flags(parser: Parser) -> None:
    """--tensor-parallel-size, --data-parallel-size, --gpu-memory-utilization and --enforce-eager."""
    parser.add_argument(
        "--tensor-parallel-size",
        type=int,
        metavar="GPUS",
        help="GPUs that share one copy of the model; default: the fewest that hold it",
    )
    parser.add_argument(
        "--data-parallel-size",
        type=int,
        metavar="COPIES",
        help="copies of the model, which share the requests; default: as many as the visible GPUs hold",
    )
    parser.add_argument(
        "--gpu-memory-utilization",
        type=float,
        metavar="SHARE",
        help=f"share of each GPU's memory for weights and KV cache; default: {GPU_MEMORY_UTILIZATION}",
    )
    parser.add_argument(
        "--enforce-eager",
        action="store_true",
        help="neither compile the model nor record CUDA graphs: starts sooner, generates slower",
    )


def vllm_options(args: argparse.Namespace) -> dict[str, Any]:
    """The given flags of `add_vllm_flags`, as fields of EngineOptions."""
    names = ("tensor_parallel_size", "data_parallel_size", "gpu_memory_utilization", "enforce_eager")
    return {name: value for name in names if (value := getattr(args, name))}


def add_adapter_flag(parser: Parser) -> None:
    """--adapter, for one adapter that every answer uses."""
    parser.add_argument("--adapter", type=Path, help="converted LoRA or P-Tuning v2 adapter; overrides ADAPTER_PATH")


def add_named_adapters_flag(parser: Parser) -> None:
    """--adapter NAME=DIR, for adapters that a request selects by name."""
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="NAME=DIR", help="also serve this adapter; may be repeated"
    )


def add_sampling_flags(parser: Parser, default: Sampling) -> None:
    """--temperature, --top-p and --seed."""
    parser.add_argument(
        "--temperature", type=float, default=default.temperature, help="0 always selects the most likely token"
    )
    parser.add_argument("--top-p", type=float, default=default.top_p, help="cumulative probability to sample from")
    parser.add_argument("--seed", type=int, default=default.seed, help="the same seed gives the same answer")


def add_listen_flags(parser: Parser, port: int, secret: str) -> None:
    """--host, --port, --root-path and --allowed-host. secret: what clients must have, such as `API keys`."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=port, help="port to listen on; 0 selects a free one")
    parser.add_argument("--root-path", default="", help="path prefix if a reverse proxy serves it under one, as /chat")
    parser.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help=f"without {secret}, accept this name in the Host header, besides localhost, --host and IP addresses; "
        f"may be repeated; with {secret} any name is accepted",
    )


def add_gguf_flags(parser: Parser) -> None:
    """--threads, --warm, --prefix-cache and --prefix-cache-gb."""
    parser.add_argument(
        "--threads", type=int, help="threads that compute the chat model; default: one for each available CPU"
    )
    parser.add_argument(
        "--warm",
        type=Path,
        metavar="FILE",
        help="JSON Lines of chat requests whose prompts are computed before the server is ready",
    )
    parser.add_argument(
        "--prefix-cache",
        type=Path,
        metavar="DIR",
        help="keep computed prompts in this folder over restarts; each API key uses its own and those of --warm",
    )
    parser.add_argument("--prefix-cache-gb", type=int, help=f"size limit of that folder; default: {PREFIX_CACHE_GB}")


def gguf_options(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of EngineOptions for the flags of `add_gguf_flags`. Raises UserError: a limit without a folder."""
    if args.prefix_cache_gb and not args.prefix_cache:
        raise UserError("--prefix-cache-gb limits the folder of --prefix-cache", "add --prefix-cache DIR, or omit it")
    limit = (args.prefix_cache_gb or PREFIX_CACHE_GB) * 10**9
    return {"threads": args.threads, "prefix_cache": args.prefix_cache, "prefix_cache_bytes": limit}


def required_model(args: argparse.Namespace, settings: Settings) -> Path:
    """The model of --model or MODEL_PATH; raises UserError if neither is set."""
    model = args.model or settings.model_path
    if not model:
        raise UserError("no model given", "add --model DIR or set MODEL_PATH")
    return Path(model)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
