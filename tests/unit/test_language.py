"""Words that must not return: the glossary of tests/README.md names the terms to use in their place.

Everything that a person reads is searched: identifiers, messages, comments, docstrings, documentation, manifests.
"""

import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SUFFIXES = {".py", ".md", ".sh", ".yaml", ".yml", ".toml", ".json", ".conf", ".example", ".env", ""}
SKIPPED = {"tests/unit/test_language.py"}
ENGLISH = {
    r"\banew\b": "again, from scratch",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\bodds\b": "probabilities",
    r"(refused|rejected|reported|said|ends?|told|it|run) in words\b": "with a clear error message",
    r"(?<!there )(?<!There )(?<!is )\bis no (?!longer\b|more\b|need\b)": "is not a",
    r"(?<!there )\bis none\b": "is not a",
    r"\btold\b": "reported, logged, passed",
    r"\b(a|an|any|each|for|new|newer|of|on|one|other|that|the|this|two|which|whose|your) processors?\b(?! in )": "CPU",
    r"(?<!context )(?<!sliding )\bwindow\b(?![.\"'(\[]|\?\.)": "context window, context length",
    r"\bgoes on\b": "continues, resumes",
    r"\bwent away\b": "disconnected, ended",
    r"\bborne\b|\bhopeless\b|\bwherein\b|\bthereof\b|\bhenceforth\b|\bwhilst\b": "a plain word",
    r"\ba name that is taken\b": "already in use",
    r"\bno place to meet\b": "MASTER_ADDR is not set",
    r"\blost machine\b": "failed node",
    r"\bit can be asked\b": "inference only",
    r"\bits own words\b|\bits name it is loaded\b": "its output",
    r"(?i)(quant|recogn|normal|initial|optim|organ|serial|token)is(e|ed|es|er|ing|ation)|colour|behaviour|learnt": (
        "American spelling"
    ),
    r"\"\"\"[A-Z]{1,2}[0-9]+: ": "the reason itself",
}
CHINESE = {
    "变不成": "普通文本不会被编码成这些特殊 token",
    "互相看不见": "样本间注意力相互隔离",
    "释放位置": "释放槽位",
    "说完": "等待进行中的请求完成后退出",
    "明白的话": "明确报错",
    "离源模型太远": "平均 KL 超过阈值时不保留文件",
    "只能用来回答": "仅支持推理",
    "格子": "字段",
    "底座": "基座模型",
    "备好": "准备",
}


def files() -> list[Path]:
    """Every text file that git tracks or would track, without lock files and sample data."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    paths = [Path(name) for name in listed if name and name not in SKIPPED]
    return sorted(path for path in paths if path.suffix in SUFFIXES and (REPOSITORY / path).is_file())


def hits(pattern: str) -> list[str]:
    found = []
    for path in files():
        lines = (REPOSITORY / path).read_text(encoding="utf-8").splitlines()
        found += [f"{path}:{n}: {line.strip()}" for n, line in enumerate(lines, 1) if re.search(pattern, line)]
    return found


def test_the_search_sees_the_whole_repository():
    """A search that loops over all files must know how many: 450 when this was written."""
    names = {str(path) for path in files()}
    assert len(names) > 350
    assert {"Makefile", "README.zh-CN.md", "entrypoints/__main__.py", "k8s/README.md", "compose/train.yaml"} <= names


@pytest.mark.parametrize("pattern", ENGLISH)
def test_an_english_word_of_the_list_is_not_used(pattern):
    found = hits(pattern)
    assert not found, f"use {ENGLISH[pattern]!r}:\n" + "\n".join(found[:20])


@pytest.mark.parametrize("pattern", CHINESE)
def test_a_chinese_word_of_the_list_is_not_used(pattern):
    found = hits(pattern)
    assert not found, f"use {CHINESE[pattern]!r}:\n" + "\n".join(found[:20])
