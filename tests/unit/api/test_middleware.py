import json
import logging
import re

import pytest
from asgi import send

from entrypoints import logs
from entrypoints.api.auth import KeyRing

CHAT = "/v1/chat/completions"
ORIGIN = {"origin": "https://chat.example"}
SECRET = "机密问题七七"


def chat_body(text, **fields):
    return {"messages": [{"role": "user", "content": text}], **fields}


@pytest.fixture
def start_logging(capsys):
    """Set up logging as the command does; returns a function that reads the log since its last call."""
    root, level = logging.getLogger(), logging.getLogger().level
    handlers = [*root.handlers]

    def start(log_format="text", log_level="debug", secrets=()):
        logs.configure(log_format, log_level, secrets)
        return lambda: capsys.readouterr().err

    yield start
    logging.basicConfig(level=level, handlers=handlers, force=True)


def test_every_response_has_a_request_id_and_a_valid_one_of_the_client_is_kept(app):
    own = send(app, "GET", "/healthz").headers["x-request-id"]
    assert re.fullmatch(r"[0-9a-f]{32}", own)
    assert (
        send(app, "GET", "/healthz", headers={"x-request-id": "abc-1.2:3_4"}).headers["x-request-id"] == "abc-1.2:3_4"
    )
    for forged in ("a b", "a\tb", "é", "x" * 129, "", 'a"b', "a%0ab"):
        assert send(app, "GET", "/healthz", headers={"x-request-id": forged}).headers["x-request-id"] != forged


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (CHAT, chat_body("say x"), 200),
        (CHAT, chat_body("say x", stream=True), 200),
        (CHAT, {}, 400),
        (CHAT, b"{", 400),
        ("/nowhere", None, 404),
        (CHAT, chat_body("fail 1"), 500),
        (CHAT, chat_body("refuse"), 400),
        (CHAT, b"x" * 5_000_000, 413),
    ],
)
def test_the_request_id_is_in_the_response_and_in_the_log_with_the_status(app, start_logging, path, body, status):
    read = start_logging()
    reply = send(app, "POST", path, body, headers={"x-request-id": "id-77"})
    assert (reply.status, reply.headers["x-request-id"]) == (status, "id-77")
    lines = [line for line in read().splitlines() if f"POST {path} {status} in " in line]
    assert len(lines) == 1
    assert "request id-77" in lines[0]
    count = f'glm_requests_total{{path="{path if path == CHAT else "other"}",status="{status}"}} 1.0'
    assert count in send(app, "GET", "/metrics").body.decode()


def test_a_failure_is_logged_once_with_traceback_and_request_id(app, start_logging):
    read = start_logging("json")
    send(app, "POST", CHAT, chat_body("fail 1"), headers={"x-request-id": "id-78"})
    records = [json.loads(line) for line in read().splitlines()]
    errors = [record for record in records if record["level"] == "error"]
    assert len(errors) == 1
    assert "id-78" in errors[0]["message"]
    assert "the script says so" in errors[0]["exception"]


def test_probes_are_not_logged_at_level_info(app, start_logging):
    read = start_logging(log_level="info")
    for path in ("/healthz", "/readyz", "/metrics"):
        send(app, "GET", path)
    assert read() == ""


def test_a_path_cannot_forge_a_log_line(app, start_logging):
    read = start_logging()
    send(app, "GET", "/x\n00:00:00 INFO entrypoints.api.middleware: POST /v1/chat/completions 200")
    lines = [line for line in read().splitlines() if "entrypoints.api.middleware: " in line]
    assert len(lines) == 1
    assert "/x%0A" in lines[0]


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_prompts_answers_and_keys_are_never_logged(make_app, start_logging, log_format):
    """At the lowest log level: responses, streams, rejections and failures."""
    read = start_logging(log_format)
    app = make_app(keys=KeyRing(single="glm-secret"))
    headers = {"authorization": "Bearer glm-secret"}
    for body in (
        chat_body(f"say {SECRET}"), chat_body(f"say {SECRET}", stream=True), chat_body(f"fail 1 0 {SECRET}"),
        chat_body(f"fail 1 0 {SECRET}", stream=True), chat_body(SECRET, color=SECRET), chat_body(f"refuse {SECRET}"),
        chat_body(SECRET, stop=SECRET, temperature=7), {"messages": [SECRET]}, chat_body(SECRET, model=SECRET),
        chat_body(f"say {SECRET}", tools=[{"type": "function", "function": {"name": "f", "description": SECRET}}]),
    ):  # fmt: skip
        send(app, "POST", CHAT, body, headers=headers)
        send(app, "POST", CHAT, body, headers={"authorization": f"Bearer {SECRET.encode().hex()}"})
    send(app, "POST", "/v1/completions", {"prompt": SECRET}, headers=headers)
    send(app, "POST", "/tokenize", {"prompt": SECRET}, headers=headers)
    send(app, "GET", f"/v1/models?q={SECRET.encode().hex()}", headers=headers)
    text = read() + send(app, "GET", "/metrics").body.decode()
    assert text.count(CHAT) >= 20
    for private in (
        SECRET,
        SECRET.encode().hex(),
        "glm-secret",
        json.dumps(SECRET).strip('"'),
        repr(SECRET.encode())[2:-1],
    ):
        assert private not in text


