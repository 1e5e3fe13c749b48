import json
import logging
import re

import pytest
from asgi import ask

from entrypoints import logs
from entrypoints.api.auth import KeyRing

CHAT = "/v1/chat/completions"
ORIGIN = {"origin": "https://chat.example"}
SECRET = "机密问题七七"


def question(text, **fields):
    return {"messages": [{"role": "user", "content": text}], **fields}


@pytest.fixture
def printed(capsys):
    """Set logging up as the command does; a function that gives what was printed since the last call."""
    root, level = logging.getLogger(), logging.getLogger().level
    handlers = [*root.handlers]

    def start(log_format="text", log_level="debug", secrets=()):
        logs.set_up(log_format, log_level, secrets)
        return lambda: capsys.readouterr().err

    yield start
    logging.basicConfig(level=level, handlers=handlers, force=True)


def test_every_answer_has_a_request_id_and_a_plain_one_of_the_caller_is_kept(app):
    own = ask(app, "GET", "/healthz").headers["x-request-id"]
    assert re.fullmatch(r"[0-9a-f]{32}", own)
    assert ask(app, "GET", "/healthz", headers={"x-request-id": "abc-1.2:3_4"}).headers["x-request-id"] == "abc-1.2:3_4"
    for forged in ("a b", "a\tb", "é", "x" * 129, "", 'a"b', "a%0ab"):
        assert ask(app, "GET", "/healthz", headers={"x-request-id": forged}).headers["x-request-id"] != forged


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (CHAT, question("say x"), 200),
        (CHAT, question("say x", stream=True), 200),
        (CHAT, {}, 400),
        (CHAT, b"{", 400),
        ("/nowhere", None, 404),
        (CHAT, question("fail 1"), 500),
        (CHAT, question("refuse"), 400),
        (CHAT, b"x" * 5_000_000, 413),
    ],
)
def test_the_id_is_in_the_answer_and_in_the_log_with_the_right_status(app, printed, path, body, status):
    read = printed()
    reply = ask(app, "POST", path, body, headers={"x-request-id": "id-77"})
    assert (reply.status, reply.headers["x-request-id"]) == (status, "id-77")
    lines = [line for line in read().splitlines() if f"POST {path} {status} in " in line]
    assert len(lines) == 1
    assert "request id-77" in lines[0]
    count = f'glm_requests_total{{path="{path if path == CHAT else "other"}",status="{status}"}} 1.0'
    assert count in ask(app, "GET", "/metrics").body.decode()


def test_a_failure_is_logged_once_with_its_traceback_and_id(app, printed):
    read = printed("json")
    ask(app, "POST", CHAT, question("fail 1"), headers={"x-request-id": "id-78"})
    records = [json.loads(line) for line in read().splitlines()]
    errors = [record for record in records if record["level"] == "error"]
    assert len(errors) == 1
    assert "id-78" in errors[0]["message"]
    assert "the script says so" in errors[0]["exception"]


def test_health_probes_do_not_fill_the_log(app, printed):
    read = printed(log_level="info")
    for path in ("/healthz", "/readyz", "/metrics"):
        ask(app, "GET", path)
    assert read() == ""


def test_a_path_cannot_forge_a_line_of_the_log(app, printed):
    read = printed()
    ask(app, "GET", "/x\n00:00:00 INFO entrypoints.api.middleware: POST /v1/chat/completions 200")
    lines = [line for line in read().splitlines() if "entrypoints.api.middleware: " in line]
    assert len(lines) == 1
    assert "/x%0A" in lines[0]


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_prompts_answers_and_keys_are_never_logged(make_app, printed, log_format):
    """At the lowest level, through answers, streams, refusals, failures."""
    read = printed(log_format)
    app = make_app(keys=KeyRing(single="glm-secret"))
    headers = {"authorization": "Bearer glm-secret"}
    for body in (
        question(f"say {SECRET}"), question(f"say {SECRET}", stream=True), question(f"fail 1 0 {SECRET}"),
        question(f"fail 1 0 {SECRET}", stream=True), question(SECRET, colour=SECRET), question(f"refuse {SECRET}"),
        question(SECRET, stop=SECRET, temperature=7), {"messages": [SECRET]}, question(SECRET, model=SECRET),
        question(f"say {SECRET}", tools=[{"type": "function", "function": {"name": "f", "description": SECRET}}]),
    ):  # fmt: skip
        ask(app, "POST", CHAT, body, headers=headers)
        ask(app, "POST", CHAT, body, headers={"authorization": f"Bearer {SECRET.encode().hex()}"})
    ask(app, "POST", "/v1/completions", {"prompt": SECRET}, headers=headers)
    ask(app, "POST", "/tokenize", {"prompt": SECRET}, headers=headers)
    ask(app, "GET", f"/v1/models?q={SECRET.encode().hex()}", headers=headers)
    text = read() + ask(app, "GET", "/metrics").body.decode()
    assert text.count(CHAT) >= 20
    for private in (
        SECRET,
        SECRET.encode().hex(),
        "glm-secret",
        json.dumps(SECRET).strip('"'),
        repr(SECRET.encode())[2:-1],
    ):
        assert private not in text


