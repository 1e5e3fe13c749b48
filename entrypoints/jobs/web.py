"""Serve a page for people: chat in Gradio or Streamlit, or the progress of a training run.

The chat pages talk to a server: the one at --api, or with --model one that is started for the page and ended with it.
An API key is read from the environment, never from the command line. PAGE_PASSWORD makes visitors sign in.
"""

import argparse
import contextlib
import ipaddress
import logging
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from entrypoints.errors import UserError
from entrypoints.settings import Settings

logger = logging.getLogger(__name__)
UIS = ("gradio", "streamlit", "training")
START_SECONDS = 0.2  # between two looks at a server that loads


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `glm web`."""
    parser.add_argument("--ui", choices=UIS, default="gradio", help="which page")
    source = parser.add_argument_group("model, for the chat pages")
    source.add_argument("--api", metavar="URL", help="server to talk to, as http://host:8000/v1; overrides API_URL")
    source.add_argument("--model", type=Path, help="without --api: serve this checkpoint; overrides MODEL_PATH")
    source.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="with --model: an adapter to choose; may be repeated",
    )
    source.add_argument(
        "--api-key-env", default="API_KEY", metavar="NAME", help="variable that holds the key for the server"
    )
    parser.add_argument("--output-dir", type=Path, help="folder of the run to watch (training); overrides OUTPUT_DIR")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on; 0 takes a free one")
    parser.add_argument("--root-path", default="", help="path under which a reverse proxy shows the page, as /chat")


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Serve until a signal; a server that was started for the page ends with it."""
    root_path = f"/{args.root_path.strip('/')}" if args.root_path.strip("/") else ""
    password = settings.page_password.value
    if not password and not _is_loopback(args.host):
        logger.warning("--host %s: everyone who reaches it may use the page (set PAGE_PASSWORD)", args.host)
    from entrypoints.web.serving import serve, streamlit_app

    if args.ui == "training":
        folder = args.output_dir or settings.output_dir
        if not folder:
            raise UserError("no run is named", "add --output-dir DIR, the --output-dir of glm train")
        app = streamlit_app("training_page", {"OUTPUT_DIR": str(Path(folder).resolve())}, root_path)
        serve(app, args.host, args.port, root_path, password)
        return 0
    key = settings.api_key.value if args.api_key_env == "API_KEY" else os.environ.get(args.api_key_env, "")
    if args.api_key_env != "API_KEY" and not key:
        raise UserError(f"--api-key-env {args.api_key_env}: that variable is not set", "set it, or leave the flag out")
    with _api(args, settings) as url:
        logger.info("the %s page asks the server at %s", args.ui, url)
        if args.ui == "gradio":
            from entrypoints.web.client import Api
            from entrypoints.web.gradio_page import create_app

            app = create_app(Api(url, key), root_path)
        else:
            app = streamlit_app("streamlit_page", {"API_URL": url, "API_KEY": key}, root_path)
        serve(app, args.host, args.port, root_path, password)
    return 0


@contextlib.contextmanager
def _api(args: argparse.Namespace, settings: Settings) -> Iterator[str]:
    """Address of the server: the one that is named, or one that runs as long as the page does."""
    url = args.api or (not args.model and settings.api_url)
    model = args.model or settings.model_path
    if not url and not model:
        raise UserError("no server is named", "add --api URL, or --model DIR to start one")
    if url:
        yield url if url.rstrip("/").endswith("/v1") else f"{url.rstrip('/')}/v1"
        return
    port = _free_port()
    command = [sys.executable, "-m", "entrypoints", "serve", "--model", str(model), "--port", str(port)]
    command += [word for adapter in args.adapter for word in ("--adapter", adapter)]
    server = subprocess.Popen(command)
    try:
        _wait_until_ready(server, port)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def _wait_until_ready(server: subprocess.Popen, port: int) -> None:
    """Returns when /readyz says 200; raises UserError when the server ends before that."""
    logger.info("waiting for the model")
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never by way of HTTP_PROXY
    while server.poll() is None:
        try:
            with direct.open(f"http://127.0.0.1:{port}/readyz", timeout=5):
                return
        except OSError:  # not listening yet, or 503
            time.sleep(START_SECONDS)
    raise UserError(f"glm serve ended with code {server.returncode}", "see its message above")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
