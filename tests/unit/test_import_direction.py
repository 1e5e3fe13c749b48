"""The rooms of entrypoints/ and the arrows between them, read from the source; nothing is imported here."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "entrypoints"
FLOORS = (  # top to bottom; an import goes down
    ("__main__", "__init__"),
    ("jobs",),
    ("web", "api", "conversation", "evaluation", "demo"),
    ("training",),
    ("engines",),
    ("checkpoint",),
    ("dataset", "scoring"),
    ("openai_turns",),
    ("prompt", "answer", "sampling"),
    ("settings", "errors", "logs"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
WITHIN_A_FLOOR = {("web", "api"), ("settings", "errors")}  # rooms of one floor that may know each other
ONLY_IN = {
    "torch": {"engines", "training", "checkpoint", "demo"},
    "gradio": {"web"},
    "streamlit": {"web"},
    "fastapi": {"api"},
}
HEAVY = {"torch", "transformers", "datasets", "peft", "modelscope", "huggingface_hub"}
LIGHT_ROOMS = {"jobs", "__main__", "__init__", "prompt", "answer", "sampling", "settings", "errors", "logs"}
MODULES = sorted(PACKAGE.rglob("*.py"))
NAMES = [path.relative_to(PACKAGE).as_posix() for path in MODULES]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(nodes: Iterator[ast.AST] | list[ast.AST]) -> Iterator[str]:
    """Dotted names of what the nodes import; `from a import b` counts as `a.b`, which may be a module."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_imported(path: Path) -> set[str]:
    """Rooms of our own that a module imports, anywhere in it; the package's own attributes are the room __init__."""
    parts = [name.split(".") for name in imported(ast.walk(tree_of(path))) if name.split(".")[0] == "entrypoints"]
    return {part[1] if len(part) > 1 and part[1] in FLOOR else "__init__" for part in parts}


def at_import(path: Path) -> Iterator[str]:
    """Names that importing the module imports: all but what stands in functions and under TYPE_CHECKING."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
                continue
            yield child
            yield from walk(child)

    return imported(walk(tree_of(path)))


def test_every_module_is_seen_and_stands_on_a_floor():
    """A test that loops over all must know how many: 48 when this was written."""
    assert len(MODULES) >= 48
    assert {room_of(path) for path in MODULES} <= set(FLOOR)
    assert {"jobs", "api", "engines", "training", "checkpoint", "dataset", "prompt"} <= set(map(room_of, MODULES))


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_imports_go_down(path):
    room = room_of(path)
    upward = [other for other in rooms_imported(path) if FLOOR[other] < FLOOR[room]]
    across = [
        other
        for other in rooms_imported(path)
        if other != room and FLOOR[other] == FLOOR[room] and (room, other) not in WITHIN_A_FLOOR
    ]
    assert not upward, f"{path.name} imports upward: {upward}"
    assert not across, f"{path.name} imports rooms of its own floor: {across}"


def test_the_walk_finds_imports_to_judge():
    arrows = {(room_of(path), other) for path in MODULES for other in rooms_imported(path)}
    assert {
        ("jobs", "conversation"),
        ("training", "checkpoint"),
        ("evaluation", "engines"),
        ("api", "engines"),
    } <= arrows


def test_jobs_never_import_jobs():
    jobs = sorted((PACKAGE / "jobs").glob("*.py"))
    assert len(jobs) >= 10
    for path in jobs:
        assert not [name for name in imported(ast.walk(tree_of(path))) if name.startswith("entrypoints.jobs")], path


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_is_imported_in_its_own_rooms_alone(library):
    users = {
        path.relative_to(PACKAGE).as_posix(): room_of(path)
        for path in MODULES
        if library in {name.split(".")[0] for name in imported(ast.walk(tree_of(path)))}
    }
    assert {name: room for name, room in users.items() if room not in ONLY_IN[library]} == {}


def test_jobs_and_the_lowest_floors_import_nothing_heavy_with_themselves():
    """So that --help answers at once; a job imports what it needs when it runs."""
    light = [path for path in MODULES if room_of(path) in LIGHT_ROOMS]
    assert len(light) >= 18
    heavy = {path.name: HEAVY & {name.split(".")[0] for name in at_import(path)} for path in light}
    assert {name: libraries for name, libraries in heavy.items() if libraries} == {}


def test_role_tags_are_written_in_prompt_py_alone():
    """The chat format has one home; everything else asks the tokenizer for the id."""
    holders = [
        path.relative_to(PACKAGE).as_posix() for path in MODULES if "<|user|>" in path.read_text(encoding="utf-8")
    ]
    assert holders == ["prompt.py"]


def test_no_code_of_a_checkpoint_or_a_model_is_ever_run():
    """Neither trust_remote_code nor eval( or exec( anywhere: answers, tools and folders are data."""
    for path in MODULES:
        assert "trust_remote_code" not in path.read_text(encoding="utf-8"), path
        calls = [node.func for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
        names = {func.id for func in calls if isinstance(func, ast.Name)}
        names |= {
            func.attr for func in calls if isinstance(func, ast.Attribute) and ast.unparse(func).startswith("builtins.")
        }
        assert not names & {"eval", "exec"}, path
