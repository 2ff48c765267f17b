"""Documents: what a model said stays text in Markdown and HTML, nothing is loaded, and JUnit files are valid."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console

from suite import junit
from suite.document import Bullets, Document, Heading, Image, Listing, Mono, Table, html, markdown, one_line, terminal

EVIL = '<script src="https://x.example/a.js"></script> | **bold** `code`\n<img src=x onerror=alert(1)>'


def whole(cell: str) -> Document:
    table = Table(("what", "n"), [(cell, "1.5"), (Mono("a|b"), "-")], searchable=True)
    parts = [Heading(cell), cell, table, Listing([cell]), Bullets([cell]), Image("plot", cell, b"\x89PNG")]
    return Document(cell, list(parts))


class Page(HTMLParser):
    """Elements with their attributes, and the text of cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "td":
            self.cells.append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "td"

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.cells[-1] += data


def test_html_holds_everything_and_loads_nothing() -> None:
    page = Page(html(whole(EVIL)))
    assert page.cells == [EVIL, "1.5", "a|b", "-"]
    scripts = [attributes for tag, attributes in page.elements if tag == "script"]
    assert scripts == [{}]
    images = [attributes for tag, attributes in page.elements if tag == "img"]
    assert [i["src"] for i in images] == ["data:image/png;base64,iVBORw=="]
    addresses = [v for _, attributes in page.elements for k, v in attributes.items() if k in ("src", "href")]
    assert all(str(address).startswith("data:") for address in addresses)
    policy = next(a["content"] for tag, a in page.elements if tag == "meta" and a.get("http-equiv"))
    assert str(policy).startswith("default-src 'none'")
    assert {a.get("scope") for tag, a in page.elements if tag == "th"} == {"col"}
    assert all(a.get("aria-label") for tag, a in page.elements if tag == "input")
    assert all(a["alt"] for tag, a in page.elements if tag == "img")
    assert [a["data-for"] for tag, a in page.elements if tag == "input"] == [
        a["id"] for tag, a in page.elements if tag == "table"
    ]


@given(st.text())
def test_any_text_stays_text_in_html(text: str) -> None:
    found = Page(html(whole(text))).cells[0]
    assert found.replace("\r\n", "\n").replace("\r", "\n") == text.replace("\r\n", "\n").replace("\r", "\n").replace(
        "\0", "\0"
    )


@given(st.text())
def test_a_table_of_markdown_keeps_its_shape(text: str) -> None:
    lines = markdown(Document("t", [Table(("a", "b"), [(text, "1")])])).split("\n\n", 1)[1].rstrip("\n").split("\n")
    assert len(lines) == 3
    for line in lines:
        assert len(re.findall(r"(?<!\\)\|", line)) == 3
    assert "<" not in lines[2]


SHOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])
INERT = {"text", "softbreak"}


def cell(text: str) -> tuple[str, set[str]]:
    """What a reader of Markdown makes of a cell: its text, and what else stands in it."""
    page = SHOWN.parse(markdown(Document("t", [Table(("a",), [(f"x {text}",)])])))
    inline = [token for token in page if token.type == "inline"][-1]
    found = "".join(token.content for token in inline.children or ())
    return found.replace("\u200b", ""), {token.type for token in inline.children or ()} - INERT


EVIL_WORDS = (
    "![a](http://evil/x.png)", "[l](http://e)", "[l]: http://e", "\\*b\\*", "\\![a](b)", "a | b \\| c \\\\| d", "__b__ _i_",
    "`code` ``co`de``", "~~gone~~", "<img src=x>", "<http://e>", "&lt;b>&#33;[a](b)", "$x$ # heading", "http://e.com",
)  # fmt: skip


@pytest.mark.parametrize("text", EVIL_WORDS)
def test_nothing_that_a_model_says_is_fetched_linked_or_set_in_markdown(text: str) -> None:
    assert cell(text) == (f"x {text}", set())


@given(st.lists(st.sampled_from([*EVIL_WORDS, *"\\`*_[]()!|<>&;#~$ a\n"])).map("".join))
def test_any_text_stays_text_in_markdown(text: str) -> None:
    assert cell(text) == (" ".join(f"x {text}".split()), set())


