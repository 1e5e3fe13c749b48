"""Serve a page: the library's own application behind access control, run by uvicorn."""

import logging
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from entrypoints.api.connections import BACKLOG, LimitedProtocol
from entrypoints.errors import UserError
from entrypoints.flags import KEEP_ALIVE_SECONDS
from entrypoints.web.access import AccessMiddleware
from entrypoints.web.sign_in import SignIn
from entrypoints.web.user_sign_in import UserSignIn
from entrypoints.web.users import UserFile

logger = logging.getLogger(__name__)
SHUTDOWN_TIMEOUT_SECONDS = 3
MAX_UPLOAD_MEGABYTES = 8  # of a file: an exported conversation; documents have a limit of their own


@dataclass(frozen=True)
class PageOptions:
    """Where a page listens, and who may use it: its users, or everyone with the password, or everyone.

    Without users and a password the page is served under one of the names only.
    """

    host: str
    port: int
    root_path: str = ""
    password: str = field(default="", repr=False)
    users_file: Path | None = None
    allowed_hosts: tuple[str, ...] = ()


def serve(app: ASGIApp, options: PageOptions) -> None:
    """Serve until a signal arrives; logs the URL as soon as the port is open.

    Raises UserError: the address cannot be used, or the users file cannot be read.
    """
    host, port = options.host, options.port
    users = UserFile(options.users_file) if options.users_file else None
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {host}:{port} ({error})", "choose another --host or --port") from error
    logger.info("open http://%s:%d%s/", *listener.getsockname()[:2], options.root_path)
    sign_in: SignIn | UserSignIn | None = None
    if users:
        sign_in = UserSignIn(users, options.root_path)
    elif options.password:
        sign_in = SignIn(options.password, options.root_path or "/")
    config = uvicorn.Config(
        AccessMiddleware(app, sign_in, (host, *options.allowed_hosts)),
        log_config=None,
        access_log=False,
        server_header=False,
        http=LimitedProtocol,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=SHUTDOWN_TIMEOUT_SECONDS,
    )
    _Server(config).run(sockets=[listener])


class _Server(uvicorn.Server):
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Unlike uvicorn's own, does not raise the signal again at the end: the exit code of a stopped page is 0."""
        self.force_exit = self.should_exit
        self.should_exit = True


def streamlit_app(page: str, environment: dict[str, str], root_path: str) -> ASGIApp:
    """A Streamlit page as an ASGI application; as with `streamlit run`, the environment holds its settings."""
    os.environ.update(environment)
    import streamlit

    app: ASGIApp = streamlit.App(Path(__file__).with_name(f"{page}.py"))
    streamlit.config.set_option("server.baseUrlPath", root_path.strip("/"))
    streamlit.config.set_option("server.maxUploadSize", MAX_UPLOAD_MEGABYTES)
    return app
