"""The packages of entrypoints/ and the direction of their imports, read from the source; nothing is imported here."""

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "entrypoints"
README = PACKAGE / "README.md"
ONLY_IN = {
    "torch": {"demo", "training", "doctor", "quantization", "engines", "hardware", "checkpoint"},
    "gradio": {"web"},
    "streamlit": {"web"},
    "fastapi": {"api"},
}
HEAVY = {"torch", "transformers", "datasets", "peft", "modelscope", "huggingface_hub"}
LIGHT_PACKAGES = {"jobs", "__main__", "__init__", "flags", "chat_format", "settings", "errors", "logs"}
MODULES = sorted(PACKAGE.rglob("*.py"))
MODULE_NAMES = [path.relative_to(PACKAGE).as_posix() for path in MODULES]


def layers_in(readme: Path, heading: str) -> list[list[str]]:
    """The numbered list under a heading: the names in backquotes, one list for each layer, top first."""
    section = readme.read_text(encoding="utf-8").split(f"## {heading}", 1)[1].split("\n## ", 1)[0]
    return [re.findall(r"`(\w+)`", line.split(" — ")[0]) for line in re.findall(r"^\d+\. (.*)$", section, re.M)]


LAYERS = layers_in(README, "Layers")
LAYER = {package: number for number, packages in enumerate(LAYERS) for package in packages}
TRAINING = PACKAGE / "training"
TRAINING_LAYERS = layers_in(TRAINING / "README.md", "Modules")
TRAINING_LAYER = {part: number for number, parts in enumerate(TRAINING_LAYERS) for part in parts}


def package_of(path: Path, root: Path = PACKAGE) -> str:
    return path.relative_to(root).parts[0].removesuffix(".py")


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Dotted names of what the nodes import; `from a import b` counts as `a.b`, which may be a module."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def packages_imported(path: Path) -> set[str]:
    """Our own packages that a module imports, anywhere in it; attributes of `entrypoints` itself count as __init__."""
    parts = [name.split(".") for name in imported(ast.walk(tree_of(path))) if name.split(".")[0] == "entrypoints"]
    return {part[1] if len(part) > 1 and part[1] in LAYER else "__init__" for part in parts}


def imported_at_import_time(path: Path) -> Iterator[str]:
    """Names that importing the module imports: all except imports in functions and under TYPE_CHECKING."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
                continue
            yield child
            yield from walk(child)

    return imported(walk(tree_of(path)))


def test_every_package_is_in_exactly_one_layer_of_the_readme():
    """A test that loops over all modules must know how many there are: 140 when this was written."""
    assert len(MODULES) >= 130
    listed = [package for packages in LAYERS for package in packages]
    assert sorted(listed) == sorted({package_of(path) for path in MODULES})


def test_both_readmes_list_the_same_layers():
    assert layers_in(README.with_name("README.zh-CN.md"), "分层") == LAYERS


@pytest.mark.parametrize("path", MODULES, ids=MODULE_NAMES)
def test_imports_go_down(path):
    package = package_of(path)
    wrong = [other for other in packages_imported(path) if other != package and LAYER[other] <= LAYER[package]]
    assert not wrong, f"{path.name} imports {wrong}, which are not below {package}"


def test_imports_in_the_training_package_go_down_the_list_of_its_readme():
    """Both languages list all parts; a part imports only parts below it."""
    modules = [path for path in TRAINING.rglob("*.py") if path.parent != TRAINING or path.name != "__init__.py"]
    assert sorted(TRAINING_LAYER) == sorted({package_of(path, TRAINING) for path in modules})
    assert layers_in(TRAINING / "README.zh-CN.md", "模块") == TRAINING_LAYERS
    arrows = set()
    for path in modules:
        names = [name.split(".") for name in imported(ast.walk(tree_of(path)))]
        inner = {part[2] for part in names if part[:2] == ["entrypoints", "training"]}
        arrows |= {(package_of(path, TRAINING), other) for other in inner}
    assert ("loop", "methods") in arrows
    wrong = [(one, other) for one, other in arrows if one != other and TRAINING_LAYER[other] <= TRAINING_LAYER[one]]
    assert not wrong


def test_the_walk_finds_known_imports():
    arrows = {(package_of(path), other) for path in MODULES for other in packages_imported(path)}
    assert {
        ("jobs", "chat_session"),
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
def test_a_library_is_imported_in_its_own_packages_only(library):
    users = {
        path.relative_to(PACKAGE).as_posix(): package_of(path)
        for path in MODULES
        if library in {name.split(".")[0] for name in imported(ast.walk(tree_of(path)))}
    }
    assert {name: package for name, package in users.items() if package not in ONLY_IN[library]} == {}


def test_commands_and_the_lowest_layers_import_nothing_heavy_at_import_time():
    """`glm --help` answers at once: a command imports what it needs when it runs."""
    light = [path for path in MODULES if package_of(path) in LIGHT_PACKAGES]
    assert len(light) >= 18
    heavy = {path.name: HEAVY & {name.split(".")[0] for name in imported_at_import_time(path)} for path in light}
    assert {name: libraries for name, libraries in heavy.items() if libraries} == {}


def test_role_tags_are_written_in_the_module_of_the_families_only():
    """The chat format has a single source; everything else queries the tokenizer for the id."""
    users = [path.relative_to(PACKAGE).as_posix() for path in MODULES if "<|user|>" in path.read_text(encoding="utf-8")]
    assert users == ["families.py"]


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
