"""Without API keys only known names are accepted in the Host header, against DNS rebinding."""

import pytest
from asgi import send


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8000", "localhost", "LOCALHOST:8000", "[::1]:8000", "10.1.2.3:8000", "api:8000", "api"]
)
def test_addresses_loopback_and_allowed_names_are_accepted(host, make_app):
    app = make_app(allowed_hosts=("0.0.0.0", "api"))
    assert send(app, "GET", "/v1/models", headers={"host": host}).status == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:8000", "localhost@evil", "api.evil", "a:b:c"])
def test_another_name_is_rejected_except_for_probes(host, make_app):
    app = make_app(allowed_hosts=("127.0.0.1",))
    reply = send(app, "GET", "/v1/models", headers={"host": host})
    assert (reply.status, reply.error()["code"]) == (403, "host_not_allowed")
    assert send(app, "GET", "/metrics", headers={"host": host}).status == 403
    assert send(app, "GET", "/healthz", headers={"host": host}).status == 200


def test_any_name_is_accepted_when_no_names_are_required(make_app):
    assert send(make_app(allowed_hosts=None), "GET", "/v1/models", headers={"host": "any.example"}).status == 200
