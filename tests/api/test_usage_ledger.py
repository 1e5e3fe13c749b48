"""The ledger of a real server that is killed."""

import json
import signal
import subprocess

import pytest
from serving_process import GLM

from entrypoints.api.auth import digest

CHAT = "/v1/chat/completions"
ANNA = {"authorization": "Bearer glm-a"}


@pytest.mark.slow
def test_usage_and_quota_survive_a_killed_server(scripted, tmp_path):
    keys, folder = tmp_path / "keys", tmp_path / "usage"
    keys.write_text(f"anna {digest('glm-a')} 600 64 12\n")
    flags = ("--api-keys-file", keys, "--usage-dir", folder, "--served-model-name", "toy")
    body = {"messages": [{"role": "user", "content": "count 8"}]}
    first = scripted(*flags).wait_ready()
    used = first.post(CHAT, body, ANNA)["usage"]
    assert used["total_tokens"] >= 12
    first.signal(signal.SIGKILL)
    first.wait()

    second = scripted(*flags).wait_ready()
    status, headers, content = second.request("POST", CHAT, body, ANNA)
    assert (status, json.loads(content)["error"]["code"]) == (429, "insufficient_quota")
    assert 0 < int(headers["retry-after"]) <= 24 * 3600
    printed = subprocess.run([*GLM, "usage", folder, "--json"], capture_output=True, text=True, check=True).stdout
    (row,) = map(json.loads, printed.splitlines())
    assert {name: row[name] for name in ("key", "model", "requests")} == {"key": "anna", "model": "toy", "requests": 1}
    assert {name: row[name] for name in used} == used


def test_a_quota_without_a_ledger_stops_the_start(scripted, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(f"anna {digest('glm-a')} 600 64 12\n")
    server = scripted("--api-keys-file", keys)
    assert server.wait() == 1
    assert "anna has a limit of tokens per day" in server.log
    assert "--usage-dir" in server.log
