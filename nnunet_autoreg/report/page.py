"""The parts of one self-contained HTML page: its look, tables, figures.

Nothing is fetched from anywhere.
"""

from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1f24;--soft:#59636e;--line:#d5dae0;--panel:#f5f7f9;
--main:#c2410c;--second:#0072b2;--base:#59636e;--base2:#8a6d00;--given:#0072b2;--good:#00694b;--warn:#9a3412}
@media(prefers-color-scheme:dark){:root{--paper:#14181d;--ink:#e6e9ed;--soft:#a3adb8;--line:#39424c;--panel:#1d232a;
--main:#ff9d5c;--second:#62b8f0;--base:#a3adb8;--base2:#e3c557;--given:#62b8f0;--good:#4fd1a5;--warn:#ffb38a}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1240px;padding:1.2rem clamp(.8rem,3vw,2.4rem) 4rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","DejaVu Sans",sans-serif}
h1{font-size:1.7rem;line-height:1.25;margin:.4rem 0;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:2.6rem 0 .6rem;padding-top:1rem;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:1.4rem 0 .4rem}
p{margin:.5rem 0;max-width:46rem}
a{color:var(--second)}
code,pre{font:.9em/1.5 ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;overflow-wrap:anywhere}
pre{background:var(--panel);border:1px solid var(--line);border-radius:6px;padding:.7rem .9rem;overflow-x:auto;overflow-wrap:normal}
nav{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;font-size:.95rem}
.soft,figcaption{color:var(--soft)}
figcaption{font-size:.9rem;max-width:46rem}
.verdict{border-left:4px solid var(--good);background:var(--panel);padding:.6rem .9rem;margin:1rem 0;max-width:none}
.verdict.warn{border-color:var(--warn)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.7rem;margin:1rem 0;padding:0}
.tiles div{background:var(--panel);border:1px solid var(--line);border-radius:6px;padding:.6rem .8rem}
.tiles dt{color:var(--soft);font-size:.88rem}.tiles dd{margin:0;font-size:1.25rem;font-weight:600;overflow-wrap:anywhere}
.tiles dd small{display:block;font-size:.82rem;font-weight:400;color:var(--soft)}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:6px;margin:.6rem 0}
.scroll:focus-visible{outline:2px solid var(--second)}
table{border-collapse:collapse;width:100%;font-size:.93rem}
th,td{text-align:left;vertical-align:top;padding:.4rem .7rem;border-top:1px solid var(--line)}
thead th{border-top:0;background:var(--panel);white-space:nowrap}
tbody th{font-weight:600;min-width:7.5rem}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td.wide{min-width:17rem}td ul{margin:0;padding-left:1.1rem}
summary{cursor:pointer;margin:.6rem 0;font-weight:600}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,23rem),1fr));gap:1.2rem}
figure{margin:0 0 1.4rem}.charts figure{margin:0}
.chart{width:100%;height:auto;display:block}
.chart text{font:13px system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;fill:var(--soft)}
.chart .grid{stroke:var(--line)}.chart polyline{fill:none;stroke-linejoin:round}
.main{--c:var(--main);--w:2.4}.second{--c:var(--second);--w:1.5}
.base{--c:var(--base);--w:1.8;--d:7 4}.base2{--c:var(--base2);--w:1.8;--d:2 3}
.chart polyline{stroke:var(--c);stroke-width:var(--w);stroke-dasharray:var(--d,none)}
.chart circle{fill:var(--c)}.chart text.label{fill:var(--c);font-weight:600}
.panels{display:grid;grid-template-columns:repeat(4,minmax(0,15rem));gap:.6rem;margin:.3rem 0 .6rem}
@media(max-width:640px){.panels{grid-template-columns:repeat(2,minmax(0,1fr))}}
.panels div{min-width:0}.panels span{display:block;font-size:.85rem;color:var(--soft)}
.slice{width:100%;height:auto;display:block;background:repeating-linear-gradient(45deg,var(--panel) 0 6px,var(--line) 6px 7px)}
.slice image{image-rendering:pixelated}
.slice .given{fill:var(--given);fill-opacity:.28;stroke:none}
.slice .edge{fill:none;stroke:#62b8f0;stroke-width:1.6;vector-effect:non-scaling-stroke}
.bar{display:inline-block;height:.8rem;width:10rem;vertical-align:-.1rem;border:1px solid var(--line);
background:linear-gradient(90deg,#000004,#420a68,#932667,#dd513a,#fca50a,#fcffa4)}
"""


def page(title: str, body: Iterable[str]) -> str:
    """A whole document; ``body`` is HTML, ``title`` plain text."""
    head = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
    )
    return head + "\n".join(body) + "\n</body>\n</html>\n"


def section(name: str, title: str, *content: str) -> str:
    """A section under a heading that ``#name`` leads to; empty parts are left out."""
    parts = "\n".join(part for part in content if part)
    return (
        f'<section aria-labelledby="{name}">\n<h2 '
        f'id="{name}">{escape(title)}</h2>\n{parts}\n</section>'
    )


def paragraph(text: str, kind: str = "") -> str:
    """Plain text as a paragraph."""
    return f"<p{_class(kind)}>{escape(text)}</p>"


def commands(lines: Iterable[str]) -> str:
    """What to type."""
    return f'<pre tabindex="0"><code>{escape(chr(10).join(lines))}</code></pre>'


def tiles(values: Iterable[tuple[str, str, str]]) -> str:
    """Key figures: (name, value, remark)."""
    cells = []
    for name, value, remark in values:
        note = f"<small>{escape(remark)}</small>" if remark else ""
        cells.append(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}{note}</dd></div>")
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def table(
    name: str, header: Sequence[str], rows: Iterable[Sequence[str]], kinds: Sequence[str] = ()
) -> str:
    """A table that scrolls sideways where it is too wide; the first cell of a row names it.

    Args:
        name: said by screen readers.
        rows: plain text; a cell of several lines becomes a list.
        kinds: per column, "n" for numbers, "wide" for sentences, or "".
    """
    kinds = kinds or [""] * len(header)
    head = "".join(
        f'<th scope="col"{_class(k)}>{escape(h)}</th>' for h, k in zip(header, kinds, strict=True)
    )
    lines = (enumerate(zip(row, kinds, strict=True)) for row in rows)
    body = "\n".join(
        "<tr>" + "".join(_cell(i, text, kind) for i, (text, kind) in line) + "</tr>"
        for line in lines
    )
    return (
        f'<div class="scroll" role="region" aria-label="{escape(name)}" '
        f'tabindex="0"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def folded(title: str, content: str) -> str:
    """Content that is closed at first."""
    return f"<details><summary>{escape(title)}</summary>\n{content}\n</details>"


def _cell(number: int, text: str, kind: str) -> str:
    lines = text.split("\n")
    inner = (
        escape(text)
        if len(lines) == 1
        else "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"
    )
    return (
        f'<th scope="row"{_class(kind)}>{inner}</th>'
        if number == 0
        else f"<td{_class(kind)}>{inner}</td>"
    )


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
