"""What a visitor sees of a talk: raw text as Markdown with formulas, HTML as letters, pictures never fetched.

What is shown never goes back to the model. Code is left as it is; elsewhere an invisible WORD JOINER keeps a character
from starting a tag, an entity or a picture, and pages take it out again when text is copied.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from entrypoints.web.talk import Talk
from entrypoints.web.texts import say

Render = Callable[[str], str]
JOINER = "\u2060"
_SEGMENTS = re.compile(
    r"(?P<fence>^ {0,3}(?P<bar>`{3,}|~{3,})[^\n]*\n.*?(?:^ {0,3}(?P=bar)[`~]*[ \t]*$|\Z))"
    r"|(?P<code>(?P<ticks>(?<!`)`+(?!`))(?:(?!\n\n).)+?(?<!`)(?P=ticks)(?!`))"
    r"|\$\$(?P<block_dollar>.+?)\$\$|\\\[(?P<block>.+?)\\\]|\\\((?P<inline>.+?)\\\)"
    r"|(?<![\\$])\$(?![\s$])(?P<inline_dollar>[^$\n]*?[^$\s\\])\$(?![\d$])",
    re.DOTALL | re.MULTILINE,
)
_TAG_OR_ENTITY = re.compile(r"[<&](?=[A-Za-z/!?#])")
_ENTITY = re.compile(r"&(?=[A-Za-z#])")
_PICTURE = re.compile(r"!(?=\[)")
_DIRECTIVE = re.compile(r":(?=[^\W\d]|[:+-])")  # Streamlit's :red[...] and :smile:
_ARROW = re.compile(r"[-<](?=>)|[<>~](?==)|<(?=-)")  # it also draws -> and <= and ~= as one character


def for_gradio(text: str) -> str:
    """Markdown for Gradio's chat, whose formulas are written with \\( \\) and \\[ \\]."""
    return _rebuilt(text, _prose_for_gradio, ("\\(", "\\)"), ("\\[", "\\]"))


def for_streamlit(text: str) -> str:
    """Markdown for st.markdown, which escapes HTML itself and writes formulas with $ and $$."""
    return _rebuilt(text, _prose_for_streamlit, ("$", "$"), ("\n$$\n", "\n$$\n"))


@dataclass(frozen=True)
class Bubble:
    """One thing that was said; `title` names the tool of a call, `raw` is what copying gives."""

    role: str  # user | assistant
    markdown: str
    raw: str
    title: str = ""


def bubbles(talk: Talk, language: str, render: Render) -> Iterator[Bubble]:
    """The talk as it stands, the growing answer last."""
    growing, answering = [], talk.answering
    if answering:
        growth = answering.growth
        growing = [
            {"role": "assistant", "content": growth.text or say(language, "waiting"), "tool_calls": growth.calls}
        ]
    for message in [*talk.messages, *growing]:
        text = message["content"]
        if message["role"] == "tool":
            yield Bubble("user", f"{say(language, 'result')}\n{fenced(text)}", text)
        elif text:
            yield Bubble(message["role"], render(text), text)
        for call in message.get("tool_calls", ()):
            arguments = pretty(call["function"]["arguments"])
            title = say(language, "call", name=call["function"]["name"])
            yield Bubble("assistant", fenced(arguments, "json"), arguments, title)


def status(talk: Talk, language: str) -> str:
    """One line on the last answer: tokens, speed, and whether it is whole."""
    growth = talk.last
    if growth is None or (not growth.pieces and not growth.calls):
        return ""
    numbers = {
        "answer": growth.tokens(),
        "prompt": growth.prompt_tokens,
        "seconds": f"{growth.seconds:.1f}",
        "rate": f"{growth.tokens() / growth.seconds:.1f}" if growth.seconds else "–",
    }
    lines = [say(language, "stats_stopped" if growth.completion_tokens is None else "stats", **numbers)]
    if growth.finish_reason == "length":
        lines.append(say(language, "cut"))
    if growth.dropped:
        lines.append(say(language, "dropped", count=growth.dropped))
    return " · ".join(lines)


def fenced(text: str, language: str = "") -> str:
    """A code block that holds any text, backticks too."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    bar = "`" * max(3, longest + 1)
    return f"{bar}{language}\n{text}\n{bar}"


def pretty(arguments: str) -> str:
    """JSON of a tool call, readable; anything else as it is."""
    try:
        return json.dumps(json.loads(arguments), ensure_ascii=False, indent=2)
    except ValueError:
        return arguments


def _rebuilt(text: str, prose: Render, inline: tuple[str, str], block: tuple[str, str]) -> str:
    parts, position = [], 0
    for match in _SEGMENTS.finditer(text):
        parts.append(prose(text[position : match.start()]))
        position = match.end()
        formula = match["block"] or match["block_dollar"]
        if match["fence"] or match["code"]:
            parts.append(match[0])
        elif formula:
            parts.append(f"{block[0]}{formula.strip()}{block[1]}")
        else:
            parts.append(f"{inline[0]}{(match['inline'] or match['inline_dollar']).strip()}{inline[1]}")
    return "".join([*parts, prose(text[position:])])


def _prose_for_gradio(text: str) -> str:
    return _PICTURE.sub("!" + JOINER, _TAG_OR_ENTITY.sub(rf"\g<0>{JOINER}", text))


def _prose_for_streamlit(text: str) -> str:
    for pattern in (_ENTITY, _PICTURE, _ARROW):
        text = pattern.sub(rf"\g<0>{JOINER}", text)
    text = _DIRECTIVE.sub(rf"\:{JOINER}", text)
    text = re.sub(r"(?<!\\)\$", r"\\$", text)
    return re.sub(r"(?<=\S)\n(?=\S)", "  \n", text)  # one newline is a line's end for who wrote it
