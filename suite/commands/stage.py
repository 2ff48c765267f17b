"""One stage as a command: `suite merge --base B --adapter A --out DIR`."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from suite import pipeline
from suite.commands import outputs
from suite.commands.env import provide
from suite.commands.flags import Parser, add_settings, values_of
from suite.commands.pipelines import execute, measured
from suite.config import parse
from suite.envs import Environment
from suite.errors import SuiteError
from suite.places import Flags
from suite.runs import link
from suite.stages import RECORD, Artifact, Stage, kind
from suite.store import disk_error

REPORTS = "eval"
"""The stage whose result is a report, which may be wanted elsewhere too."""


def command(verb: str, arguments: list[str]) -> int:
    """Run one stage with settings from flags; its artifact goes to the store and, with --out, to a folder."""
    stage_class = kind(verb)
    text = (stage_class.__doc__ or "").strip().splitlines()[0]
    parser = Parser(f"suite {verb}", text)
    parser.add_argument("--out", type=Path, help="folder for a copy of the result; must not exist yet, or be empty")
    parser.add_argument("--json", action="store_true", help="JSON on stdout, for machines")
    if verb == REPORTS:
        outputs.add(parser)
    apart = stage_class.environments is not Stage.environments
    if apart:
        flag = parser.add_argument
        flag("--pipeline", type=Path, metavar="FILE", help="a pipeline file whose [env.NAME] tables count")
        flag("--yes", action="store_true", help="install the environment of an engine or a library where it is missing")
    add_settings(parser, stage_class)
    given = parser.read(arguments)
    here = Path.cwd()
    stage = parse(stage_class, values_of(stage_class, given), Flags(here, {}, ((),)))
    if given.out:
        check_out(given.out)
    if verb == REPORTS:
        outputs.check(given)
    apart_in = _environments(given) if apart else ()
    run_dir, error = execute(pipeline.one_stage(verb, stage, here, *apart_in), as_json=given.json)
    if verb == REPORTS:
        outputs.deliver(given, run_dir, f"{verb}/{run_dir.name}", measured(run_dir), error)
    if error:
        raise error
    made = link(run_dir, verb)
    if given.out:
        copy(Artifact(made.resolve(), stage.makes()), given.out)
    if not given.json:
        print(f"{stage.makes()}: {given.out or made.resolve()}")
    return 0


def _environments(given: argparse.Namespace) -> tuple[Mapping[str, Environment], Callable[[Environment], None]]:
    """Those of a pipeline, and what is done where one is missing."""
    tables = pipeline.read_environments(given.pipeline) if given.pipeline else {}
    return tables, lambda environment: provide(environment, yes=given.yes, as_json=given.json)


def check_out(out: Path) -> None:
    """Nothing is overwritten: the folder must be new or empty."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        raise SuiteError(f"--out: {out} exists already", hint="give a new folder, or remove that one")


def copy(artifact: Artifact, out: Path) -> None:
    """Copy an artifact's files as ordinary, writable files; a package goes without the record of where it was made."""
    skip = shutil.ignore_patterns(RECORD) if artifact.type == "package" else None
    try:
        shutil.copytree(artifact.path, out, ignore=skip, copy_function=shutil.copyfile, dirs_exist_ok=True)
    except OSError as error:
        raise disk_error(error, out) from None