def test_log_prompts_logs_the_request_body_on_one_line(make_app, start_logging):
    read = start_logging(log_level="info")
    app = make_app(log_prompts=True)
    send(app, "POST", CHAT, chat_body(f"say {SECRET}\n二"), headers={"x-request-id": "id-79"})
    send(app, "POST", CHAT, b'{"messages": [{"role": "user", "content": "say \\u2028"}]}')
    lines = [line for line in read().splitlines() if " body: " in line]
    assert len(lines) == 2
    assert "id-79" in lines[0]


def test_a_body_above_the_limit_is_rejected_with_and_without_content_length(make_app):
    app = make_app(max_body_bytes=1000)
    large = json.dumps(chat_body("say " + "x" * 2000)).encode()
    chunks = tuple(large[start : start + 100] for start in range(0, len(large), 100))
    for content in (large, chunks):
        reply = send(app, "POST", CHAT, content)
        assert (reply.status, reply.error()["code"]) == (413, "body_too_large")
    small = json.dumps(chat_body("say x")).encode()
    assert send(app, "POST", CHAT, (small[:20], small[20:])).status == 200
    assert send(app, "POST", CHAT, small.ljust(1000)).status == 200
    assert send(app, "POST", CHAT, small.ljust(1001)).status == 413


def test_a_false_content_length_does_not_bypass_the_limit(make_app):
    app = make_app(max_body_bytes=1000)
    assert send(app, "POST", CHAT, b"x" * 2000, headers={"content-length": "10"}).status == 413
    assert send(app, "POST", CHAT, chat_body("say x"), headers={"content-length": "1e9"}).status == 200


def test_cors_is_disabled_by_default(app):
    for method, headers in (("OPTIONS", {"access-control-request-method": "POST"}), ("GET", {}), ("POST", {})):
        reply = send(app, method, "/v1/models", headers={**ORIGIN, **headers})
        assert not [name for name in reply.headers if name.startswith("access-control")]
    assert send(app, "OPTIONS", CHAT, headers=ORIGIN).status == 405


def test_cors_allows_only_the_configured_origin_and_no_credentials(make_app):
    app = make_app(cors_origins=("https://chat.example",), max_body_bytes=1000)
    preflight = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    reply = send(app, "OPTIONS", CHAT, headers={**ORIGIN, **preflight})
    assert (reply.status, reply.headers["access-control-allow-origin"]) == (200, ORIGIN["origin"])
    assert "access-control-allow-credentials" not in reply.headers
    other = send(app, "OPTIONS", CHAT, headers={"origin": "https://evil.example", **preflight})
    assert (other.status, other.headers.get("access-control-allow-origin")) == (400, None)
    for body in (chat_body("say x"), chat_body("say x", stream=True), {}, chat_body("fail 1"), chat_body("x" * 2000)):
        reply = send(app, "POST", CHAT, body, headers=ORIGIN)
        assert reply.headers["access-control-allow-origin"] == ORIGIN["origin"], reply.status


def test_root_path_is_stripped_from_logs_and_metrics(make_app, start_logging):
    read = start_logging()
    app = make_app(root_path="/glm")
    for path in ("/v1/models", "/glm/v1/models"):
        assert send(app, "GET", path).status == 200
    assert read().count("GET /v1/models 200") == 2
    assert 'glm_requests_total{path="/v1/models",status="200"} 2.0' in send(app, "GET", "/metrics").body.decode()
