"""What the browser of a visitor keeps between two visits, and the files that it downloads."""

import json
from typing import Any

from entrypoints.web.i18n import LANGUAGES, translate
from entrypoints.web.session import ChatSession, slider_ranges

THEME_TEXTS = {"system": "theme_system", "light": "theme_light", "dark": "theme_dark"}
PLACE_TEXTS = {"browser": "kept_browser", "server": "kept_server", "off": "kept_off"}
ROLE_TEXTS = {"user": "role_user", "assistant": "role_assistant", "tool": "role_tool"}
# the settings that the browser keeps, in the order in which the page sends them
KEPT_SETTINGS = (
    "language", "theme", "model", "system", "max_tokens", "temperature", "top_p", "tool_mode", "tools", "prompts",
)  # fmt: skip


def export_conversation(session: ChatSession, language: str, kind: str) -> dict[str, str]:
    """Name, type and text of a file; empty if there is nothing to export."""
    conversation = session.conversation
    if kind == "export":
        row = conversation.training_row()
        text = json.dumps(row, ensure_ascii=False) + "\n" if row else ""
        return {"name": "conversation.jsonl", "type": "application/jsonl", "text": text} if row else {}
    if kind == "export_all":
        everything = [each.to_json() for each in session.kept.conversations.values()]
        return _json_file("conversations.json", everything) if everything else {}
    if not conversation.nodes:
        return {}
    if kind == "export_json":
        return _json_file("conversation.json", conversation.to_json())
    names = {role: translate(language, key) for role, key in ROLE_TEXTS.items()}
    return {"name": "conversation.md", "type": "text/markdown", "text": conversation.to_markdown(names)}


def _json_file(name: str, value: object) -> dict[str, str]:
    return {"name": name, "type": "application/json", "text": json.dumps(value, ensure_ascii=False, indent=1)}


def restored_settings(text: str | None) -> dict[str, Any]:
    """The settings that the browser kept; those with a wrong type or outside of their range are left out."""
    try:
        given = dict(zip(KEPT_SETTINGS, json.loads(text or "[]"), strict=True))
        given["prompts"] = json.loads(given["prompts"])
    except (ValueError, TypeError):
        return {}
    ranges = slider_ranges()
    valid = {
        "language": given["language"] in LANGUAGES,
        "theme": given["theme"] in THEME_TEXTS,
        "tool_mode": isinstance(given["tool_mode"], bool),
        "prompts": isinstance(given["prompts"], list) and all(isinstance(each, str) for each in given["prompts"]),
        **{name: isinstance(given[name], str) for name in ("model", "system", "tools")},
    }
    for name, bounds in ranges.items():
        number = given[name]
        valid[name] = type(number) in (int, float) and bounds.minimum <= number <= bounds.maximum
    return {name: value for name, value in given.items() if valid[name]}


def stored_values(text: str) -> dict[str, Any]:
    """What `page.read` of the script sent: texts of conversations, settings, the id of the last conversation."""
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
