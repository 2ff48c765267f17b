"""`suite serve`: models and their adapters behind one OpenAI endpoint."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suite import envs
from suite.commands import named
from suite.commands.env import provide
from suite.commands.flags import Parser, add_settings, values_of
from suite.config import Takes, Where
from suite.errors import SuiteError
from suite.pipeline import read_environments, read_serve
from suite.plan import Plan
from suite.references import External
from suite.runs import link
from suite.serve_table import MODEL, PACKAGE, Model, Serve, place_of, read
from suite.serving import GROUPS, Options
from suite.stages import Artifact

if TYPE_CHECKING:
    from serve.settings import Settings

Paths = Mapping[tuple[str, ...], Path]
"""What a `[serve]` table refers to, by its place there."""


class _Flag(Where):
    def __call__(self, path: tuple[str | int, ...]) -> str:
        return f"--{str(path[0]).replace('_', '-')}" if path else ""


def command(verb: str, arguments: list[str]) -> int:
    """Serve until Ctrl-C or SIGTERM."""
    parser = Parser(f"suite {verb}", "Serve models and their LoRA adapters; the request's `model` picks one.")
    parser.add_argument(
        "--model",
        action="append",
        metavar="[NAME=]PATH",
        help="model folder [nano, the model that comes with the suite]; several, with a name each, share the endpoint",
    )
    parser.add_argument("--name", help="the name of the only model [its folder's name]")
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="NAME=PATH,...",
        help="adapters of the only model, each with the name that requests use",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="serve what the [serve] table of a TOML file says, such as a pipeline's: several models, each with its "
        "adapters, backend and replicas, and endpoints that run already; flags go before what it says for all",
    )
    parser.add_argument("--yes", action="store_true", help="install an engine's environment where it is missing")
    for group in GROUPS:
        add_settings(parser.add_argument_group((group.__doc__ or "").strip()), group)
    given = parser.read(arguments)
    options = values_of(Options, given)
    if given.config:
        file = Path(given.config)
        if given.model or given.lora or given.name:
            raise SuiteError("--config says which models are served", hint="leave out --model, --lora and --name")
        table = read_serve(file, options)
        paths = {
            place: _named(reference, f"{file}: {'.'.join(place)}", takes, file.parent).path
            for place, (reference, takes) in table.wanted().items()
        }
        return _serve(table, paths, file, given.yes)
    return _serve(*_from_flags(given, options), None, given.yes)


def _from_flags(given: argparse.Namespace, options: Mapping[str, Any]) -> tuple[Serve, Paths]:
    from serve.command import parse_loras, parse_models

    models = {}
    for name, path in parse_models(given.model or ["nano"]):
        takes = PACKAGE if options.get("backend") == "llamacpp" else MODEL
        found = _named(path, "--model", takes, Path.cwd())
        models[name or given.name or found.name.removesuffix(".gguf")] = found.path
    loras = parse_loras(",".join(given.lora))
    if len(models) > 1 and (loras or given.name):
        flag = "--lora" if loras else "--name"
        raise SuiteError(
            f"{flag} is for one model, and there are {len(models)}", hint="--config FILE says which is whose"
        )
    tables: dict[str, dict[str, Any]] = {name: {"model": str(path)} for name, path in models.items()}
    paths: dict[tuple[str, ...], Path] = {("models", name, "model"): path for name, path in models.items()}
    for name, adapter in loras.items():
        base = next(iter(models))
        tables[base].setdefault("adapters", {})[name] = str(adapter)
        paths["models", base, "adapters", name] = named.artifact(str(adapter), "--lora", "adapter").path
    return read({**options, "models": tables}, lambda *_: _Flag(), Path()), paths


def _named(text: str, where: str, takes: Takes, folder: Path) -> Artifact:
    """What a setting beside `folder` names; where a package is taken, also a GGUF file alone."""
    file = folder / text
    if takes == PACKAGE and file.suffix == ".gguf" and file.is_file():
        return Artifact(file.resolve(), "package")
    return named.artifact(text, where, *takes.types, folder=folder)


def _serve(table: Serve, paths: Paths, file: Path | None, yes: bool) -> int:
    from serve.command import serve

    # threads of torch that spin while they wait take the cores from the ones that work
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    models = [_installed(each, file, yes) for each in _settings(table, paths)]
    serve(models[0].model_copy(update={"beside": tuple(models[1:])}))
    return 0


def _settings(table: Serve, paths: Paths) -> list[Settings]:
    from serve.settings import Settings

    shared = {field: getattr(table, field) for field in Options.model_fields}
    found = []
    for place, name, model in table.each():
        own = {field: getattr(model, field) for field in type(model).model_fields if field not in ("model", "adapters")}
        adapters = {adapter: paths[*place, "adapters", adapter] for adapter in model.adapters}
        folder = {} if model.url else {"model": paths[place_of(place)]}
        found.append(Settings(**{**shared, **own, **folder}, adapters=adapters, name=name))
    return found


def _installed(settings: Settings, pipeline: Path | None, yes: bool) -> Settings:
    """With the interpreter of another program's engine, whose environment is made if the person agrees."""
    from serve.backends import check_backend

    check_backend(settings.backend)
    if settings.backend not in envs.BUILT_IN or settings.env_python:
        return settings
    from serve.engines.remote import KINDS

    KINDS[settings.backend].check(settings)  # before anything is installed
    tables = read_environments(pipeline) if pipeline else {}
    environment = tables.get(settings.backend) or envs.get(settings.backend)
    provide(environment, yes=yes)
    return settings.model_copy(update={"env_python": str(environment.python)})


def prepare(plan: Plan, yes: bool) -> None:
    """See to it, before a run, that what its `[serve]` table names can be served afterwards; raises SuiteError."""
    from serve.command import api_keys

    assert plan.serve is not None
    # what a stage makes is not there yet: its place holds no file that says anything
    models = _settings(plan.serve, _paths(plan, lambda stage: Path(f"@{stage}")))
    for (place, _, _), settings in zip(plan.serve.each(), models, strict=True):
        try:
            ready = _installed(settings, plan.file, yes)
            if ready.backend != "llamacpp" or ready.model.exists():  # of a file that a stage makes nothing is known yet
                ready.check_engine()
        except SuiteError as error:
            table = ".".join(("serve", *place))
            where = f"{plan.file}: {table}" + (f".{error.where}" if error.where in Model.model_fields else "")
            raise SuiteError(error.message, where=where, hint=error.hint) from None
    api_keys(models[0])
    models[0].check_tls()


def serve_plan(plan: Plan, run_dir: Path) -> int:
    """Serve what the `[serve]` table of a finished run names."""
    assert plan.serve is not None
    paths = _paths(plan, lambda stage: link(run_dir, stage).resolve())
    return _serve(plan.serve, paths, plan.file, yes=False)


def _paths(plan: Plan, made_by: Callable[[str], Path]) -> Paths:
    return {
        place: source.artifact.path if isinstance(source, External) else made_by(source)
        for place, source in (plan.serve_sources or {}).items()
    }
