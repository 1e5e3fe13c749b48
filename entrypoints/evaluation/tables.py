"""Tables of reports, as Markdown and as an HTML page of one file that loads nothing from the network."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

# A cell may contain any text of a row: no HTML, link or picture, and one line. Lone surrogates become a question mark.
MARKDOWN_ESCAPES = str.maketrans(
    {"&": "&amp;", "<": "&lt;", "|": "\\|", "[": "\\[", "\0": "", **dict.fromkeys("\n\v\f\x85\u2028\u2029", "<br>")}
)
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222;background:#fff}"
    "table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ccc;padding:.3em .6em;text-align:left;"
    "vertical-align:top;white-space:pre-wrap;overflow-wrap:anywhere}"
    "th{white-space:nowrap}td:first-child{overflow-wrap:break-word}td:first-child:nth-last-child(2){overflow-wrap:normal}"
)


@dataclass(frozen=True)
class Table:
    """A heading, the names of the columns and their cells, and what the columns mean."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def markdown(title: str, tables: Sequence[Table]) -> str:
    """A Markdown document."""
    return "\n\n".join([f"# {_escape_markdown(title)}", *map(markdown_table, tables)]) + "\n"


def markdown_table(table: Table) -> str:
    """One table with its heading."""
    cells = [[_escape_markdown(cell) for cell in row] for row in table.rows]
    lines = [table.head, ["---"] * len(table.head), *cells]
    note = ["", table.note] if table.note else []
    return "\n".join([f"## {table.title}", "", *(f"| {' | '.join(line)} |" for line in lines), *note])


def page(title: str, tables: Sequence[Table]) -> str:
    """An HTML page."""
    body = "\n".join([f"<h1>{html.escape(title)}</h1>", *map(_html, tables)])
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f"<!doctype html>\n<html><head>{head}</head><body>\n{body}\n</body></html>\n"


def _escape_markdown(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n").translate(MARKDOWN_ESCAPES)


def _html(table: Table) -> str:
    rows = "\n".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.head)
    note = f"\n<p>{html.escape(table.note)}</p>" if table.note else ""
    return f"<h2>{html.escape(table.title)}</h2>\n<table><tr>{head}</tr>\n{rows}</table>{note}"
