"""A scripted server, the pages in front of it, and a browser; what the tests of pages share."""

import hashlib
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path

import browsing
import pytest
from browsing import NewPage
from chat_drivers import DRIVERS, ChatDriver
from processes import PAGE_KEY, SLOW_KEYS, SUPPORT, Process, free_port, glm

SHOTS = Path(__file__).parent / "screenshots"

browser, new_page = browsing.browser, browsing.new_page  # fixtures


class ScriptedApi:
    """The scripted server; `record` is what it was asked."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.port, self.folder, self.model = free_port(), folder, model
        self.url = f"http://127.0.0.1:{self.port}"
        self.file, self.keys = folder / "record.jsonl", folder / "keys"
        lines = [(PAGE_KEY, "page", 100000), *((key, f"slow-{ui}", 1) for ui, key in SLOW_KEYS.items())]
        self.keys.write_text(
            "".join(f"{name} {hashlib.sha256(key.encode()).hexdigest()} {rate} 64\n" for key, name, rate in lines)
        )
        self.start()

    def start(self) -> None:
        command = [SUPPORT / "recording_server.py", self.model, self.port, self.file, self.keys]
        self.process = Process(command, self.folder / "api.log", PYTHONPATH=str(SUPPORT))
        self.process.wait_for(f"{self.url}/healthz")

    def kill(self) -> None:
        self.process.end(signal.SIGKILL)

    def record(self) -> list[dict]:
        """One entry for each answer, in the order of their ends."""
        if not self.file.is_file():
            return []
        return [json.loads(line) for line in self.file.read_text(encoding="utf-8").splitlines()]


class Served:
    """A page as a process, with the file of all it asked for outside this machine."""

    def __init__(self, ui: str, folder: Path, *words: object, path: str = "", **environment: str) -> None:
        port = free_port()
        folder.mkdir()
        self.outside = folder / "outside"
        self.outside.touch()
        self.host = f"http://127.0.0.1:{port}"
        self.address = f"{self.host}{path}/"
        self.process = Process(
            glm("web", "--ui", ui, "--port", port, *words),
            folder / "page.log",
            PYTHONPATH=str(SUPPORT / "lonely"),
            OUTSIDE_FILE=str(self.outside),
            **environment,
        )
        self.process.wait_for(f"{self.host}/healthz")


@pytest.fixture(scope="session")
def scripted_api(toy_native: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedApi]:
    api = ScriptedApi(toy_native, tmp_path_factory.mktemp("api"))
    yield api
    api.process.end()


@pytest.fixture(scope="session")
def serve_page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Served]]:
    """Start a page; all end with the session."""
    started: list[Served] = []

    def start(ui: str, *words: object, **options: str) -> Served:
        started.append(Served(ui, tmp_path_factory.mktemp("page") / ui, *words, **options))
        return started[-1]

    yield start
    for page in started:
        page.process.end()


@pytest.fixture(scope="session")
def chat_pages(scripted_api: ScriptedApi, serve_page: Callable[..., Served]) -> Callable[[str], Served]:
    """Both chat pages in front of the scripted server, each started when it is first needed."""
    pages: dict[str, Served] = {}

    def get(ui: str) -> Served:
        if ui not in pages:
            pages[ui] = serve_page(ui, "--api", scripted_api.url, "--api-key-env", "PAGE_KEY", PAGE_KEY=PAGE_KEY)
        return pages[ui]

    return get


@pytest.fixture(params=DRIVERS)
def ui(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def visit(ui: str, chat_pages: Callable[[str], Served], new_page: NewPage) -> Callable[..., ChatDriver]:
    """Open the page as a new visitor."""

    def make(**options: object) -> ChatDriver:
        return DRIVERS[ui](new_page(**options), chat_pages(ui).address).open()

    return make


@pytest.fixture
def chat(visit: Callable[..., ChatDriver]) -> ChatDriver:
    return visit()


@pytest.fixture(scope="session")
def training_run(toy_native: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy tuned for seconds on small talk, with the records of its run."""
    folder = tmp_path_factory.mktemp("run")
    chat = resources.files("entrypoints.demo").joinpath("chat.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, chat) if not row["history"]][:8]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    words = {
        "--model-name-or-path": toy_native, "--train-file": file, "--validation-file": file, "--test-file": file,
        "--output-dir": folder / "tuned", "--max-steps": 20, "--per-device-train-batch-size": 8,
        "--learning-rate": 4e-3, "--warmup-steps": 5, "--logging-steps": 2, "--save-steps": 10,
        "--max-target-length": 32,  # what the answers may take, with the base model before and the tuned one after
    }  # fmt: skip
    command = glm("train", "--predict-with-generate", *(part for pair in words.items() for part in pair))
    training = Process(command, folder / "log")
    assert training.popen.wait(240) == 0, training.output()
    return folder / "tuned"


@pytest.fixture(scope="session")
def shots() -> Path:
    """Folder of screenshots, emptied at the start."""
    shutil.rmtree(SHOTS, ignore_errors=True)
    SHOTS.mkdir()
    return SHOTS
