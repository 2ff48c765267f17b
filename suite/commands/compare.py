"""`suite compare`: artifacts side by side, what is better or worse, and what cannot be told."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from suite import runs, store
from suite.commands.flags import Parser
from suite.commands.stage import check_out
from suite.config import Takes
from suite.document import Bullets, Document, Heading, Image, Table, html, markdown, terminal, visible
from suite.errors import SuiteError, near
from suite.pipeline import on_command_line
from suite.reports import comparison
from suite.reports.comparison import Comparison, Pair
from suite.reports.plots import plots
from suite.reports.subjects import Subject, of_artifact, of_evaluation, unique
from suite.stages import RECORD, Artifact

KINDS = Takes("report", "model", "quantized", "adapter", "package")
WIDE = 200  # columns of a table that goes to a file


def command(verb: str, arguments: list[str]) -> int:
    """Compare what was evaluated; asks no model anything."""
    parser = Parser(f"suite {verb}", "Put what was evaluated side by side; asks no model anything.")
    what = "a run (all it evaluated), an artifact (folder, @stage, key's beginning), or a folder of 'suite eval --out'"
    parser.add_argument("what", nargs="+", help=what)
    parser.add_argument("--against", default="", metavar="NAME", help="what all others are compared with [the first]; "
                        "'parent': each with what it was made from")  # fmt: skip
    parser.add_argument("--diff", nargs="?", const="", metavar="SET", help="show the questions whose score changed")
    parser.add_argument("--out", type=Path, help="folder for comparison.md, .json and .html, and plots")
    parser.add_argument("--json", action="store_true", help="JSON on stdout, for machines")
    given = parser.read(arguments)
    if given.out:
        check_out(given.out)
    subjects = unique(subject for text in given.what for subject in _named(text))
    if not subjects:
        raise SuiteError("nothing was evaluated there", hint='add a stage with use = "eval" to the pipeline')
    found = comparison.compare(subjects, given.against)
    if given.diff:
        known = list(dict.fromkeys(name for subject in subjects for name in subject.sets))
        if given.diff not in known:
            raise SuiteError(f"--diff: none was asked '{given.diff}'", hint=near(given.diff, known))
    if given.out:
        write(given.out, found)
    if given.json:
        print(json.dumps(comparison.plain(found), ensure_ascii=False))
        return 0
    console = Console(width=None if sys.stdout.isatty() else WIDE)
    show(console, found)
    if given.diff is not None:
        for pair in found.pairs:
            show_changed(console, pair, given.diff)
    if given.out:
        console.print(f"report: {given.out / 'comparison.html'}", highlight=False, soft_wrap=True)
    return 0


def _named(text: str) -> Iterator[Subject]:
    """What a word on the command line stands for: the evaluations of a run or of an artifact, or a report."""
    at = store.Store(store.home())
    named = on_command_line(text, KINDS, Path.cwd())
    is_run = (Path(text) / runs.PLAN).is_file()
    if (is_run or isinstance(named, SuiteError)) and (run_dir := runs.find(at.root, text)):
        yield from of_run(run_dir)
        return
    artifact = _kept(text, at, named) if isinstance(named, SuiteError) else named.artifact
    if artifact.type == "report":
        yield of_evaluation(artifact, str(artifact.path.resolve()))
    else:
        yield from of_artifact(artifact, at)


def _kept(text: str, at: store.Store, otherwise: SuiteError) -> Artifact:
    """The artifact whose key begins with `text`."""
    kept = [] if text.startswith("@") else at.find(text)
    if len(kept) > 1:
        raise SuiteError(f"'{text}' begins the keys of {len(kept)} artifacts", hint="give more of the key")
    if not kept:
        raise (
            otherwise
            if text.startswith("@")
            else SuiteError(f"no run, artifact or report '{text}'", hint=otherwise.hint)
        )
    return kept[0]


def of_run(run_dir: Path) -> Iterator[Subject]:
    """What a run evaluated, in its order, and then packages that were compared with their model but not evaluated."""
    report = run_dir / "report.json"
    if not report.is_file():
        raise SuiteError(f"{run_dir.parent.name}/{run_dir.name} was interrupted and has no report")
    stages = [s["name"] for s in json.loads(report.read_text("utf-8"))["stages"]]
    folders = (runs.link(run_dir, name).resolve() for name in stages if runs.link(run_dir, name).exists())
    records = ((folder, json.loads((folder / RECORD).read_text("utf-8"))) for folder in folders)
    made = [Artifact(folder, record["type"], record["digest"]) for folder, record in records]
    evaluated = [of_evaluation(artifact) for artifact in made if artifact.type == "report"]
    yield from evaluated
    known = {subject.digest for subject in evaluated}
    for artifact in made:
        if artifact.type == "package" and artifact.digest not in known:
            subject = Subject(artifact.name, artifact, None, {}, digest=artifact.digest)
            if subject.parity:
                yield subject


def write(out: Path, found: Comparison) -> None:
    """Leave the comparison as Markdown, JSON and HTML, and its plots as PNG; all of it or nothing."""
    images = list(plots(found.subjects))
    document = comparison.document(found)
    whole = Document(document.title, [*document.parts, *_pictures(images), *comparison.questions(found)])
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}") as scratch:
        folder = Path(scratch) / "out"
        folder.mkdir()
        for image in images:
            (folder / f"{image.name}.png").write_bytes(image.png)
        plain = json.dumps(comparison.plain(found), indent=2, ensure_ascii=False) + "\n"
        (folder / "comparison.json").write_text(plain, "utf-8")
        (folder / "comparison.md").write_text(markdown(whole), "utf-8")
        (folder / "comparison.html").write_text(html(whole), "utf-8")
        folder.replace(out)


def _pictures(images: list[Image]) -> list[Heading | Image]:
    return [Heading("Plots"), *images] if images else []


def show(console: Console, found: Comparison) -> None:
    """The comparison on a terminal."""
    title = ""
    for part in comparison.document(found).parts:
        match part:
            case Heading(text):
                title = text
            case Table():
                console.print(terminal(part, title))
            case Bullets(items):
                for item in items:
                    console.print(visible(item), highlight=False, markup=False)
            case str():
                console.print(visible(part), style="dim", highlight=False, markup=False)


def show_changed(console: Console, pair: Pair, only: str) -> None:
    """Questions whose score changed, the two replies side by side."""
    for name in [only] if only else list(pair.differences):
        if name not in pair.differences:
            continue
        table = comparison.changed(pair, name)
        if not table.rows:
            said = f"{name}: no score of {pair.subject.name} differs from {pair.reference.name}'s"
            console.print(said, highlight=False, markup=False)
            continue
        shown = RichTable(title=f"{name}: {len(table.rows)} changed", title_justify="left", show_lines=True)
        for column in ("question", table.header[4], table.header[5]):
            shown.add_column(Text(column), ratio=1, overflow="fold")
        for number, change, asked, expected, before, after in table.rows:
            reference = (visible(f"\nexpected: {expected}") if expected else "", "dim")
            about = Text.assemble((visible(f"{number}: {change}"), "bold"), visible(f"\n{asked}"), reference)
            shown.add_row(about, Text(visible(before)), Text(visible(after)))
        console.print(shown)
