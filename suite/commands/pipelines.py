"""`suite run` and `suite plan`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from suite import pipeline, store
from suite.commands import outputs
from suite.commands.env import provide
from suite.commands.flags import Parser
from suite.edges import at_sign
from suite.envs import Environment
from suite.errors import SuiteError, near
from suite.plan import Plan
from suite.progress import watching
from suite.references import External
from suite.runner import Outcome, Runner, preview, verdict_error
from suite.runs import link_artifacts, new_run

WIDE = 160  # columns of a table that goes to a file


def _parser(verb: str, description: str) -> Parser:
    parser = Parser(f"suite {verb}", description)
    parser.add_argument("pipeline", type=Path, help="the pipeline file (.toml)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting, e.g. stage.train.lr=2e-4"
    )
    parser.add_argument("--json", action="store_true", help="JSON on stdout, for machines")
    return parser


def plan(verb: str, arguments: list[str]) -> int:
    """Check a pipeline and show, stage by stage, what a run would do."""
    given = _parser(verb, "Check a pipeline file and show what a run would do; runs nothing.").read(arguments)
    return _show_plan(pipeline.read(given.pipeline, given.set), given.json)


def _show_plan(read: Plan, as_json: bool) -> int:
    outcomes = preview(read, store.Store(store.home()))
    if as_json:
        for outcome in outcomes.values():
            print(json.dumps(_planned(read, outcome)))
        return 0
    table = Table("stage", "kind", "makes", "from", "then", box=box.SIMPLE_HEAD)
    for outcome in outcomes.values():
        row = _planned(read, outcome)
        table.add_row(*map(escape, (row["stage"], row["kind"], row["makes"], ", ".join(row["from"]), row["then"])))
    Console(width=None if sys.stdout.isatty() else WIDE).print(table)
    return 0


def _planned(read: Plan, outcome: Outcome) -> dict[str, Any]:
    node = read.nodes[outcome.name]
    sources = [s.name if isinstance(s, External) else at_sign(s) for group in node.inputs.values() for s in group]
    to_run = "to run" if outcome.key else "to run if its inputs change"
    then = "cached" if outcome.state == "cached" else to_run
    return {
        "stage": outcome.name,
        "kind": outcome.kind,
        "makes": outcome.makes,
        "from": sources,
        "then": then,
        "key": outcome.key,
    }


def run(verb: str, arguments: list[str]) -> int:
    """Run a pipeline file."""
    parser = _parser(
        verb, "Run a pipeline file. What is in the store is not made again; after a crash the same command continues."
    )
    parser.add_argument("--plan", action="store_true", help="only show what would run")
    parser.add_argument(
        "--force", action="append", default=[], metavar="STAGE", help="make this stage again although it is cached"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="stages that may run at the same time [1]")
    outputs.add(parser)
    parser.add_argument("--serve", action="store_true", help="afterwards serve what the [serve] table names")
    parser.add_argument(
        "--yes", action="store_true", help="install the environment of an engine or a library where it is missing"
    )
    given = parser.read(arguments)
    if given.jobs < 1:
        raise SuiteError(f"--jobs must be at least 1, got {given.jobs}")

    def install(environment: Environment) -> None:
        provide(environment, yes=given.yes, as_json=given.json)

    read = pipeline.read(given.pipeline, given.set, pipeline.require if given.plan else install)
    for name in given.force:
        if name not in read.nodes:
            raise SuiteError(f"--force: no stage '{name}'", hint=near(name, read.nodes))
    if given.serve and not read.serve:
        raise SuiteError("--serve needs a [serve] table", where=str(given.pipeline), hint='e.g. [serve] base = "nano"')
    if given.plan:
        return _show_plan(read, given.json)
    outputs.check(given)
    if given.serve:
        from suite.commands.serve import prepare  # which imports this

        prepare(read, given.yes)
    run_dir, error = execute(read, jobs=given.jobs, force=frozenset(given.force), as_json=given.json)
    outputs.deliver(given, run_dir, f"{read.name}/{run_dir.name}", measured(run_dir), error)
    if error:
        raise error
    if given.serve:
        from suite.commands.serve import serve_plan

        return serve_plan(read, run_dir)
    return 0


def execute(
    read: Plan, *, jobs: int = 1, force: frozenset[str] = frozenset(), as_json: bool = False
) -> tuple[Path, SuiteError | None]:
    """Run a plan, leave its run directory complete, print the report; returns the directory and what went wrong."""
    from suite.reports import run as report

    at = store.Store(store.home())
    described = [
        {
            "name": n.name,
            "settings": n.stage.model_dump(mode="json"),
            "after": sorted(n.after),
            "gates": [g.text for g in n.gates],
        }
        for n in read.nodes.values()
    ]
    run_dir = new_run(at, read.name, read.text, described)
    started = time.monotonic()
    with watching(read.nodes, as_json) as view:
        runner = Runner(read, at, run_dir, view, jobs=jobs, force=force)
        try:
            runner.run()
        finally:
            link_artifacts(run_dir, [(o.name, o.artifact) for o in runner.outcomes.values() if o.artifact])
    ended = report.ending(read, runner.outcomes, run_dir)
    report.write(run_dir, ended)
    error = verdict_error(runner.outcomes)
    if as_json:
        summary = {"event": "end", "ok": error is None, "run": str(run_dir), "report": str(run_dir / "report.json")}
        print(json.dumps(summary), flush=True)
    else:
        console = Console(width=None if sys.stdout.isatty() else WIDE)
        report.show(console, ended)
        _summary(console, runner.outcomes, run_dir, ended.commands, time.monotonic() - started)
    return run_dir, error


def measured(run_dir: Path) -> dict[str, Any]:
    """The metrics of a finished run by stage."""
    report = json.loads((run_dir / "report.json").read_text("utf-8"))
    return {stage["name"]: stage["metrics"] for stage in report["stages"]}


def _summary(
    console: Console, outcomes: Mapping[str, Outcome], run_dir: Path, commands: list[str], seconds: float
) -> None:
    counts = {
        state: sum(o.state == state for o in outcomes.values()) for state in ("done", "cached", "failed", "blocked")
    }
    said = ", ".join(f"{n} {state}" for state, n in counts.items() if n)
    console.print(f"{len(outcomes)} stages: {said} in {seconds:.1f} s", highlight=False)
    console.print(f"report: {run_dir / 'report.md'}", highlight=False, soft_wrap=True)
    if commands:
        console.print("\nnext:", highlight=False)
    for command in commands:
        console.print(f"  {command}", highlight=False, soft_wrap=True, markup=False)
