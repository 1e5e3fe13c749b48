"""The health check that every image runs inside itself. Trap J4."""

import importlib.util
import os
import signal
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from containers import REPOSITORY


@pytest.fixture
def health():
    specification = importlib.util.spec_from_file_location("health", REPOSITORY / "images/scripts/health.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def server():
    """A server that answers /ready with 200 and everything else with 503."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/ready" else 503)
            self.end_headers()

        def log_message(self, *words):
            pass

    served = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=served.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{served.server_port}"
    served.shutdown()
    thread.join()
    served.server_close()


def test_a_ready_server_is_healthy(health, server, capsys):
    assert health.main([f"{server}/ready"]) == 0
    assert capsys.readouterr().out == "ready\n"


def test_a_server_that_loads_is_not_healthy_and_the_answer_is_told(health, server, capsys):
    assert health.main([f"{server}/loading"]) == 1
    assert "503" in capsys.readouterr().out


def test_without_a_server_nothing_is_healthy(health):
    assert health.main(["http://127.0.0.1:1/ready"]) == 1


def test_a_job_without_a_server_is_healthy_while_its_gpus_are_there(health):
    assert health.main(["--no-server"]) == 0


def test_gpus_that_can_no_longer_be_opened_are_lost_and_others_are_not(health, tmp_path):
    (tmp_path / "nvidia0").write_text("")
    (tmp_path / "nvidia1").mkdir()  # nobody can open a folder for writing
    (tmp_path / "nvidiactl").mkdir()
    assert health.lost_gpus(tmp_path) == ["nvidia1"]


def test_a_lost_gpu_ends_the_first_process_so_that_the_container_starts_anew(health, monkeypatch, capsys):
    told = []
    monkeypatch.setattr(health, "lost_gpus", lambda: ["nvidia1"])
    monkeypatch.setattr(os, "kill", lambda process, number: told.append((process, number)))
    assert health.main(["--no-server"]) == 1
    assert told == [(1, signal.SIGTERM)]
    assert "nvidia1" in capsys.readouterr().out
