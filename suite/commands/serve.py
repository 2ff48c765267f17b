"""`suite serve`: a model and its adapters behind one OpenAI endpoint."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from suite import envs
from suite.commands.env import install
from suite.commands.flags import Parser, add_settings, values_of
from suite.config import Takes, Where, parse
from suite.errors import SuiteError
from suite.pipeline import Plan, on_command_line, read_environments
from suite.references import External
from suite.runs import link
from suite.serving import GROUPS, Options


class _Flag(Where):
    def __call__(self, path: tuple[str | int, ...]) -> str:
        return f"--{str(path[0]).replace('_', '-')}" if path else ""


def command(verb: str, arguments: list[str]) -> int:
    """Serve until Ctrl-C or SIGTERM."""
    from serve.command import parse_loras

    parser = Parser(f"suite {verb}", "Serve a model and its LoRA adapters; the request's `model` picks one.")
    parser.add_argument("--model", default="nano", help="model folder [nano, the model that comes with the suite]")
    parser.add_argument("--name", help="the name of the base model [its folder's name]")
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="NAME=PATH,...",
        help="adapters, each with the name that requests use",
    )
    parser.add_argument("--yes", action="store_true", help="install the engine's environment where it is missing")
    for group in GROUPS:
        add_settings(parser.add_argument_group((group.__doc__ or "").strip()), group)
    given = parser.read(arguments)
    options = parse(Options, values_of(Options, given), _Flag())
    model = _folder(given.model, "--model", Takes("model", "quantized"))
    adapters = {
        name: _folder(str(path), "--lora", Takes("adapter")).artifact.path
        for name, path in parse_loras(",".join(given.lora)).items()
    }
    options = _installed(options, None, given.yes)
    return _serve(options, model.artifact.path, adapters, given.name or model.artifact.name)


def _installed(options: Options, pipeline: Path | None, yes: bool) -> Options:
    """The options with the interpreter of another program's engine, whose environment is made if the person agrees."""
    from serve.backends import check_backend

    check_backend(options.backend)
    if options.backend == "torch" or options.env_python:
        return options
    tables = read_environments(pipeline) if pipeline else {}
    environment = tables.get(options.backend) or envs.get(options.backend)
    if not environment.installed and not environment.interpreter:
        asked = f"install the environment '{environment.name}' ({environment.cost})? [y/N] "
        if yes or (sys.stdin.isatty() and input(asked).strip().lower() in ("y", "yes")):
            install(environment)
    environment.require()
    return options.model_copy(update={"env_python": str(environment.python)})


def _serve(options: Options, model: Path, adapters: dict[str, Path], name: str) -> int:
    from serve.command import serve
    from serve.settings import Settings

    # threads of torch that spin while they wait take the cores from the ones that work
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    given = {field: getattr(options, field) for field in Options.model_fields}
    serve(Settings(**given, model=model, adapters=adapters, name=name))
    return 0


def _folder(text: str, flag: str, takes: Takes) -> External:
    found = on_command_line(text, takes, Path.cwd())
    if isinstance(found, SuiteError):
        raise SuiteError(found.message, where=flag, hint=found.hint)
    return found


def serve_plan(plan: Plan, run_dir: Path) -> int:
    """Serve what the `[serve]` table of a finished run names."""
    if plan.serve is None or plan.serve_sources is None:
        raise SuiteError("the pipeline has no [serve] table")

    def path(field: str) -> Path:
        source = (plan.serve_sources or {})[field]
        return source.artifact.path if isinstance(source, External) else link(run_dir, source).resolve()

    table = plan.serve
    adapters = {name: path(f"adapters.{name}") for name in table.adapters}
    options = _installed(table, plan.file, yes=False)
    return _serve(options, path("base"), adapters, table.name)
