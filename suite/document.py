"""Documents for people: said once, shown as Markdown, as one HTML file that loads nothing, or on a terminal."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

TONES = {
    "better": "good", "held": "good", "worse": "bad", "failed": "bad", "gate failed": "bad", "blocked": "bad",
    "cannot tell": "faint",
}  # fmt: skip
"""What a cell's words mean, for its colour."""
COLOURS = {"good": "green", "bad": "bold red", "faint": "dim"}
NUMBER = re.compile(r"[-+]?[\d.,]+(?:e[-+]?\d+)?(?: ?(?:%|s|ms|[kMGT]?B|nats))?|-|")

MEANING = re.compile(r"[\\`*~$|]|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[:])|^#")
"""What a line of Markdown, its tables and GitHub's formulas are written with, where it stands so that it has a meaning.
"""
ADDRESS = re.compile(r"(?<=:)(?=//)|(?<=www)(?=\.)|(?<=@)", re.IGNORECASE)
"""Where an address or a person's name becomes a link by itself; a space of no width between its parts prevents it."""
COMMANDS = {0x1B: "\u241b"} | dict.fromkeys(range(0x80, 0xA0), "\ufffd")

STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #1a7f37; --bad: #cf222e; --faint: #8888; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem; }
@media (prefers-color-scheme: dark) { :root { --good: #3fb950; --bad: #ff7b72; } }
.wide { overflow-x: auto; margin: .7rem 0 1.4rem; }
table { border-collapse: collapse; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .7rem; text-align: left; vertical-align: top; }
td { white-space: pre-wrap; max-width: 30rem; overflow-wrap: break-word; }
td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.good { color: var(--good); } .bad { color: var(--bad); font-weight: 600; } .faint { opacity: .7; }
pre { background: var(--line); padding: .8rem; overflow-x: auto; } img { max-width: 100%; background: #fff; }
input { font: inherit; padding: .2rem .5rem; width: 22rem; max-width: 100%; }
"""
FILTER = """
for (const box of document.querySelectorAll("input[data-for]")) box.addEventListener("input", () => {
  const words = box.value.toLowerCase().split(/\\s+/);
  let shown = 0;
  for (const row of document.getElementById(box.dataset.for).tBodies[0].rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
    shown += !row.hidden;
  }
  box.nextElementSibling.textContent = shown + " shown";
});
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


class Mono(str):
    """Text that is to be read letter by letter: a key, a gate, a command."""


@dataclass(frozen=True)
class Heading:
    """A title inside the document; level 2 is the largest."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Table:
    """Cells of plain text. `searchable` ones have a field in HTML in which words pick rows."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    searchable: bool = False


@dataclass(frozen=True)
class Listing:
    """Lines as they are typed."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Bullets:
    """Some short notes."""

    items: Sequence[str]


@dataclass(frozen=True)
class Image:
    """A PNG; Markdown refers to it as `<name>.png` beside the document, HTML contains it."""

    name: str
    about: str
    png: bytes = field(repr=False)


Part = str | Heading | Table | Listing | Bullets | Image


@dataclass
class Document:
    """A title and what follows it."""

    title: str
    parts: list[Part] = field(default_factory=list)

    def add(self, *parts: Part) -> None:
        """Append to the end."""
        self.parts += parts


def one_line(text: str, longest: int = 120) -> str:
    """Text without line breaks, cut with an ellipsis."""
    line = " ".join(text.split())
    return line if len(line) <= longest else line[: longest - 1] + "…"


def visible(text: str) -> str:
    """Text without the characters that begin a terminal's own commands: ESC, and those of Unicode that stand for it."""
    return text.translate(COMMANDS)


def markdown(document: Document) -> str:
    """The document as GitHub's Markdown."""
    return "\n".join([f"# {_md(document.title)}\n", *map(_md_part, document.parts)])


def _md_part(part: Part) -> str:
    match part:
        case Heading(text, level):
            return f"{'#' * level} {_md(text)}\n"
        case Table(header, rows):
            lines = [list(map(_md, header)), ["---"] * len(header), *(list(map(_md, row)) for row in rows)]
            return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"
        case Listing(lines):
            return "\n".join(["```", *lines, "```\n"])
        case Bullets(items):
            return "\n".join(f"- {_md(item)}" for item in items) + "\n"
        case Image(name, about, _):
            return f"![{_md(about)}]({name}.png)\n"
        case _:
            return _md(part) + "\n"


def _md(text: str) -> str:
    """One line in which nothing but `Mono` has a meaning: replies of models may hold anything, even what is fetched."""
    line = visible(" ".join(text.split()))
    if isinstance(text, Mono):
        return "`" + line.replace("|", "\\|") + "`"
    line = line.replace("&", "&amp;").replace("<", "&lt;")
    return ADDRESS.sub("&#8203;", MEANING.sub(r"\\\g<0>", line))


def html(document: Document) -> str:
    """The document as one file: no address is loaded, whatever stands in it, and scripts are only ours."""
    parts = [_html_part(part, number) for number, part in enumerate(document.parts)]
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width"><title>{escape(document.title)}</title>'
        f"<style>{STYLE}</style>"
    )
    body = "\n".join([f"<h1>{escape(document.title)}</h1>", *parts, f"<script>{FILTER}</script>"])
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _html_part(part: Part, number: int) -> str:
    match part:
        case Heading(text, level):
            return f"<h{level}>{escape(text)}</h{level}>"
        case Table():
            return _html_table(part, f"table{number}")
        case Listing(lines):
            return f"<pre>{escape(chr(10).join(lines))}</pre>"
        case Bullets(items):
            return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"
        case Image(_, about, png):
            data = base64.b64encode(png).decode()
            return f'<img alt="{escape(about)}" src="data:image/png;base64,{data}">'
        case _:
            return f"<p>{escape(part)}</p>"


def _html_table(table: Table, name: str) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.header)
    body = "\n".join("<tr>" + "".join(map(_html_cell, row)) + "</tr>" for row in table.rows)
    label = "words to search for"
    search = (
        f'<p><input data-for="{name}" aria-label="{label}" placeholder="{label}"> <span role="status"></span></p>\n'
    )
    # the box scrolls, by keys too, so that the table stays one to those who are read it
    found = (
        f'<div class="wide" tabindex="0"><table id="{name}"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )
    return search + found if table.searchable else found


def _html_cell(text: str) -> str:
    tone = TONES.get(text) or ("number" if NUMBER.fullmatch(text) else "")
    shown = f"<code>{escape(text)}</code>" if isinstance(text, Mono) else escape(text)
    return f'<td class="{tone}">{shown}</td>' if tone else f"<td>{shown}</td>"


def terminal(table: Table, title: str = "") -> Any:
    """A `rich` table: columns of numbers to the right, verdicts in colour."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable(box=box.SIMPLE_HEAD, title=title or None, title_justify="left")
    for index, column in enumerate(table.header):
        numbers = all(NUMBER.fullmatch(row[index]) for row in table.rows)
        shown.add_column(Text(column), justify="right" if numbers else "left")
    for row in table.rows:
        shown.add_row(*(Text(visible(cell), style=COLOURS.get(TONES.get(cell, ""), "")) for cell in row))
    return shown
