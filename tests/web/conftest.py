"""What the tests of the web pages share: a scripted server, the pages connected to it, a browser, a training run."""

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path

import browsing
import pytest
from browsing import NewPage, Visitors
from chat_drivers import DRIVERS, ChatDriver
from playwright.sync_api import Browser
from processes import PAGE_KEY, SLOW_KEYS, SUPPORT, Process, free_port, glm

SCREENSHOTS = Path(__file__).parent / "screenshots"

browser, new_page = browsing.browser, browsing.new_page  # fixtures


class ScriptedApi:
    """The scripted server; `record` lists the prompts it received."""

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
        """One entry per answer, in the order in which they ended."""
        if not self.file.is_file():
            return []
        return [json.loads(line) for line in self.file.read_text(encoding="utf-8").splitlines()]


class Served:
    """A page as a process; the file `outside` lists the hosts outside this machine that it contacted."""

    def __init__(self, ui: str, folder: Path, *arguments: object, path: str = "", **environment: str) -> None:
        port = free_port()
        folder.mkdir()
        self.outside = folder / "outside"
        self.outside.touch()
        self.host = f"http://127.0.0.1:{port}"
        self.address = f"{self.host}{path}/"
        self.process = Process(
            glm("web", "--ui", ui, "--port", port, *arguments),
            folder / "page.log",
            PYTHONPATH=os.pathsep.join([str(SUPPORT / "network_recorder"), os.environ.get("PYTHONPATH", "")]),
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
    """Start a page; all pages stop at the end of the session."""
    started: list[Served] = []

    def start(ui: str, *arguments: object, **options: str) -> Served:
        started.append(Served(ui, tmp_path_factory.mktemp("page") / ui, *arguments, **options))
        return started[-1]

    yield start
    for page in started:
        page.process.end()


@pytest.fixture(scope="session")
def chat_pages(scripted_api: ScriptedApi, serve_page: Callable[..., Served]) -> Callable[[str], Served]:
    """Both chat pages, connected to the scripted server; each starts when it is first needed."""
    pages: dict[str, Served] = {}

    def get(ui: str) -> Served:
        if ui not in pages:
            source = ("--api", scripted_api.url, "--api-key-env", "PAGE_KEY")
            pages[ui] = serve_page(ui, *source, "--feedback-dir", scripted_api.folder / ui, PAGE_KEY=PAGE_KEY)
        return pages[ui]

    return get


@pytest.fixture(params=DRIVERS)
def ui(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def visit(ui: str, chat_pages: Callable[[str], Served], new_page: NewPage) -> Callable[..., ChatDriver]:
    """Open the page as a new visitor; needed by a test that changes settings."""

    def open_page(**options: object) -> ChatDriver:
        return DRIVERS[ui](new_page(**options), chat_pages(ui).address).open()

    return open_page


@pytest.fixture(scope="module")
def shared_visitors(browser: Browser) -> Iterator[tuple[Visitors, dict[str, ChatDriver]]]:
    """An open page per UI for the tests of a module: opening one takes seconds."""
    visitors = Visitors(browser)
    yield visitors, {}
    visitors.close()


@pytest.fixture
def chat(
    ui: str, chat_pages: Callable[[str], Served], shared_visitors: tuple[Visitors, dict[str, ChatDriver]]
) -> Iterator[ChatDriver]:
    """The page with an empty conversation and default settings; the tests of a module share one browser page per UI."""
    visitors, open_pages = shared_visitors
    driver = open_pages.pop(ui, None) or DRIVERS[ui](visitors.new_page(), chat_pages(ui).address).open()
    driver.clear()
    yield driver
    if not driver.stop_button().count() and driver.button("clear").is_enabled():
        open_pages[ui] = driver  # otherwise an answer is in progress, because the test failed
    problems = visitors.problems[:]
    visitors.problems.clear()
    assert problems == []


@pytest.fixture(scope="session")
def training_run(toy_native: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of a short fine-tuning run; longer for the pictures, which show its predictions."""
    steps = 80 if os.environ.get("GLM_PICTURES") else 20
    folder = tmp_path_factory.mktemp("run")
    chat = resources.files("entrypoints.demo").joinpath("chat.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, chat) if not row["history"]][:8]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    flags = {
        "--model-name-or-path": toy_native, "--train-file": file, "--validation-file": file, "--test-file": file,
        "--output-dir": folder / "tuned", "--max-steps": steps, "--per-device-train-batch-size": 8,
        "--learning-rate": 4e-3, "--warmup-steps": 5, "--logging-steps": 2, "--save-steps": steps // 2,
        "--max-target-length": 32,  # limits the time for the answers of the base and the tuned model
    }  # fmt: skip
    command = glm("train", "--predict-with-generate", *(part for pair in flags.items() for part in pair))
    training = Process(command, folder / "log")
    assert training.popen.wait(240) == 0, training.output()
    return folder / "tuned"


@pytest.fixture(scope="session")
def training_address(training_run: Path, serve_page: Callable[..., Served]) -> str:
    """The training page for the run."""
    return serve_page("training", "--output-dir", training_run).address


@pytest.fixture(scope="session")
def screenshots() -> Path:
    """Folder of screenshots, emptied at the start."""
    shutil.rmtree(SCREENSHOTS, ignore_errors=True)
    SCREENSHOTS.mkdir()
    return SCREENSHOTS
