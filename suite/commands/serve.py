"""`suite serve`: a model and its adapters behind one OpenAI endpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from suite.commands.flags import Parser
from suite.config import Takes
from suite.errors import SuiteError
from suite.pipeline import Plan, on_command_line
from suite.references import External
from suite.runs import link


def command(verb: str, arguments: list[str]) -> int:
    """Serve until Ctrl-C or SIGTERM."""
    from serve.backends import BACKENDS
    from serve.command import parse_loras

    # threads of torch that spin while they wait take the cores from the ones that work
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

    parser = Parser(f"suite {verb}", "Serve a model and its LoRA adapters; the request's `model` picks one.")
    parser.add_argument("--model", default="nano", help="model folder [nano, the model that comes with the suite]")
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="NAME=PATH,...",
        help="adapters, each with the name that requests use",
    )
    parser.add_argument("--name", help="the name of the base model [its folder's name]")
    parser.add_argument("--backend", default="torch", help=f"engine: {', '.join(BACKENDS)} [torch]")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on [127.0.0.1: this machine only]")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on [8000]")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 [auto]")
    parser.add_argument("--max-batch", type=int, default=64, help="requests computed together [64]")
    parser.add_argument(
        "--api-key-file", type=Path, help="file with one API key a line; without it no key is asked for"
    )
    given = parser.read(arguments)
    model = _folder(given.model, "--model", Takes("model", "quantized"))
    adapters = {
        name: _folder(str(path), "--lora", Takes("adapter")) for name, path in parse_loras(",".join(given.lora)).items()
    }
    options = {
        "host": given.host,
        "port": given.port,
        "backend": given.backend,
        "dtype": given.dtype,
        "max_batch": given.max_batch,
    }
    paths = {adapter: found.artifact.path for adapter, found in adapters.items()}
    name = given.name or model.artifact.name
    return _serve(model.artifact.path, paths, name, api_keys=_keys(given.api_key_file), **options)


def _serve(model: Path, adapters: dict[str, Path], name: str, **options: Any) -> int:
    from serve.command import serve

    serve(model, adapters, name=name, **options)
    return 0


def _folder(text: str, flag: str, takes: Takes) -> External:
    found = on_command_line(text, takes, Path.cwd())
    if isinstance(found, SuiteError):
        raise SuiteError(found.message, where=flag, hint=found.hint)
    return found


def _keys(file: Path | None) -> list[str]:
    if file is None:
        return []
    try:
        keys = file.read_text("utf-8").split()
    except OSError as error:
        raise SuiteError(f"--api-key-file: {error.strerror}: {file}") from None
    if not keys:
        raise SuiteError(f"--api-key-file: {file} holds no key", hint="write one key a line")
    return keys


def serve_plan(plan: Plan, run_dir: Path) -> int:
    """Serve what the `[serve]` table of a finished run names."""
    if plan.serve is None or plan.serve_sources is None:
        raise SuiteError("the pipeline has no [serve] table")

    def path(field: str) -> Path:
        source = (plan.serve_sources or {})[field]
        return source.artifact.path if isinstance(source, External) else link(run_dir, source).resolve()

    table = plan.serve
    adapters = {name: path(f"adapters.{name}") for name in table.adapters}
    name = Path(table.base.lstrip("@")).name
    return _serve(path("base"), adapters, name, host=table.host, port=table.port, backend=table.backend)
