"""`suite env`: the environments of libraries that cannot live beside ours."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from suite import envs, pipeline
from suite.commands.flags import Parser
from suite.envs import Environment
from suite.errors import Interrupted, SuiteError
from suite.progress import watching
from suite.runner import View

WIDE = 160  # columns: paths stay whole, to be copied
ACTIONS = {
    "list": "what there is, and what of it is installed",
    "install": "install environments, from exact pins",
    "check": "import their libraries and compare versions with the pins",
    "remove": "delete all that is installed under a name",
}


def command(verb: str, arguments: list[str]) -> int:
    """List, install, check or remove environments; exit code 1 when a check finds a problem."""
    text = "Environments of libraries whose pins exclude ours: " + "; ".join(f"{a}: {t}" for a, t in ACTIONS.items())
    parser = Parser(f"suite {verb}", text + ".")
    parser.add_argument("action", choices=ACTIONS, help="what to do")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(envs.BUILT_IN)}, or a pipeline's")
    parser.add_argument("--pipeline", type=Path, help="a pipeline file whose [env.NAME] tables count")
    parser.add_argument("--json", action="store_true", help="JSON on stdout, for machines")
    given = parser.read(arguments)
    tables = pipeline.read_environments(given.pipeline) if given.pipeline else {}
    if given.action == "list":
        return _list(tables, given.json)
    if not given.names:
        raise SuiteError(
            f"suite env {given.action} needs a name", hint=f"known: {', '.join({**envs.BUILT_IN, **tables})}"
        )
    chosen = [tables.get(name) or envs.get(name) for name in given.names]
    if given.action == "install":
        return install(*chosen, as_json=given.json)
    action = {"check": _check, "remove": _remove}[given.action]
    return max(action(environment, given.json) for environment in chosen)


def _list(tables: Mapping[str, Environment], as_json: bool) -> int:
    found = {**{name: envs.get(name) for name in envs.BUILT_IN if envs.device() in envs.BUILT_IN[name]}, **tables}
    table = Table("environment", "state", "size", box=box.SIMPLE_HEAD)
    for name, environment in found.items():
        size = environment.record().get("bytes", 0) / 1e9
        row = {
            "name": name,
            "installed": environment.installed,
            "gigabytes": round(size, 2),
            "python": str(environment.python),
        }
        if as_json:
            print(json.dumps(row))
        state = "[green]installed[/]" if environment.installed else f"suite env install {name}"
        table.add_row(name, state, f"{size:.2f} GB" if size else environment.cost)
        if environment.installed:
            table.add_row("", f"[dim]{environment.python}[/]", "")
    if not as_json:
        Console(width=WIDE).print(table)
    return 0


def install(*environments: Environment, as_json: bool = False) -> int:
    """Make those that are not there, as many at a time as there are processors, and say so; raises SuiteError."""
    wanted = [environment for environment in environments if not environment.installed]
    if wanted:
        with watching([environment.name for environment in wanted], as_json) as view:
            _install(wanted, view)
    for environment in environments:
        said = "is installed already"
        if environment in wanted:
            record = environment.record()
            said = f"installed in {record['seconds']:.0f} s, {record['bytes'] / 1e9:.2f} GB"
        _say(environment, as_json, said)
    return 0


def provide(environment: Environment, *, yes: bool, as_json: bool = False) -> None:
    """Make it where it is missing, if the person agrees or has agreed by `yes`; raises SuiteError without it."""
    if not environment.installed and not environment.interpreter:
        asked = f"install the environment '{environment.name}' ({environment.cost})? [y/N] "
        if yes or (sys.stdin.isatty() and input(asked).strip().lower() in ("y", "yes")):
            install(environment, as_json=as_json)
    environment.require()


def _install(wanted: Sequence[Environment], view: View) -> None:
    speaking, over = threading.Lock(), threading.Event()

    def make(environment: Environment) -> None:
        def tell(event: str, **fields: Any) -> None:
            with speaking:
                view.event(environment.name, {"event": event, **fields})

        def progress(step: float, total: float, what: str) -> None:
            if over.is_set():
                raise Interrupted("stopped")
            tell("progress", step=step, total=total, what=what, values={})

        tell("say", text=f"installing into {environment.folder}: {environment.cost}")
        environment.install(progress, lambda text: tell("say", text=text))

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # pip unpacks on one processor
        try:
            for made in [pool.submit(make, environment) for environment in wanted]:
                made.result()
        except BaseException:
            over.set()
            raise


def _say(environment: Environment, as_json: bool, text: str) -> None:
    if as_json:
        print(json.dumps({"name": environment.name, "python": str(environment.python), **environment.record()}))
    else:
        print(f"{environment.name}: {text}\n{environment.python}")


def _check(environment: Environment, as_json: bool) -> int:
    found: dict[str, Any] = environment.check()
    if as_json:
        print(json.dumps({"name": environment.name, "python": str(environment.python), **found}))
        return int(bool(found["problems"]))
    table = Table("distribution", "version", box=box.SIMPLE_HEAD)
    for name, version in sorted(found["versions"].items()):
        table.add_row(name, version)
    Console().print(table)
    for problem in found["problems"]:
        print(f"problem: {problem}")
    print(f"{environment.name}: {'broken: remove and install it again' if found['problems'] else 'ok'}")
    return int(bool(found["problems"]))


def _remove(environment: Environment, as_json: bool) -> int:
    if environment.interpreter:
        raise SuiteError(f"{environment.interpreter} is not the suite's to remove")
    removed = [str(folder) for folder in envs.remove(environment.name)]
    if as_json:
        print(json.dumps({"name": environment.name, "removed": removed}))
    else:
        print("\n".join(f"removed {folder}" for folder in removed) or f"{environment.name} is not installed")
    return 0
