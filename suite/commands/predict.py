"""`suite predict`: the answers of a model to every row of a data file, and how near they are to what is there."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from suite import data, store
from suite.commands import named
from suite.commands.flags import Parser, key_in, pairs
from suite.errors import StageFailed, SuiteError
from suite.progress import watching

SHOWN = {"rougeL": "ROUGE-L", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "bleu": "BLEU", "exact": "exact match"}


def command(verb: str, arguments: list[str]) -> int:
    """Predict, print the metrics; exit code 1 when rows failed."""
    given = _parser(verb).read(arguments)
    if min(given.concurrency, given.limit or 1, given.max_tokens) < 1:
        raise SuiteError("--concurrency, --limit and --max-tokens must be at least 1")
    rows = _rows(given)
    from evalsets.ask import Client
    from evalsets.predictions import Predictions, Row, predict

    asked = _asked(given)
    body = {"max_tokens": given.max_tokens, "temperature": given.temperature, "seed": given.seed}
    body |= pairs("--extra", given.extra) | {"model": asked.name}
    conversations = rows.conversations[: given.limit]
    file = Predictions(given.out, map(Row.of, range(len(conversations)), conversations), asked.identity, body)
    if given.overwrite:
        given.out.unlink(missing_ok=True)
    file.check()
    with asked.served() as url, watching([verb], as_json=False) as view:

        def progress(step: float, total: float, what: str = "", **values: float) -> None:
            view.event(what, {"event": "progress", "step": step, "total": total, "what": "rows", "values": values})

        found = predict(Client(url, key_in(given.api_key_env), given.concurrency, given.timeout), file, progress)
    if given.json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        _show(found, rows, file.path, file.metrics)
    if failed := found["metrics"]["failed"]:
        raise StageFailed(
            f"{failed} of {len(conversations)} rows failed; their lines in {given.out} say why",
            hint="the same command asks them again, and only them",
        )
    return 0


def _parser(verb: str) -> Parser:
    about = "Answer every row of a data file. The same command after a crash asks only for the rows that are missing."
    parser = Parser(f"suite {verb}", about)
    flag = parser.add_argument
    flag("data", type=Path, help=".json or .jsonl in any form that training takes; each row's last turn is its label")
    flag("--out", type=Path, required=True, help="file for a line of JSON a row: prompt, predict, label, and more")
    flag("--url", help="ask this endpoint, and not a server for the time of the command")
    flag("--model", help="model to serve, or an adapter that records its base; with --url the name to ask for")
    flag("--lora", help="adapter to serve on --model [on the base that it records]")
    flag("--backend", default="torch", help="engine that serves it [torch]")
    flag("--max-tokens", type=int, default=512, help="longest answer in tokens [512]")
    flag("--temperature", type=float, default=0.0, help="0 always takes the likeliest token [0]")
    flag("--seed", type=int, default=0, help="of sampling, where the temperature is not 0 [0]")
    flag(
        "--extra", action="append", default=[], metavar="KEY=VALUE",
        help="more fields of the request, e.g. chat_template_kwargs={enable_thinking=false}",
    )  # fmt: skip
    flag("--fill", action="append", default=[], metavar="NAME=VALUE", help="values for {{NAME}} in the data")
    flag("--limit", type=int, help="only the first rows, for a quick look")
    flag("--concurrency", type=int, default=16, help="requests at the same time [16]")
    flag("--timeout", type=float, default=300.0, help="seconds after which a row counts as failed [300]")
    flag("--api-key-env", metavar="NAME", help="environment variable that holds the API key")
    flag("--overwrite", action="store_true", help="lose what --out holds")
    flag("--json", action="store_true", help="JSON on stdout, for machines")
    return parser


def _rows(given: argparse.Namespace) -> data.Rows:
    fill = {name: str(value) for name, value in pairs("--fill", given.fill).items()}
    data.check([given.data], fill)
    rows = data.read(given.data, fill)
    if not rows.conversations:
        raise SuiteError(f"no row can be used: {rows.account()}", where=str(given.data))
    return rows


@dataclass(frozen=True)
class Asked:
    """What is asked: its `name` in requests, what tells it from another model, and where it is."""

    name: str
    identity: dict[str, Any]
    url: str = ""
    model: Path = Path()
    adapters: Mapping[str, Path] = field(default_factory=dict)
    backend: str = ""

    @contextlib.contextmanager
    def served(self) -> Iterator[str]:
        """The endpoint's URL; for a folder, that of a server for as long as the block lasts."""
        if self.url:
            yield self.url
            return
        from serve.backends import endpoint

        with endpoint(self.model, self.adapters, name="model", backend=self.backend) as running:
            yield running.url


def _asked(given: argparse.Namespace) -> Asked:
    if given.url:
        if given.lora:
            raise SuiteError("--lora is for a server of our own; with --url, name the adapter with --model")
        return _endpoint(given)
    if not given.model and not given.lora:
        raise SuiteError("nothing to ask", hint="give --url URL, --model DIR, or --lora DIR")
    adapter = named.artifact(given.lora, "--lora", "adapter") if given.lora else None
    if given.model is None and adapter:
        model = named.base_of(adapter, "--model")
    elif adapter:
        model = named.artifact(given.model, "--model", "model", "quantized")
    else:
        model = named.artifact(given.model, "--model", "model", "quantized", "adapter")
        if model.type == "adapter":
            adapter, model = model, named.base_of(model, f"--lora {given.model} --model")
    digest = store.Store(store.home()).digest
    identity = {"model": digest(model.path)} | ({"adapter": digest(adapter.path)} if adapter else {})
    adapters = {"adapter": adapter.path} if adapter else {}
    return Asked("adapter" if adapter else "model", identity, "", model.path, adapters, given.backend)


def _endpoint(given: argparse.Namespace) -> Asked:
    from evalsets.ask import Client
    from evalsets.identity import identity

    client = Client(given.url, key_in(given.api_key_env))
    name = given.model or next(iter(client.models()), None)
    if name is None:
        raise SuiteError(f"{client.root} lists no models", hint="name one with --model")
    return Asked(name, identity(client.root, client.check_model(name)), given.url)


def _show(found: dict[str, Any], rows: data.Rows, out: Path, metrics: Path) -> None:
    figures, speed = found["metrics"], found["speed"]
    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    for key, label in SHOWN.items():
        interval = f"  ({figures['low']:.3f} to {figures['high']:.3f})" if key == "rougeL" else ""
        table.add_row(label, f"{figures[key]:.3f}{interval}")
    table.add_row("rows", f"{figures['n']}, {figures['failed']} failed, {figures['truncated']} cut at --max-tokens")
    if speed:
        table.add_row("asked now", f"{speed['questions']} rows, {speed['tokens_per_s']:.0f} tokens/s")
    console = Console()
    console.print(table)
    if account := rows.account():
        console.print(account, highlight=False, markup=False)
    console.print(f"predictions: {out}\nmetrics:     {metrics}", highlight=False, markup=False, soft_wrap=True)
