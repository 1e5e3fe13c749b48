"""The health check of the images: a lost GPU or engine ends the container, and the restart policy starts it again."""

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
    """A server that answers /ready and /alive with 200, /missing with 404 and everything else with 503."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response({"/ready": 200, "/alive": 200, "/missing": 404}.get(self.path, 503))
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


@pytest.fixture
def signals(monkeypatch):
    """The signals that the check sends, each with its process; none is sent."""
    sent = []
    monkeypatch.setattr(os, "kill", lambda process, number: sent.append((process, number)))
    return sent


def test_a_lost_gpu_terminates_the_first_process_of_the_container(health, monkeypatch, signals, capsys):
    monkeypatch.setattr(health, "lost_gpus", lambda: ["nvidia1"])
    assert health.main(["--no-server"]) == 1
    assert signals == [(1, signal.SIGTERM)]
    assert "nvidia1" in capsys.readouterr().out


def test_a_failed_engine_terminates_the_first_process_of_the_container(health, server, monkeypatch, signals, capsys):
    """Both routes of the API then respond with 503, for as long as its process lives."""
    monkeypatch.setattr(health, "READY", f"{server}/broken")
    monkeypatch.setattr(health, "ALIVE", f"{server}/broken")
    assert health.main([]) == 1
    assert signals == [(1, signal.SIGTERM)]
    assert capsys.readouterr().out == f"{server}/broken: the engine failed, terminating this container\n"


@pytest.mark.parametrize("alive", ["/alive", "/missing", None])
def test_an_api_that_loads_drains_or_does_not_respond_is_left_alone(alive, health, server, monkeypatch, signals):
    monkeypatch.setattr(health, "READY", f"{server}/loading")
    monkeypatch.setattr(health, "ALIVE", f"{server}{alive}" if alive else "http://127.0.0.1:1/healthz")
    assert health.main([]) == 1
    assert not signals


def test_a_page_that_is_not_ready_is_left_alone(health, server, monkeypatch, signals):
    """Its address is given, and the API on the default port is not its own."""
    monkeypatch.setattr(health, "ALIVE", f"{server}/broken")
    assert health.main([f"{server}/loading"]) == 1
    assert not signals


def test_the_check_queries_the_routes_and_the_port_of_the_api(health):
    assert (health.READY, health.ALIVE) == ("http://127.0.0.1:8000/readyz", "http://127.0.0.1:8000/healthz")
