"""The documentation: both languages say the same, links lead somewhere, and every command in it exists as written."""

import argparse
import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from entrypoints.__main__ import COMMANDS

REPOSITORY = Path(__file__).resolve().parents[2]
ENGLISH = sorted(
    path
    for path in REPOSITORY.rglob("README.md")
    if not any(part.startswith(".") or part in ("models", "output", "demo", "data") for part in path.parts[1:])
    or path.is_relative_to(REPOSITORY / "entrypoints")
)
NAMES = [str(path.relative_to(REPOSITORY)) for path in ENGLISH]
FOLDERS = {
    "", "entrypoints", "entrypoints/api", "entrypoints/chat_format", "entrypoints/checkpoint", "entrypoints/dataset",
    "entrypoints/evaluation", "entrypoints/jobs", "entrypoints/quantization", "entrypoints/training",
    "entrypoints/web", "images", "compose", "k8s", "tests", "tests/bench",
}  # fmt: skip
# What a command line of the documentation may start with, besides `glm` and `make`, which are checked further.
OTHER_PROGRAMS = {
    "apt-get", "cat", "cd", "chmod", "cp", "curl", "docker", "echo", "git", "grep", "helm", "kubectl", "lm_eval",
    "ls", "mkdir", "mv", "openssl", "pip", "promtool", "python", "rm", "scp", "source", "ssh", "sudo", "tar",
    "torchrun",
}  # fmt: skip


def chinese(path: Path) -> Path:
    return path.with_name("README.zh-CN.md")


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def headings(path: Path) -> list[int]:
    """The level of each heading, in order."""
    return [len(marks) for marks in re.findall(r"^(#+) ", without_code(path.read_text(encoding="utf-8")), re.M)]


def commands(path: Path) -> list[str]:
    """The command lines of all console blocks, without prompt, continuation and comment."""
    blocks = re.findall(r"^```console\n(.*?)^```$", path.read_text(encoding="utf-8"), re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+# .*", "", " ".join(line[2:].split())) for line in lines if line.startswith("$ ")]


ALL_COMMANDS = sorted({(name, line) for name, path in zip(NAMES, ENGLISH, strict=True) for line in commands(path)})


def test_each_documented_folder_has_both_languages():
    assert {path.parent.relative_to(REPOSITORY).as_posix().removeprefix(".") for path in ENGLISH} >= FOLDERS
    assert [name for name, path in zip(NAMES, ENGLISH, strict=True) if not chinese(path).is_file()] == []


@pytest.mark.parametrize("path", ENGLISH, ids=NAMES)
def test_both_languages_have_the_same_headings_and_commands(path):
    if path.parent.name == "jobs":
        pytest.skip("the command reference is generated in English; the Chinese page lists the commands")
    assert headings(path) == headings(chinese(path))
    assert commands(path) == commands(chinese(path))


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_first_page_is_short(name):
    assert len((REPOSITORY / name).read_text(encoding="utf-8").splitlines()) <= 170


@pytest.mark.parametrize("path", [*ENGLISH, *map(chinese, ENGLISH)], ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_every_link_leads_to_a_file_and_a_heading(path):
    targets = re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text(encoding="utf-8")))
    for target in targets:
        if re.match(r"https?://|mailto:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), f"{target} does not exist"
        if anchor:
            assert anchor in anchors(linked), f"{target}: {linked} has no such heading"


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", without_code(path.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def messages_of(path: Path) -> list[str]:
    """The first cells of the table under "Troubleshooting", from the first letter on."""
    section = path.read_text(encoding="utf-8").partition("\n## Troubleshooting\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    cells = [re.sub(r"^[^A-Za-z]*", "", row.split("|")[1]) for row in rows]
    return [re.sub(r"[^a-z0-9 ]", "", cell.lower()) for cell in cells]


def test_troubleshooting_tables_are_ordered_by_error_message():
    tables = {name: messages_of(path) for name, path in zip(NAMES, ENGLISH, strict=True)}
    found = {name: messages for name, messages in tables.items() if messages}
    assert len(found) >= 6
    assert {name: sorted(messages) for name, messages in found.items()} == found


def parser_of(job: str) -> argparse.ArgumentParser:
    module = importlib.import_module(f"entrypoints.jobs.{job}")
    parser = argparse.ArgumentParser(exit_on_error=False)
    module.add_arguments(parser)
    return parser


def words_of(line: str) -> list[str]:
    """The words of the last command of a pipe, without assignments before it and redirections after it."""
    line = line.split(" | ")[-1].split(" > ")[0].removesuffix(" &")
    words = line.split()[:1] if line.startswith("curl ") else shlex.split(line)  # its JSON may end on a later line
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words.pop(0)
    return words


def targets_of_make() -> set[str]:
    return set(re.findall(r"^([\w%/-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.M))


@pytest.mark.parametrize(("name", "line"), ALL_COMMANDS, ids=[f"{name}: {line}" for name, line in ALL_COMMANDS])
def test_every_command_is_accepted_as_written(name, line):
    """`glm` lines by the real parsers, `make` lines by the targets of the Makefile."""
    for part in line.split(" && "):
        words = words_of(part)
        if words[0] == "glm" and words[1].startswith("-"):
            assert words[1:] in (["--help"], ["--version"])
        elif words[0] == "glm":
            assert words[1] in COMMANDS
            if "..." not in line and "…" not in line and "--help" not in words:
                flags = [re.sub(r"^--[\w-]+", lambda m: m[0].replace("_", "-"), word) for word in words[2:]]
                parser_of(words[1]).parse_args(flags)
        elif words[0] == "make":
            goals = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
            known = targets_of_make()
            assert all(goal in known or f"{goal.split('/')[0]}/%" in known for goal in goals), goals
        else:
            assert words[0] in OTHER_PROGRAMS or words[0].startswith(("./", ".ci/", "images/", "compose/", "tests/"))


def test_jobs_of_compose_are_run_and_not_waited_for():
    """`up --wait` returns 1 when a container ends, as the container of a job does."""
    services = yaml.safe_load((REPOSITORY / "compose" / "train.yaml").read_text(encoding="utf-8"))["services"]
    jobs = {name: set(service["profiles"]) for name, service in services.items() if "healthcheck" not in service}
    assert set(jobs) == {"train", "train-0", "train-1", "train-node", "evaluate"}
    lines = [shlex.split(line, comments=True) for _, line in ALL_COMMANDS if "docker compose " in line]
    waiting = [words for words in lines if "--wait" in words]
    assert len(waiting) >= 6
    for words in waiting:
        profiles = {words[at + 1] for at, word in enumerate(words) if word == "--profile"}
        named = {word for word in words[words.index("up") + 1 :] if not word.startswith("-")}
        assert not {job for job in jobs if (job in named if named else jobs[job] & profiles)}, words
    run = {words[-1] for words in lines if words[-3:-1] == ["run", "--rm"]}
    assert {"train", "train-node", "evaluate"} <= run


def test_commands_of_every_kind_were_found():
    programs = {words_of(line.split(" && ")[0])[0] for _, line in ALL_COMMANDS}
    assert {"glm", "make", "docker", "kubectl", "curl"} <= programs
    assert len(ALL_COMMANDS) > 60


def test_git_tracks_every_page():
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert set(NAMES) <= set(tracked.splitlines())
