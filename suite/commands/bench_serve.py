"""`suite bench-serve`: how fast an endpoint is under load, and what load it bears."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from suite.commands.flags import Parser, key_in, pairs
from suite.errors import StageFailed, SuiteError, near
from suite.progress import watching

if TYPE_CHECKING:
    from evalsets.ask import Client
    from evalsets.load.client import Load
    from evalsets.load.requests import Shape
    from evalsets.load.timing import Figures, Timing

LABELS = {
    "ttft": "time to first token", "tpot": "time per output token", "itl": "between chunks", "e2e": "end to end",
}  # fmt: skip
WARM = 16
"""Requests that are sent before and not measured, at most."""
FITTED = (20, 120)
"""Words of the two prompts that tell how many tokens a word is."""


def command(verb: str, arguments: list[str]) -> int:
    """Measure, print; exit code 1 where not one request was answered, or no rate keeps the limits."""
    given = _parser(verb).read(arguments)
    if min(given.requests, given.concurrency, given.prompt_tokens, given.new_tokens, given.probes) < 1:
        raise SuiteError("--requests, --concurrency, --prompt-tokens, --new-tokens and --probes must be at least 1")
    if given.rate is not None and given.rate <= 0:
        raise SuiteError("--rate must be more than 0 requests a second")
    limits = _limits(given.goodput)
    if given.find_saturation and not limits:
        raise SuiteError("--find-saturation needs limits to keep", hint="e.g. --goodput ttft:500,tpot:50")
    with watching([verb], as_json=False) as view:

        def progress(step: int, total: int, what: str) -> None:
            view.event(verb, {"event": "progress", "step": step, "total": total, "what": what, "values": {}})

        bench = _bench(given, limits, progress)
        found = bench.saturation(given.probes) if given.find_saturation else bench.load()
    if given.plot:
        bench.plot(given.plot, found)
    if given.json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        _show(found)
        if given.plot:
            print(f"plot: {given.plot}")
    _check(found)
    return 0


def _parser(verb: str) -> Parser:
    parser = Parser(f"suite {verb}", "Measure an OpenAI endpoint under load. Latencies are in milliseconds.")
    flag = parser.add_argument
    flag("--url", required=True, help="the endpoint, e.g. http://127.0.0.1:8000")
    flag("--model", required=True, metavar="A,B", help="the names to ask for, in turn: models, adapters")
    flag("--requests", type=int, default=200, help="requests that are measured; of each probe at least [200]")
    flag("--concurrency", type=int, default=16, help="requests at the same time [16]")
    flag("--rate", type=float, help="in place of --concurrency: requests a second, coming by chance (Poisson)")
    flag("--prompt-tokens", type=int, default=128, help="tokens of each prompt, about [128]")
    flag("--new-tokens", type=int, default=64, help="most tokens of each answer [64]")
    flag("--ignore-eos", action="store_true", help="all answers have all tokens, where the endpoint knows this field")
    flag(
        "--goodput", default="", metavar="MEASURE:MS,...",
        help="limits, e.g. ttft:200,tpot:50,e2e:5000: count the requests that keep them",
    )  # fmt: skip
    flag("--find-saturation", action="store_true", help="search the highest rate at which 9 of 10 keep the limits")
    flag("--probes", type=int, default=10, help="rates that the search tries at most [10]")
    flag("--seed", type=int, default=0, help="of prompts and of when requests come [0]")
    flag("--extra", action="append", default=[], metavar="KEY=VALUE", help="more fields of each request")
    flag("--timeout", type=float, default=600.0, help="seconds after which a request failed [600]")
    flag("--api-key-env", metavar="NAME", help="environment variable that holds the API key")
    flag("--plot", type=Path, metavar="FILE.png", help="a plot of the latencies, or of the rates that were tried")
    flag("--json", action="store_true", help="JSON on stdout, for machines")
    return parser


def _limits(text: str) -> dict[str, float]:
    """The limits of --goodput in milliseconds by measure."""
    from evalsets.load.timing import LIMITED

    found = {}
    for part in filter(None, text.split(",")):
        measure, _, value = part.partition(":")
        if measure not in LIMITED:
            raise SuiteError(f"--goodput: there is no '{measure}'", hint=near(measure, LIMITED))
        try:
            found[measure] = float(value)
        except ValueError:
            raise SuiteError(f"--goodput {part}: expected milliseconds", hint="e.g. ttft:200,tpot:50") from None
    return found


Progress = Callable[[int, int, str], None]


@dataclass
class _Bench:
    """An endpoint and what it is asked; `timings` are those of the last load."""

    client: Client
    shape: Shape
    how: Load
    requests: int
    limits: Mapping[str, float]
    progress: Progress
    timings: list[Timing]
    asked: int = 0

    def measure(self, how: Load, what: str, requests: int) -> Figures:
        """The figures of one load of so many requests."""
        from evalsets.load.client import run
        from evalsets.load.timing import figures

        done = 0

        def step(_: Timing) -> None:
            nonlocal done
            done += 1
            self.progress(done, requests, what)

        warm = max(len(self.shape.models), min(WARM, how.concurrency)) if not self.asked else 0
        bodies = self.shape.bodies(warm + requests, self.asked)
        self.asked += len(bodies)
        self.timings = run(self.client, how, bodies[warm:], step, warm=bodies[:warm])
        return figures(self.timings, self.limits)

    def load(self) -> dict[str, Any]:
        """The load that was asked for, of all models and of each."""
        from evalsets.load.timing import by_model

        found = {"load": self._about(), **self.measure(self.how, "requests", self.requests)}
        return found | ({"models": by_model(self.timings, self.limits)} if len(self.shape.models) > 1 else {})

    def saturation(self, probes: int) -> dict[str, Any]:
        """The highest rate that keeps the limits, or `at_least` that where no rate that was tried is too high.

        The search starts at half of what a closed load gives.
        """
        from evalsets.load.client import Load
        from evalsets.load.saturation import search

        start = self.how.rate or self.measure(self.how, "closed load", self.requests)["requests_per_s"] / 2
        if not start:
            raise StageFailed(f"not one request was answered: {next(t.error for t in self.timings if t.error)}")

        def probe(rate: float, requests: int) -> Figures:
            return self.measure(Load(rate=rate, seed=self.how.seed), f"at {rate:.3g} requests/s", requests)

        rate, made = search(probe, start, probes, self.requests)
        found = {"saturation": rate, "at_least": all(one["kept"] for one in made), "probes": made}
        return {"load": self._about(), "limits": dict(self.limits), **found}

    def plot(self, path: Path, found: Mapping[str, Any]) -> None:
        """Write a PNG."""
        from evalsets.load import plot

        if "probes" in found:
            plot.rates(path, found["probes"])
        else:
            plot.latencies(path, self.timings)

    def _about(self) -> dict[str, Any]:
        how = {"rate": self.how.rate} if self.how.rate else {"concurrency": self.how.concurrency}
        shape = {"models": list(self.shape.models), "words": self.shape.words, "max_tokens": self.shape.new_tokens}
        return {**how, **shape, "extra": self.shape.extra, "seed": self.shape.seed}


def _bench(given: argparse.Namespace, limits: Mapping[str, float], progress: Progress) -> _Bench:
    from evalsets.ask import Client
    from evalsets.load.client import Load
    from evalsets.load.requests import Shape

    models = [name for name in given.model.split(",") if name]
    client = Client(given.url, key_in(given.api_key_env), timeout=given.timeout)
    for name in models:
        client.check_model(name)
    extra = pairs("--extra", given.extra) | ({"ignore_eos": True} if given.ignore_eos else {})
    words = _words(client, models[0], given.prompt_tokens, extra)
    shape = Shape(models, words, given.new_tokens, extra, given.seed)
    return _Bench(client, shape, Load(given.concurrency, given.rate, given.seed), given.requests, limits, progress, [])


def _words(client: Client, model: str, tokens: int, extra: dict[str, Any]) -> int:
    """How many words make a prompt of so many tokens, template and all; by two prompts whose tokens are counted."""
    from evalsets.load.client import Load, run
    from evalsets.load.requests import Shape

    bodies = [Shape([model], words, 1, extra, seed=-1).bodies(1)[0] for words in FITTED]
    few, many = run(client, Load(1), bodies)
    if error := few.error or many.error:
        raise SuiteError(f"{client.root} does not answer a first request to '{model}': {error}")
    each = (many.prompt_tokens - few.prompt_tokens) / (FITTED[1] - FITTED[0])
    if each <= 0:  # it does not count
        return tokens
    return max(1, round(FITTED[0] + (tokens - few.prompt_tokens) / each))


def _check(found: Mapping[str, Any]) -> None:
    if "probes" in found:
        if found["saturation"] is None:
            lowest = min(probe["rate"] for probe in found["probes"])
            raise StageFailed(f"no rate keeps the limits, not {lowest:.3g} requests a second")
    elif found["failed"] == found["requests"]:
        raise StageFailed(f"not one request was answered: {next(iter(found['errors']))}")


def _show(found: Mapping[str, Any]) -> None:
    console = Console()
    if "probes" in found:
        console.print(_probes(found))
        for line in _ending(found):
            console.print(line, highlight=False)
        return
    for title, figures in [("", found), *found.get("models", {}).items()]:
        console.print(_latencies(title, figures))
        for line in _lines(figures):
            console.print(line, highlight=False, markup=False)


def _latencies(title: str, figures: Figures) -> Table:
    columns = ("mean", "p50", "p90", "p95", "p99", "max")
    table = Table("milliseconds", box=box.SIMPLE_HEAD, title=title or None, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    for measure, label in LABELS.items():
        if measure in figures:
            table.add_row(label, *(f"{figures[measure][column]:.1f}" for column in columns))
    return table


def _lines(figures: Figures) -> list[str]:
    rate, share = figures["requests_per_s"], figures.get("goodput")
    lines = [
        f"{figures['requests']} requests in {figures['seconds']:.1f} s: {rate:.2f} requests/s, "
        f"{figures['prompt_tokens_per_s']:.0f} prompt tokens/s, {figures['new_tokens_per_s']:.0f} new tokens/s",
        f"a prompt has {figures['prompt_tokens']:.0f} tokens, an answer {figures['new_tokens']:.0f}",
    ]
    if share:
        limits = ", ".join(f"{name} <= {limit:g} ms" for name, limit in share["limits"].items())
        lines.append(f"goodput: {share['requests_per_s']:.2f} requests/s, {100 * share['share']:.1f} % keep {limits}")
    return lines + _late([figures]) + [f"{count} failed: {error}" for error, count in figures["errors"].items()]


def _late(loads: Sequence[Figures]) -> list[str]:
    worst = max(figures["late"] for figures in loads)
    said = f"the client was up to {worst:.0f} ms behind its schedule: this machine is too busy"
    return [said] if worst > 10 else []


def _ending(found: Mapping[str, Any]) -> list[str]:
    """What a search for the saturation says below its table."""
    rate, made = found["saturation"], found["probes"]
    if rate is None:
        return _late(made)
    if found["at_least"]:
        return [f"at least {rate:.3g} requests/s keep the limits: no rate that was tried is too high", *_late(made)]
    return [f"highest rate that keeps the limits: {rate:.3g} requests/s", *_late(made)]


def _probes(found: Mapping[str, Any]) -> Table:
    from evalsets.load.saturation import in_limits

    p95 = [f"{measure} p95, ms" for measure in found["limits"]]
    table = Table("requests/s", "requests", "answers/s", "keep the limits", *p95, box=box.SIMPLE_HEAD)
    for probe in sorted(found["probes"], key=lambda p: float(p["rate"])):
        why = "" if probe["kept"] else "  too slow" if in_limits(probe) else "  too few"
        values = [f"{probe[m]['p95']:.1f}" if m in probe else "-" for m in found["limits"]]
        pace, kept = f"{probe['requests_per_s']:.3g}", f"{100 * probe['goodput']['share']:.1f} %{why}"
        table.add_row(f"{probe['rate']:.3g}", str(probe["requests"]), pace, kept, *values)
    return table
