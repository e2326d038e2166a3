"""Tables, key figures and other parts of the HTML page, and the template that holds them.

The page is one file. Nothing is loaded from anywhere when it is opened.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from string import Template

TEMPLATE_NAME = "page.html"


def filled_template(parts: Mapping[str, str]) -> str:
    """Return the page: the template with its placeholders replaced by ``parts``, which are HTML."""
    text = resources.files(__package__).joinpath(TEMPLATE_NAME).read_text(encoding="utf-8")
    return Template(text).substitute(parts)


def section(name: str, title: str, content: str) -> str:
    """Return a section under a heading that ``#name`` leads to."""
    heading = f'<h2 id="{name}">{escape(title)}</h2>'
    return f'<section aria-labelledby="{name}">\n{heading}\n{content}\n</section>'


def paragraph(text: str, css_class: str = "") -> str:
    """Return plain text as a paragraph."""
    return f"<p{_class(css_class)}>{escape(text)}</p>"


def commands(lines: Iterable[str]) -> str:
    """Return lines to type."""
    text = "\n".join(lines)
    return f'<pre tabindex="0"><code>{escape(text)}</code></pre>'


def tiles(values: Iterable[tuple[str, str, str]]) -> str:
    """Return key figures, each given as (name, value, remark)."""
    cells = []
    for name, value, remark in values:
        note = f"<small>{escape(remark)}</small>" if remark else ""
        cells.append(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}{note}</dd></div>")

    return f'<dl class="tiles">{"".join(cells)}</dl>'


def table(
    name: str,
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    classes: Sequence[str] = (),
) -> str:
    """Return a table that scrolls sideways if it is too wide. The first cell of a row is its title.

    Args:
        name: name of the table for screen readers.
        rows: plain text; a cell of several lines becomes a list.
        classes: the style of each column: "n" for numbers, "wide" for sentences, or "".
    """
    classes = classes or [""] * len(header)
    head = []
    for title, css_class in zip(header, classes, strict=True):
        head.append(f'<th scope="col"{_class(css_class)}>{escape(title)}</th>')

    body = []
    for row in rows:
        cells: list[str] = []
        for text, css_class in zip(row, classes, strict=True):
            is_title = not cells
            cells.append(_cell(text, css_class, is_title))
        body.append(f"<tr>{''.join(cells)}</tr>")

    lines = [
        f'<div class="scroll" role="region" aria-label="{escape(name)}" tabindex="0"><table>',
        f"<thead><tr>{''.join(head)}</tr></thead>",
        "<tbody>",
        "\n".join(body),
        "</tbody>",
        "</table></div>",
    ]
    return "\n".join(lines)


def folded(title: str, content: str) -> str:
    """Return content that is hidden until its title is clicked."""
    return f"<details><summary>{escape(title)}</summary>\n{content}\n</details>"


def _cell(text: str, css_class: str, is_title: bool) -> str:
    content = escape(text)
    if "\n" in text:
        items = [f"<li>{line}</li>" for line in content.split("\n")]
        content = f"<ul>{''.join(items)}</ul>"

    if is_title:
        return f'<th scope="row"{_class(css_class)}>{content}</th>'
    return f"<td{_class(css_class)}>{content}</td>"


def _class(css_class: str) -> str:
    return f' class="{css_class}"' if css_class else ""
