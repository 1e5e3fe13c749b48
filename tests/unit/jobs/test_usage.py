"""`glm usage` prints the ledger of a server per day, key and model."""

import json
from datetime import date

import pytest

from entrypoints.api.usage import UsageLedger, UsageRecord, tokens_by_key

ROWS = [
    ("2026-11-29", "anna", "toy", "completed", 5, 10, 1.5),
    ("2026-11-30", "ben", "toy", "failed", 7, 0, 0.25),
    ("2026-11-30", "anna", "ads", "completed", 3, 4, 0.5),
    ("2026-11-30", "ben", "toy", "aborted", 0, 0, 0.25),
]


@pytest.fixture
def folder(tmp_path):
    ledger = UsageLedger(tmp_path)
    for number, (day, key, model, *rest) in enumerate(ROWS):
        ledger.add(UsageRecord(f"{day}T10:00:00.000Z", f"id-{number}", key, model, *rest))
    ledger.close()
    return tmp_path


def test_the_table_has_one_line_per_day_key_and_model_and_a_total(glm, folder):
    lines = [" ".join(line.split()) for line in glm("usage", folder).out.splitlines()]
    assert lines == [
        "day key model requests aborted failed prompt_tokens completion_tokens total_tokens seconds",
        "2026-11-29 anna toy 1 0 0 5 10 15 1.5",
        "2026-11-30 anna ads 1 0 0 3 4 7 0.5",
        "2026-11-30 ben toy 2 1 1 7 0 7 0.5",
        "total 4 1 1 15 14 29 2.5",
    ]


def test_the_folders_of_several_servers_are_added(glm, folder, tmp_path):
    for pod in ("api-1", "api-2"):
        ledger = UsageLedger(tmp_path / pod)
        ledger.add(UsageRecord("2026-11-30T10:00:00.000Z", pod, "ben", "toy", "completed", 1, 1, 0.5))
        ledger.close()
    rows = [json.loads(line) for line in glm("usage", tmp_path, "--json", "--key", "ben").out.splitlines()]
    assert [(row["requests"], row["total_tokens"]) for row in rows] == [(4, 11)]


def test_json_has_one_object_per_line_without_a_total(glm, folder):
    rows = [json.loads(line) for line in glm("usage", folder, "--json").out.splitlines()]
    assert [row["total_tokens"] for row in rows] == [15, 7, 7]
    assert rows[2]["key"] == "ben"


def test_days_and_keys_can_be_selected(glm, folder):
    def keys(*flags):
        return [json.loads(line)["key"] for line in glm("usage", folder, "--json", *flags).out.splitlines()]

    assert keys("--since", "2026-11-30") == ["anna", "ben"]
    assert keys("--until", "2026-11-29") == ["anna"]
    assert keys("--key", "ben") == ["ben"]
    assert keys("--since", "2026-12-01") == []


def test_broken_lines_are_counted_in_a_warning(glm, folder):
    file = folder / "usage-2026-11-30.jsonl"
    file.write_text(file.read_text() + '{"time": 3\n[]\n' + "".join(f"{line}\n" for line in damaged_lines(file)))
    outcome = glm("usage", folder)
    assert "has 9 lines that are not records" in outcome.err
    assert "2026-11-30  ben" in outcome.out


def damaged_lines(file):
    """A line that is nested too deeply, and one record for each field with a value of a wrong type."""
    row = json.loads(file.read_text().splitlines()[0])
    texts = {"time": 5, "key": ["anna"], "outcome": None}
    numbers = {"prompt_tokens": "1", "completion_tokens": None, "seconds": "1"}
    return ["[" * 100_000, *(json.dumps(row | {name: value}) for name, value in (texts | numbers).items())]


def test_a_server_starts_with_a_damaged_ledger(folder):
    file = folder / "usage-2026-11-30.jsonl"
    file.write_text(file.read_text() + "".join(f"{line}\n" for line in damaged_lines(file)))
    assert tokens_by_key(folder, date(2026, 11, 30)) == {"anna": 7, "ben": 7}


def test_mistakes_are_named(glm, folder, tmp_path):
    for day in ("yesterday", "20261130", "2026-11-31", "2026-W49-1"):
        assert f"--since {day} is not a day" in glm("usage", folder, "--since", day).mistake()
    assert "contains no usage" in glm("usage", tmp_path / "elsewhere").mistake()
