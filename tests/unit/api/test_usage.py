"""Usage by key: what is counted for each way that a request can end, the ledger on disk, and the quota of a day."""

import json
import os
from datetime import UTC, datetime, timedelta

import pytest
from asgi import send
from prometheus_client.parser import text_string_to_metric_families

from entrypoints.api import usage
from entrypoints.api.auth import KeyRing, digest
from entrypoints.api.usage import KEEP_DAYS, UsageLedger, UsageRecord, day_files, read_records
from entrypoints.errors import UserError

CHAT = "/v1/chat/completions"
ANNA = {"authorization": "Bearer glm-a"}
BEN = {"authorization": "Bearer glm-b"}


class Clock:
    """A clock that tests set."""

    def __init__(self, text="2026-11-30T12:00:00"):
        self.time = datetime.fromisoformat(text).replace(tzinfo=UTC)

    def __call__(self):
        return self.time

    def advance(self, **delta):
        self.time += timedelta(**delta)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def ledger(tmp_path, clock):
    ledger = UsageLedger(tmp_path / "usage", clock)
    yield ledger
    ledger.close()


@pytest.fixture
def keys(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"anna {digest('glm-a')} 600 64 30\nben {digest('glm-b')}\n")
    return KeyRing(file)


@pytest.fixture
def app(make_app, keys, ledger):
    return make_app(keys=keys, usage=ledger)


def chat_body(text, **fields):
    return {"messages": [{"role": "user", "content": text}], **fields}


def metric(app, name, **labels):
    """Sum of the samples of a metric with these labels."""
    families = text_string_to_metric_families(send(app, "GET", "/metrics").body.decode())
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


def lines(folder):
    return [json.loads(line) for file in day_files(folder) for line in file.read_text().splitlines()]


def record(key="anna", tokens=10, clock=None, **fields):
    values = {"time": "2026-11-30T12:00:00.000Z", "id": "x", "model": "toy", "outcome": "completed", "seconds": 0.1}
    return UsageRecord(**{**values, "key": key, "prompt_tokens": tokens, "completion_tokens": 0, **fields})


@pytest.mark.parametrize("stream", [False, True])
def test_a_completed_request_is_counted_as_the_client_sees_it(app, ledger, stream):
    reply = send(app, "POST", CHAT, chat_body("count 4", n=2, stream=stream), headers=BEN)
    complete = send(app, "POST", CHAT, chat_body("count 4", n=2), headers=BEN).json()
    (line, again) = lines(ledger.folder)
    expected = complete["usage"]["prompt_tokens"], complete["usage"]["completion_tokens"]
    assert (line["prompt_tokens"], line["completion_tokens"]) == expected == (line["prompt_tokens"], 8)
    assert (line["key"], line["model"], line["outcome"]) == ("ben", "toy", "completed")
    assert (again["id"], line["time"]) == (complete["id"], "2026-11-30T12:00:00.000Z")
    assert reply.status == 200
    assert ledger.tokens_today("ben") == 2 * complete["usage"]["total_tokens"]
    labels = {"key": "ben", "model": "toy"}
    assert metric(app, "glm_key_requests_total", **labels, outcome="completed") == 2
    assert metric(app, "glm_key_completion_tokens_total", **labels) == 16
    assert metric(app, "glm_key_prompt_tokens_total", **labels) == 2 * expected[0]
    seconds = line["seconds"] + again["seconds"]
    assert metric(app, "glm_key_seconds_total", **labels) == pytest.approx(seconds, abs=0.002)


@pytest.mark.parametrize("stream", [False, True])
def test_an_aborted_request_counts_what_was_generated(app, ledger, stream):
    engine = app.state.server.engine
    body = chat_body("count 500 0.01", stream=stream)
    send(app, "POST", CHAT, body, headers=BEN, disconnect_when=lambda _: engine.running)
    (line,) = lines(ledger.folder)
    assert line["outcome"] == "aborted"
    assert line["prompt_tokens"] > 0
    assert line["completion_tokens"] < 500
    assert metric(app, "glm_key_requests_total", key="ben", outcome="aborted") == 1


