"""Serve a web page: chat in Gradio or Streamlit, or the progress of a training run.

The chat pages connect to the server at --api, or to a server that --model starts and that stops with the page.
The API key is read from the environment, never from the command line. --users-file or PAGE_PASSWORD requires visitors
to sign in.
"""

import argparse
import contextlib
import logging
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from entrypoints import flags
from entrypoints.errors import UserError
from entrypoints.settings import CONVERSATION_PLACES, Settings

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from entrypoints.web.server import PageOptions
    from entrypoints.web.visitors import Visitors

logger = logging.getLogger(__name__)
UIS = ("gradio", "streamlit", "training")
POLL_INTERVAL_SECONDS = 0.2  # while the started server loads its model
REQUEST_TIMEOUT_SECONDS = 5
STOP_TIMEOUT_SECONDS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `glm web`."""
    parser.add_argument("--ui", choices=UIS, default="gradio", help="which page")
    source = parser.add_argument_group("model, for the chat pages")
    source.add_argument(
        "--api", metavar="URL", help="URL of the server, such as http://host:8000/v1; overrides API_URL"
    )
    source.add_argument("--model", type=Path, help="without --api: start a server for this model; overrides MODEL_PATH")
    flags.add_named_adapters_flag(source)
    source.add_argument(
        "--api-key-env",
        default="API_KEY",
        metavar="NAME",
        help="environment variable that holds the API key of the server",
    )
    parser.add_argument(
        "--output-dir", type=Path, help="output directory of the run (training page); overrides OUTPUT_DIR"
    )
    _add_visitor_flags(parser)
    flags.add_listen_flags(parser, port=7860, secret="users or a page password")


def _add_visitor_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--users-file",
        type=Path,
        metavar="FILE",
        help="users who may sign in, written by glm user; overrides PAGE_USERS_FILE",
    )
    parser.add_argument(
        "--conversations",
        choices=CONVERSATION_PLACES,
        help="where the chat pages keep conversations: in the browser of the visitor, on the server for users who "
        "signed in, or nowhere; overrides CONVERSATIONS, without both: browser",
    )
    parser.add_argument(
        "--state-dir",
        type=Path,
        help="folder of the conversations on the server; overrides PAGE_STATE_DIR, without both: the folder of the "
        "users file",
    )
    parser.add_argument(
        "--feedback-dir",
        type=Path,
        help="folder for ratings and corrections of answers, which visitors can give then; overrides FEEDBACK_DIR",
    )


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Serve until a signal arrives; a server started for the page stops with it."""
    root_path = f"/{args.root_path.strip('/')}" if args.root_path.strip("/") else ""
    password = settings.page_password.value
    users_file = args.users_file or (Path(settings.page_users_file) if settings.page_users_file else None)
    if users_file and password:
        raise UserError("both a users file and PAGE_PASSWORD are set", "unset PAGE_PASSWORD, or omit the users file")
    if not password and not users_file and not flags.is_loopback(args.host):
        logger.warning(
            "--host %s: everyone who can reach this address can use the page; set PAGE_PASSWORD or "
            "--users-file to require a sign-in",
            args.host,
        )
    from entrypoints.web.server import PageOptions, serve, streamlit_app

    options = PageOptions(args.host, args.port, root_path, password, users_file, tuple(args.allowed_host))
    if args.ui == "training":
        folder = args.output_dir or settings.output_dir
        if not folder:
            raise UserError("--output-dir is not set", "add --output-dir DIR, the --output-dir of glm train")
        app = streamlit_app("training_page", {"OUTPUT_DIR": str(Path(folder).resolve())}, root_path)
        serve(app, options)
        return 0
    key = settings.api_key.value if args.api_key_env == "API_KEY" else os.environ.get(args.api_key_env, "")
    if args.api_key_env != "API_KEY" and not key:
        raise UserError(f"--api-key-env {args.api_key_env}: this variable is not set", "set it, or omit the flag")
    with _server_url(args, settings, key) as url:
        logger.info("the %s page uses the server at %s", args.ui, url)
        serve(_chat_page(args, settings, (url, key), options), options)
    return 0


def _chat_page(
    args: argparse.Namespace, settings: Settings, server: tuple[str, str], options: "PageOptions"
) -> "ASGIApp":
    """The Gradio or Streamlit page for a server, given by its URL and the key."""
    from entrypoints.web.client import ApiClient
    from entrypoints.web.feedback import FeedbackFile
    from entrypoints.web.server import streamlit_app

    folder = args.feedback_dir or settings.feedback_dir
    feedback = FeedbackFile(Path(folder).resolve()) if folder else None
    visitors = _visitors(args, settings, options.users_file)
    if args.ui == "gradio":
        from entrypoints.web.gradio_page import create_app

        return create_app(ApiClient(*server), options.root_path, feedback, visitors)
    environment = {
        "API_URL": server[0],
        "API_KEY": server[1],
        "PAGE_USERS_FILE": visitors.users_file,
        "CONVERSATIONS": visitors.place,
        "PAGE_STATE_DIR": str(visitors.database.file.parent) if visitors.database else "",
        "FEEDBACK_DIR": str(feedback.folder) if feedback else "",
    }
    return streamlit_app("streamlit_page", environment, options.root_path)


def _visitors(args: argparse.Namespace, settings: Settings, users_file: Path | None) -> "Visitors":
    """Raises UserError: conversations are to be on the server, but nobody signs in, or the folder cannot be written."""
    from entrypoints.web.conversation_database import ConversationDatabase
    from entrypoints.web.visitors import Visitors

    place, database = args.conversations or settings.conversations, None
    if place == "server":
        if not users_file:
            problem = "conversations on the server need users who sign in, and no users file is set"
            raise UserError(problem, "add --users-file FILE, or choose --conversations browser")
        folder = args.state_dir or settings.page_state_dir or users_file.resolve().parent
        database = ConversationDatabase(Path(folder).resolve())
    return Visitors(str(users_file.resolve()) if users_file else "", place, database)


@contextlib.contextmanager
def _server_url(args: argparse.Namespace, settings: Settings, key: str) -> Iterator[str]:
    """URL of the given server, or of a server that is started and runs as long as the page."""
    url = args.api or (not args.model and settings.api_url)
    model = args.model or settings.model_path
    if not url and not model:
        raise UserError("neither --api nor --model is set", "add --api URL, or --model DIR to start a server")
    if url:
        from entrypoints.web.client import base_url

        yield base_url(url, key)
        return
    port = _free_port()
    command = [sys.executable, "-m", "entrypoints", "serve", "--model", str(model), "--port", str(port)]
    command += [argument for adapter in args.adapter for argument in ("--adapter", adapter)]
    server = subprocess.Popen(command)
    try:
        _wait_until_ready(server, port)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        try:
            server.wait(STOP_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()


def _wait_until_ready(server: subprocess.Popen[bytes], port: int) -> None:
    """Return when /readyz answers 200. Raises UserError if the server exits before that."""
    logger.info("waiting for the model")
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # ignores HTTP_PROXY
    while server.poll() is None:
        try:
            with direct.open(f"http://127.0.0.1:{port}/readyz", timeout=REQUEST_TIMEOUT_SECONDS):
                return
        except OSError:  # not listening yet, or 503
            time.sleep(POLL_INTERVAL_SECONDS)
    raise UserError(f"glm serve exited with code {server.returncode}", "see its message above")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
