"""`suite show` and `suite runs`: what was done, and where an artifact came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from suite import store
from suite.commands.flags import Parser
from suite.errors import SuiteError, near
from suite.runs import all_runs, find, newest
from suite.stages import Artifact


def runs(verb: str, arguments: list[str]) -> int:
    """List all runs with what became of them."""
    parser = Parser(f"suite {verb}", "List runs, the newest last.")
    parser.add_argument("--json", action="store_true", help="JSON on stdout, for machines")
    given = parser.read(arguments)
    table = Table("run", "done", "cached", "failed", "blocked", "verdict", box=box.SIMPLE_HEAD)
    for folder in all_runs(store.Store(store.home()).root):
        report = _report(folder)
        states = [s["state"] for s in report.get("stages", [])]
        counts = {state: states.count(state) for state in ("done", "cached", "failed", "blocked")}
        gates = [g["held"] for s in report.get("stages", []) for g in s["gates"]]
        verdict = (
            "interrupted" if not report else "gate failed" if not all(gates) else "failed" if counts["failed"] else "ok"
        )
        name = f"{folder.parent.name}/{folder.name}"
        if given.json:
            print(json.dumps({"run": name, "path": str(folder), **counts, "verdict": verdict}))
        table.add_row(name, *(str(n) for n in counts.values()), verdict)
    if not given.json:
        Console().print(table if table.row_count else "no runs yet: suite run examples/quickstart.toml")
    return 0


def _report(run_dir: Path) -> dict[str, Any]:
    file = run_dir / "report.json"
    return dict(json.loads(file.read_text("utf-8"))) if file.is_file() else {}


def show(verb: str, arguments: list[str]) -> int:
    """Show a run's report, or an artifact with its lineage and what was measured."""
    parser = Parser(
        f"suite {verb}",
        "Show a run (name, or part of it) or an artifact (@stage, or its key's beginning); the newest run by default.",
    )
    parser.add_argument("what", nargs="?", help="a run or an artifact")
    parser.add_argument("--json", action="store_true", help="JSON on stdout, for machines")
    given = parser.read(arguments)
    at = store.Store(store.home())
    if chosen := find(at.root, given.what or ""):
        return _show_run(chosen, given.json)
    artifacts = _named(at, given.what) if given.what else []
    if len(artifacts) > 1:
        raise SuiteError(f"'{given.what}' begins the keys of {len(artifacts)} artifacts", hint="give more of the key")
    if not artifacts:
        names = [f"{r.parent.name}/{r.name}" for r in all_runs(at.root)]
        raise SuiteError(
            f"no run or artifact '{given.what}'" if given.what else "no runs yet",
            hint=near(str(given.what or ""), names),
        )
    return _show_artifact(artifacts[0], given.json)


def _named(at: store.Store, what: str) -> list[Artifact]:
    if what.startswith("@"):
        return at.find(newest(at.root, what[1:]).name)
    return at.find(what)


def _show_run(run_dir: Path, as_json: bool) -> int:
    file = run_dir / ("report.json" if as_json else "report.md")
    if not file.is_file():
        raise SuiteError(
            f"{run_dir.parent.name}/{run_dir.name} was interrupted and has no report",
            hint=f"its events: {run_dir / 'events.jsonl'}",
        )
    if as_json:
        print(file.read_text("utf-8"), end="")
    else:
        Console().print(Markdown(file.read_text("utf-8")))
        print(run_dir)
    return 0


def _show_artifact(artifact: Artifact, as_json: bool) -> int:
    record = artifact.record
    if as_json:
        print(json.dumps({**record, "path": str(artifact.path)}, ensure_ascii=False))
        return 0
    console = Console()
    made = f"{record['type']} made by {record['kind']} on {record['made']} in {record['seconds']:.1f} s"
    console.print(f"[bold]{escape(record['name'])}[/]: {made}")
    console.print(str(artifact.path), soft_wrap=True)
    tree = Tree("made from")
    lineage(artifact, tree)
    console.print(tree)
    for title in ("metrics", "settings"):
        console.print(f"[bold]{title}[/]")
        console.print_json(data=record[title])
    return 0


def lineage(artifact: Artifact, tree: Tree) -> None:
    """Add what `artifact` was made from to `tree`, and what that was made from."""
    for field, made_from in artifact.record.get("inputs", {}).items():
        for source in made_from:
            there = "" if Path(source["path"]).exists() else " (gone)"
            branch = tree.add(escape(f"{field}: {source['name']} ({source['type']}, {source['digest'][:12]}){there}"))
            lineage(Artifact(Path(source["path"]), source["type"], source["digest"]), branch)