def test_a_request_that_ends_in_the_queue_counts_no_tokens(make_app, keys, ledger):
    app = make_app(keys=keys, usage=ledger, slots=1)
    state = app.state.server
    state.admission._free_slots._value = 0  # as if all slots were taken
    send(app, "POST", CHAT, chat_body("count 4"), headers=BEN, disconnect_when=lambda _: state.admission.waiting)
    (line,) = lines(ledger.folder)
    assert (line["outcome"], line["prompt_tokens"], line["completion_tokens"]) == ("aborted", 0, 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_failed_request_counts_what_was_generated(app, ledger, stream):
    send(app, "POST", CHAT, chat_body("fail 3", stream=stream), headers=BEN)
    (line,) = lines(ledger.folder)
    assert (line["outcome"], line["completion_tokens"]) == ("failed", 3)


def test_a_rejected_request_is_not_usage(app, ledger):
    for body in ({"messages": []}, chat_body("x", model="unknown")):
        assert send(app, "POST", CHAT, body, headers=BEN).status in (400, 404)
    assert send(app, "POST", CHAT, chat_body("count 4")).status == 401
    assert not day_files(ledger.folder)


def test_the_line_is_on_disk_before_the_response_ends(app, ledger):
    found = []

    async def watched(scope, receive, forward):
        async def watch(message):
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                found.append(lines(ledger.folder))
            await forward(message)

        await app(scope, receive, watch)

    for stream in (True, False):
        send(watched, "POST", CHAT, chat_body("count 4", stream=stream), headers=BEN)
    assert [len(written) for written in found] == [1, 2]


def test_a_used_up_quota_rejects_the_key_until_the_next_day(app, clock):
    used = 0
    while used < 30:
        reply = send(app, "POST", CHAT, chat_body("count 4"), headers=ANNA)
        assert reply.status == 200
        used += reply.json()["usage"]["total_tokens"]
    rejected = send(app, "POST", CHAT, chat_body("count 4"), headers=ANNA)
    assert (rejected.status, rejected.error()["code"]) == (429, "insufficient_quota")
    assert f"used {used} of 30 tokens" in rejected.error()["message"]
    assert "2026-12-01T00:00:00Z" in rejected.error()["message"]
    assert rejected.headers["retry-after"] == f"{12 * 3600}"
    assert rejected.headers["x-should-retry"] == "false"
    assert send(app, "POST", CHAT, chat_body("count 4"), headers=BEN).status == 200
    assert send(app, "GET", "/v1/models", headers=ANNA).status == 200
    clock.advance(hours=12)
    assert send(app, "POST", CHAT, chat_body("count 4"), headers=ANNA).status == 200


def test_the_totals_of_today_survive_a_restart(tmp_path, clock):
    first = UsageLedger(tmp_path, clock)
    first.add(record(tokens=20))
    first.add(record(tokens=5, time="2026-11-29T23:59:59.999Z"))
    first.close()
    second = UsageLedger(tmp_path, clock)
    assert second.tokens_today("anna") == 20
    second.close()


def test_a_line_that_a_crash_cut_short_is_skipped_and_the_next_one_starts_a_line(tmp_path, clock, caplog):
    first = UsageLedger(tmp_path, clock)
    first.add(record(tokens=20))
    first.close()
    (file,) = day_files(tmp_path)
    file.write_bytes(file.read_bytes() + b'{"time": "2026-11-30T1')
    second = UsageLedger(tmp_path, clock)
    second.add(record(tokens=7))
    second.close()
    assert [found and found.tokens for found in read_records(file)] == [20, None, 7]
    assert "a line that is not a record" in caplog.text


def test_a_full_disk_fails_no_request_and_loses_no_line(app, ledger, caplog):
    file = usage.day_file(ledger.folder, "2026-11-30")
    file.symlink_to("/dev/full")
    for _ in range(3):
        assert send(app, "POST", CHAT, chat_body("count 4"), headers=BEN).status == 200
    assert metric(app, "glm_usage_unwritten") == 3
    assert caplog.text.count("No space left on device") == 1
    assert ledger.tokens_today("ben") > 12
    file.unlink()
    send(app, "POST", CHAT, chat_body("count 4"), headers=BEN)
    assert metric(app, "glm_usage_unwritten") == metric(app, "glm_usage_lost") == 0
    assert len(lines(ledger.folder)) == 4
    assert "again" in caplog.text


def test_a_line_for_which_the_disk_has_no_room_is_written_whole_later(ledger, monkeypatch):
    ledger.add(record(tokens=1))
    real = os.write
    monkeypatch.setattr(usage.os, "write", lambda descriptor, data: real(descriptor, data[:20]))
    ledger.add(record(tokens=2))
    monkeypatch.undo()
    assert len(lines(ledger.folder)) == 1
    ledger.add(record(tokens=3))
    assert [line["prompt_tokens"] for line in lines(ledger.folder)] == [1, 2, 3]


def test_lines_in_memory_are_limited_and_dropped_ones_counted(ledger, monkeypatch):
    usage.day_file(ledger.folder, "2026-11-30").symlink_to("/dev/full")
    monkeypatch.setattr(usage, "MAX_UNWRITTEN", 3)
    for _ in range(5):
        ledger.add(record())
    assert (ledger.unwritten, ledger.lost) == (3, 2)


def test_each_day_has_its_own_file_and_old_ones_are_removed(ledger, clock):
    for _ in range(3):
        ledger.add(record(time=ledger.timestamp()))
        clock.advance(days=1)
    assert [file.name for file in day_files(ledger.folder)] == [
        "usage-2026-11-30.jsonl", "usage-2026-12-01.jsonl", "usage-2026-12-02.jsonl"
    ]  # fmt: skip
    clock.advance(days=KEEP_DAYS - 1)
    assert ledger.tokens_today("anna") == 0
    assert [file.name for file in day_files(ledger.folder)] == ["usage-2026-12-02.jsonl"]


def test_two_servers_do_not_share_a_folder(ledger):
    with pytest.raises(UserError, match="another server writes its usage to") as caught:
        UsageLedger(ledger.folder)
    assert "--usage-dir" in str(caught.value)
    ledger.close()
    UsageLedger(ledger.folder).close()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write usage to"):
        UsageLedger(tmp_path / "file" / "usage")


def test_a_quota_without_a_ledger_is_an_error(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"anna {digest('glm-a')} 600 64 30\n")
    with pytest.raises(UserError, match="anna has a limit of tokens per day") as caught:
        KeyRing(file, quotas=False)
    assert "--usage-dir" in str(caught.value)
    assert KeyRing(file).find("Bearer glm-a").tokens_per_day == 30


def test_the_labels_of_keys_are_bounded(app):
    metrics = app.state.server.metrics
    for number in range(250):
        metrics.count_usage(record(key=f"key-{number}", tokens=1))
    assert metric(app, "glm_key_requests_total", key="other") == 50
    assert metric(app, "glm_key_requests_total") == 250
