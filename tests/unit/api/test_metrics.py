from asgi import send
from prometheus_client.parser import text_string_to_metric_families

from entrypoints.chat_format.prompt import PromptFormat

CHAT = "/v1/chat/completions"


def chat_body(text, **fields):
    return {"messages": [{"role": "user", "content": text}], **fields}


def metric(app, name, **labels):
    """Value of one sample of /metrics; 0 if it is missing."""
    families = text_string_to_metric_families(send(app, "GET", "/metrics").body.decode())
    found = [s for f in families for s in f.samples if s.name == name and labels.items() <= s.labels.items()]
    return sum(sample.value for sample in found)


def test_metrics_count_requests_tokens_and_times(app):
    send(app, "POST", CHAT, chat_body("count 4"))
    send(app, "POST", CHAT, chat_body("count 4", stream=True, n=2))
    send(app, "POST", CHAT, {"messages": []})
    send(app, "GET", "/nowhere/at/all")
    assert metric(app, "glm_requests_total", path=CHAT, status="200") == 2
    assert metric(app, "glm_requests_total", path=CHAT, status="400") == 1
    assert metric(app, "glm_requests_total", path="other", status="404") == 1
    assert metric(app, "glm_completion_tokens_total", model="toy") == 12
    assert metric(app, "glm_prompt_tokens_total", model="toy") > 8
    assert metric(app, "glm_time_to_first_token_seconds_count", model="toy") == 3
    assert metric(app, "glm_time_per_token_seconds_count", model="toy") == 9
    assert metric(app, "glm_engine_info", engine="scripted", model="toy") == 1
    assert metric(app, "glm_running") == metric(app, "glm_queue_length") == 0


def test_metrics_of_an_adapter_have_its_name_as_label(app, engine):
    engine.adapters = {"ads": PromptFormat()}
    send(app, "POST", CHAT, chat_body("count 4", model="ads"))
    assert metric(app, "glm_completion_tokens_total", model="ads") == 4
    assert metric(app, "glm_completion_tokens_total", model="toy") == 0
