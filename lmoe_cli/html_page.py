"""HTML pages of numbers, one file each: no script, no font, no request."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from string import Template

from lmoe_cli.readable import MAX_TEXT, shortened, visible

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222;
  background: #fff }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin: 2rem 0 .3rem }
p { max-width: 50rem; margin: .3rem 0; color: #555 }
div { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; text-align: right; border: 1px solid #e4e4e4; white-space: nowrap }
th { background: #f6f6f6; font-weight: 600 }
tbody th, .words td { text-align: left }
$style</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")


def document(title: str, parts: Iterable[str], style: str = "") -> str:
    """A page.

    Args:
        title: Any text.
        parts: HTML, one below the other.
        style: More rules of CSS, a line each.
    """
    return PAGE.substitute(title=text(title), body="\n".join(parts), style=style)


def text(words: str) -> str:
    """Any text as HTML: bounded, visible, and without a meaning."""
    return escape(visible(shortened(words, MAX_TEXT)))


def row(head: str, cells: Iterable[str]) -> str:
    """A row of a table: a text in front, and cells as HTML."""
    return f"<tr><th>{text(head)}</th>{''.join(cells)}</tr>"


def cell(inner: str) -> str:
    """A cell of HTML."""
    return f"<td>{inner}</td>"


def table(heads: Iterable[str], rows: Iterable[str], kind: str = "") -> str:
    """A table.

    Args:
        heads: Texts over the columns.
        rows: From `row`.
        kind: Class of CSS.
    """
    top = "".join(f"<th>{text(head)}</th>" for head in heads)
    body = "\n".join(rows)
    named = f' class="{kind}"' if kind else ""
    return f"<div><table{named}>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>"


def section(title: str, words: str, inner: str) -> str:
    """A heading, a few words and what they are about."""
    return f"<h2>{text(title)}</h2>\n<p>{text(words)}</p>\n{inner}"


def listing(title: str, items: Iterable[str]) -> str:
    """A heading and a list of texts."""
    told = "\n".join(f"<li>{text(item)}</li>" for item in items)
    return f"<h2>{text(title)}</h2>\n<ul>\n{told}\n</ul>"
