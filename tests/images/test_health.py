"""The health check of the images: a lost GPU ends the container, so that the restart policy starts it again."""

import importlib.util
import os
import signal
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from containers import REPOSITORY


@pytest.fixture
def health():
    specification = importlib.util.spec_from_file_location("health", REPOSITORY / "images/health.py")
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

        def log_message(self, *arguments):
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


def test_a_loading_server_is_unhealthy_and_its_status_is_printed(health, server, capsys):
    assert health.main([f"{server}/loading"]) == 1
    assert "503" in capsys.readouterr().out


def test_a_container_without_a_server_is_unhealthy(health):
    assert health.main(["http://127.0.0.1:1/ready"]) == 1


def test_with_no_server_expected_a_container_is_healthy_while_its_gpus_can_be_opened(health):
    assert health.main(["--no-server"]) == 0


def test_only_gpu_devices_that_cannot_be_opened_are_lost(health, tmp_path):
    (tmp_path / "nvidia0").write_text("")
    (tmp_path / "nvidia1").mkdir()  # a folder cannot be opened for writing
    (tmp_path / "nvidiactl").mkdir()
    assert health.lost_gpus(tmp_path) == ["nvidia1"]


def test_a_lost_gpu_terminates_the_first_process_of_the_container(health, monkeypatch, capsys):
    signals = []
    monkeypatch.setattr(health, "lost_gpus", lambda: ["nvidia1"])
    monkeypatch.setattr(os, "kill", lambda process, number: signals.append((process, number)))
    assert health.main(["--no-server"]) == 1
    assert signals == [(1, signal.SIGTERM)]
    assert "nvidia1" in capsys.readouterr().out