def test_log_prompts_logs_what_is_asked_on_one_line(make_app, printed):
    read = printed(log_level="info")
    app = make_app(log_prompts=True)
    ask(app, "POST", CHAT, question(f"say {SECRET}\n二"), headers={"x-request-id": "id-79"})
    ask(app, "POST", CHAT, b'{"messages": [{"role": "user", "content": "say \\ud800"}]}')
    lines = [line for line in read().splitlines() if " asks: " in line]
    assert len(lines) == 2
    assert "id-79" in lines[0]


def test_a_body_over_the_limit_is_refused_with_and_without_a_length(make_app):
    app = make_app(max_body_bytes=1000)
    large = json.dumps(question("say " + "x" * 2000)).encode()
    chunks = tuple(large[start : start + 100] for start in range(0, len(large), 100))
    for content in (large, chunks):
        reply = ask(app, "POST", CHAT, content)
        assert (reply.status, reply.error()["code"]) == (413, "body_too_large")
    small = json.dumps(question("say x")).encode()
    assert ask(app, "POST", CHAT, (small[:20], small[20:])).status == 200
    assert ask(app, "POST", CHAT, small.ljust(1000)).status == 200
    assert ask(app, "POST", CHAT, small.ljust(1001)).status == 413


def test_a_length_that_lies_does_not_help(make_app):
    app = make_app(max_body_bytes=1000)
    assert ask(app, "POST", CHAT, b"x" * 2000, headers={"content-length": "10"}).status == 413
    assert ask(app, "POST", CHAT, question("say x"), headers={"content-length": "1e9"}).status == 200


def test_cors_is_closed_by_default(app):
    for method, headers in (("OPTIONS", {"access-control-request-method": "POST"}), ("GET", {}), ("POST", {})):
        reply = ask(app, method, "/v1/models", headers={**ORIGIN, **headers})
        assert not [name for name in reply.headers if name.startswith("access-control")]
    assert ask(app, "OPTIONS", CHAT, headers=ORIGIN).status == 405


def test_cors_opens_for_the_named_origin_alone_and_without_credentials(make_app):
    app = make_app(cors_origins=("https://chat.example",), max_body_bytes=1000)
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    reply = ask(app, "OPTIONS", CHAT, headers={**ORIGIN, **asked})
    assert (reply.status, reply.headers["access-control-allow-origin"]) == (200, ORIGIN["origin"])
    assert "access-control-allow-credentials" not in reply.headers
    other = ask(app, "OPTIONS", CHAT, headers={"origin": "https://evil.example", **asked})
    assert (other.status, other.headers.get("access-control-allow-origin")) == (400, None)
    for body in (question("say x"), question("say x", stream=True), {}, question("fail 1"), question("x" * 2000)):
        reply = ask(app, "POST", CHAT, body, headers=ORIGIN)
        assert reply.headers["access-control-allow-origin"] == ORIGIN["origin"], reply.status


def test_behind_a_path_of_a_proxy_everything_still_has_its_name(make_app, printed):
    read = printed()
    app = make_app(root_path="/glm")
    for path in ("/v1/models", "/glm/v1/models"):
        assert ask(app, "GET", path).status == 200
    assert read().count("GET /v1/models 200") == 2
    assert 'glm_requests_total{path="/v1/models",status="200"} 2.0' in ask(app, "GET", "/metrics").body.decode()
