"""What many tests need: the reference data, and small checkpoints made once a session."""

import gc
import json
import logging
import os
import signal
from collections.abc import Callable, Generator, Iterator
from importlib import resources
from pathlib import Path

import pytest
import torch
from embedding_models import EmbeddingModel, write_bert

from entrypoints.chat_format.prompt import PromptFormat
from entrypoints.chat_format.sampling import Sampling
from entrypoints.checkpoint.conversion import convert_to_native
from entrypoints.demo.model import write_demo_model
from entrypoints.engines.transformers.logits_processors import PenaltyProcessor
from entrypoints.hardware.resources import limit_garbage_collection
from entrypoints.quantization.gguf_writer import write_gguf

REPOSITORY = Path(__file__).resolve().parents[1]
# Two threads of a toy wait for each other as soon as something else wants a core: beside two busy programs, 89 tests of
# engines and training took 308 s with two and 137 s with one.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job, and with it all that tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)
for _name in ("NO_PROXY", "no_proxy"):  # a proxy of the developer's must not come between a test and its own servers
    os.environ[_name] = ",".join(filter(None, (os.environ.get(_name), "127.0.0.1", "localhost")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `--dist loadgroup` one worker runs all tests of a folder, which share a control plane or servers."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group(item.path.relative_to(REPOSITORY / "tests").parts[0]))


def pytest_collection_finish() -> None:
    """Thousands of tests and the libraries stay until the end: no collection visits them."""
    limit_garbage_collection()
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """pytest-xdist ends a worker whose captured output has a lone surrogate: it sends reports as UTF-8."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A job sets logging up on the stderr of its own test; the next test has another."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of what the reference code computes; its tests skip where it is absent."""
    folder = Path(os.environ.get("GOLDEN_DIR", REPOSITORY.parent / "shared" / "golden"))
    if not folder.is_dir():
        pytest.skip(f"no reference data at {folder} (set GOLDEN_DIR)")
    return folder


@pytest.fixture(scope="session")
def golden_family() -> Path:
    """The same of the related families."""
    folder = Path(os.environ.get("GOLDEN_FAMILY_DIR", REPOSITORY.parent / "shared" / "golden-family"))
    if not folder.is_dir():
        pytest.skip(f"no reference data at {folder} (set GOLDEN_FAMILY_DIR)")
    return folder


@pytest.fixture(scope="session")
def golden_native(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference's tiny checkpoint, converted."""
    target = tmp_path_factory.mktemp("golden") / "native"
    convert_to_native(golden / "original-tiny", target, PromptFormat())
    return target


@pytest.fixture(scope="session")
def sample_rows() -> list[dict]:
    """The bundled ad copy."""
    text = resources.files("entrypoints.demo").joinpath("ad_copy.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="session")
def toy_original(sample_rows: list[dict], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's untrained toy in the original layout; copy it before changing it."""
    folder = tmp_path_factory.mktemp("toy") / "original"
    write_demo_model(folder, [row[column] for row in sample_rows for column in ("content", "summary")])
    return folder


@pytest.fixture(scope="session")
def toy_native(toy_original: Path) -> Path:
    """The same toy, converted; copy it before changing it."""
    target = toy_original.parent / "native"
    convert_to_native(toy_original, target, PromptFormat())
    return target


@pytest.fixture(scope="session")
def toy_gguf(toy_native: Path) -> Path:
    """The same toy as one GGUF file in half precision."""
    target = toy_native.parent / "toy.gguf"
    write_gguf(toy_native, target, "f16")
    return target


@pytest.fixture(scope="session")
def embedding_model(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingModel:
    """A tiny encoder as a GGUF file, and its reference."""
    return write_bert(
        tmp_path_factory.mktemp("embeddings") / "bert.gguf",
        [*"北京上海天气你好裙子年，。,.()%ab", "##b", "work", "##ing", "##er", "##s", "cafe", "2024", "5", "##0"],
    )


@pytest.fixture(scope="session")
def same_but_for_ties() -> Callable:
    """Check greedy ids against transformers', up to where two tokens were too near to tell apart in half precision."""

    def check(found: list[int], expected: list[int], model: torch.nn.Module, prompt: list[int], sampling: Sampling):
        differing = [place for place, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b]
        if not differing:
            assert len(found) == len(expected)
            return
        ids = torch.tensor([[*prompt, *expected[: differing[0]]]])
        with torch.inference_mode():
            scores = PenaltyProcessor(sampling, len(prompt))(ids, model(ids).logits[:, -1].float())[0]
        assert abs(float(scores[found[differing[0]]] - scores[expected[differing[0]]])) < 1e-2, differing[0]

    return check
