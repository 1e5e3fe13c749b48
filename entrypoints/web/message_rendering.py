"""Messages as the pages display them: Markdown with formulas, HTML shown as plain text, images never fetched.

The displayed text is never sent to the model. Code is left unchanged; elsewhere an invisible WORD JOINER keeps a
character from starting a tag, an entity or an image, and the pages remove it again when text is copied.
"""

import html
import re
from collections.abc import Callable

Converter = Callable[[str], str]
WORD_JOINER = "\u2060"
_SEGMENTS = re.compile(
    r"(?P<fence>^ {0,3}(?P<bar>`{3,}|~{3,})[^\n]*\n.*?(?:^ {0,3}(?P=bar)[`~]*[ \t]*$|\Z))"
    r"|(?P<code>(?P<ticks>(?<!`)`+(?!`))(?:(?!\n\n).)+?(?<!`)(?P=ticks)(?!`))"
    r"|\$\$(?P<block_dollar>.+?)\$\$|\\\[(?P<block>.+?)\\\]|\\\((?P<inline>.+?)\\\)"
    r"|(?<![\\$])\$(?![\s$])(?P<inline_dollar>[^$\n]*?[^$\s\\])\$(?![\d$])",
    re.DOTALL | re.MULTILINE,
)
_TAG_OR_ENTITY = re.compile(r"[<&](?=[A-Za-z/!?#])")
_ENTITY = re.compile(r"&(?=[A-Za-z#])")
_IMAGE = re.compile(r"!(?=\[)")
_DIRECTIVE = re.compile(r":(?=[^\W\d]|[:+-])")  # Streamlit's :red[...] and :smile:
_SINGLE_NEWLINE = re.compile(r"(?:(?<=\S)|\A)[ \t]*\n(?=[ \t]*(?:\S|\Z))")  # also beside code and formulas
_ARROW = re.compile(r"[-<](?=>)|[<>~](?==)|<(?=-)")  # Streamlit draws ->, <= and ~= as one character


def to_gradio_markdown(text: str) -> str:
    """Markdown for gr.Chatbot, whose formulas have the delimiters of LATEX_DELIMITERS."""
    return _convert(text, _gradio_prose, ("\\(", "\\)"), ("\\[", "\\]"))


def to_streamlit_markdown(text: str) -> str:
    """Markdown for st.markdown, which escapes HTML itself and delimits formulas by $ and $$."""
    return _convert(text, _streamlit_prose, ("$", "$"), ("\n$$\n", "\n$$\n"))


def plain_markdown(text: str) -> str:
    """Markdown of Streamlit that shows a line of text as it is."""
    return re.sub(r"[\\`*_{}\[\]()<>#+\-.!|$:~]", r"\\\g<0>", text)


def typed_html(text: str) -> str:
    """HTML that shows a text exactly as it was typed; on one line, so that Markdown passes it through."""
    return f'<pre class="typed" dir="auto">{escape_html(text)}</pre>'


def card_html(title: str, text: str, kind: str) -> str:
    """A card that can be closed, for a call of a tool or its result."""
    body = f"<pre>{escape_html(text)}</pre>"
    is_open = "" if kind == "document" else " open"
    return f'<details class="card {kind}"{is_open}><summary>{escape_html(title)}</summary>{body}</details>'


def escape_html(text: str) -> str:
    """HTML of a plain text that neither Markdown nor the search for formulas changes."""
    escaped = html.escape(text).replace("%%%", "%&#37;%")
    return escaped.translate({ord(character): f"&#{ord(character)};" for character in "\\\n\t"})


def _convert(text: str, convert_prose: Converter, inline: tuple[str, str], block: tuple[str, str]) -> str:
    parts, position = [], 0
    for match in _SEGMENTS.finditer(text):
        parts.append(convert_prose(text[position : match.start()]))
        position = match.end()
        formula = match["block"] or match["block_dollar"]
        if match["fence"] or match["code"]:
            parts.append(match[0])
        elif formula:
            parts.append(f"{block[0]}{formula.strip()}{block[1]}")
        else:
            parts.append(f"{inline[0]}{(match['inline'] or match['inline_dollar']).strip()}{inline[1]}")
    return "".join([*parts, convert_prose(text[position:])])


def _gradio_prose(text: str) -> str:
    return _IMAGE.sub("!" + WORD_JOINER, _TAG_OR_ENTITY.sub(rf"\g<0>{WORD_JOINER}", text))


def _streamlit_prose(text: str) -> str:
    for pattern in (_ENTITY, _IMAGE, _ARROW):
        text = pattern.sub(rf"\g<0>{WORD_JOINER}", text)
    text = _DIRECTIVE.sub(rf"\:{WORD_JOINER}", text)
    text = re.sub(r"(?<!\\)\$", r"\\$", text)
    # Markdown would join lines at a single newline; an indented line is one too, unless a list continues there
    return _SINGLE_NEWLINE.sub("  \n", text)