@pytest.mark.parametrize("text", ["https://e.com", "WWW.e.com", "ask @admin", "me@e.com"])
def test_what_looks_like_an_address_is_no_link(text: str) -> None:
    """GitHub and GitLab make links and notifications of such words wherever they stand."""
    page = markdown(Document("t", [text]))
    assert not re.search(r"://|www\.|@\w", page, re.IGNORECASE)
    assert page.replace("&#8203;", "").endswith(f"{text}\n")


def test_markdown_of_every_part() -> None:
    shown = markdown(whole("a <b> *c*"))
    assert shown.startswith("# a &lt;b> \\*c\\*\n\n## a &lt;b>")
    for part in ("| `a\\|b` | - |", "```\na <b> *c*\n```", "- a &lt;b>", "![a &lt;b> \\*c\\*](plot.png)"):
        assert part in shown


def test_a_page_that_is_printed_does_not_command_the_terminal() -> None:
    assert "\x1b" not in markdown(Document("\x1b[2J", ["\x1b[2J", Table(("a",), [("\x1b[2J",)])]))


def test_a_line_of_markdown_is_no_heading() -> None:
    page = SHOWN.parse(markdown(Document("t", ["# x"])))
    assert [token.tag for token in page if token.type == "heading_open"] == ["h1"]


def test_a_terminal_shows_cells_as_they_are() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    evil = "[red]no markup \x1b]0;title\x07 \x9b2J"
    console.print(terminal(Table(("x", "verdict"), [(evil, "worse")]), "title"))
    text = console.export_text(clear=False)
    assert "[red]no markup ␛]0;title" in text
    assert "\x9b" not in text
    assert "]0;" not in console.export_text(styles=True).replace("␛]0;", "")
    assert "worse" in text


def test_long_texts_become_one_line() -> None:
    assert one_line("a\n b") == "a b"
    assert one_line("x" * 200) == "x" * 119 + "…"


CASES = [
    junit.Case("score", "quiz", said="accuracy 90 %", seconds=1.5),
    junit.Case("score", "gate", "acc >= 0.9: 0.8 is less\nmore"),
    junit.Case("other", "texts", "no logprobs", "skipped"),
    junit.Case("other", "server", "died", "error"),
]


def test_junit_has_the_structure_that_ci_systems_read() -> None:
    """Elements, attributes and counts of the schema that Jenkins and GitLab publish for JUnit's files."""
    root = ElementTree.fromstring(junit.xml("quickstart", CASES))
    assert (root.tag, root.attrib) == (
        "testsuites", {"name": "quickstart", "tests": "4", "failures": "1", "errors": "1", "time": "1.500"},
    )  # fmt: skip
    suites = {suite.attrib["name"]: suite for suite in root}
    assert list(suites) == ["other", "score"]
    assert {k: suites["other"].attrib[k] for k in ("tests", "failures", "errors", "skipped")} == {
        "tests": "2", "failures": "0", "errors": "1", "skipped": "1",
    }  # fmt: skip
    cases = {case.attrib["name"]: case for case in root.iter("testcase")}
    assert all(set(case.attrib) == {"classname", "name", "time"} for case in cases.values())
    assert cases["quiz"].attrib["classname"] == "quickstart.score"
    assert [child.tag for child in cases["quiz"]] == ["system-out"]
    failure = cases["gate"].find("failure")
    assert failure is not None
    assert (failure.attrib["message"], failure.text) == ("acc >= 0.9: 0.8 is less", "acc >= 0.9: 0.8 is less\nmore")
    assert [child.tag for name in ("texts", "server") for child in cases[name]] == ["skipped", "error"]


@pytest.mark.parametrize("text", ["\x00\x08\x1b[1m", "\ud800", "\ufffe", "a<b>&\"'", "好"])
def test_whatever_a_model_says_is_valid_xml(text: str) -> None:
    root = ElementTree.fromstring(junit.xml(text, [junit.Case(text, text, f"x{text}", said=text)]).encode())
    assert root.find("testsuite/testcase/failure") is not None


@given(st.text())
def test_any_text_is_valid_xml(text: str) -> None:
    ElementTree.fromstring(junit.xml(text, [junit.Case(text, text, text, said=text)]).encode())
