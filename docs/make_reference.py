"""Writes docs/reference.md from the settings classes; `--check` only says whether it is up to date."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from evalsets import sets
from evalsets.ask import Reply
from evalsets.evaluation import Meter, silent, speed
from evalsets.kinds import KINDS as SET_KINDS
from evalsets.metrics import KNOWN, figures, toolbench
from evalsets.score import requests, score
from evalsets.sets import SetFile
from export.parity import Sums
from suite import envs
from suite.cli import VERBS
from suite.commands.flags import type_text, walk
from suite.pipeline import Wiring
from suite.serve_table import INHERITED, Model, Serve
from suite.stages import KINDS, kind

# the words of the command line, in the words of TOML
IN_TOML = {
    "STR": "text", "INT": "integer", "FLOAT": "number", "BOOL": "true or false", "A,B": "list", "KEY=VALUE": "table",
    "VALUE": "table", "SIZE": "size", "FILE,...": "file or files",
    "PATH|@STAGE": "path or @stage", "PATH|@STAGE,...": "paths or @stages",
}  # fmt: skip
PAGE = Path(__file__).parent / "reference.md"


def table(settings: type, without: Collection[str] = ()) -> list[str]:
    """One Markdown row a field."""
    rows = ["| setting | values | default | what it does |", "| --- | --- | --- | --- |"]
    for name, info in ((name, info) for name, info in walk(settings) if name not in without):
        default = "required" if info.is_required() else info.get_default(call_default_factory=True)
        shown = (
            "" if default is None or default is PydanticUndefined or hasattr(default, "model_dump") else f"`{default}`"
        )
        cells = (f"`{name}`", _values(type_text(info)), shown, info.description or "")
        rows.append("| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |")
    return [*rows, ""]


def gate_names() -> list[str]:
    """What a gate may name, as evaluations of shipped sets and a comparison with a parent have it."""
    found = dict.fromkeys(SET_KINDS, "")
    for name in sets.names():
        asked = sets.load(name)
        if asked.kind == "choice":  # what its settings can add
            asked = replace(asked, file=asked.file.model_copy(update={"likelihood": True, "multiple": True}))
        questions = asked.questions(2)
        ids = [request.id for question in questions for request in requests(asked, question, "")]
        replies = {id: Reply(id, "", "A", logprobs=(-1.0, -1.0)) for id in ids}
        found[asked.kind] = _named(score(asked, questions, replies).total)
    found["choice"] += ", `categories.NAME.acc`"
    found["toolbench"] = ", ".join(f"`{name}`" for name in ("step", *toolbench.FIGURES))
    found["qa"] = ", ".join(f"`{name}`" for metric in KNOWN for name in figures(metric) or (metric,))
    meter = Meter("", 1, silent, tokens=1, latencies=[1.0], ended=1.0, began=0.0)
    return [
        *GATES.split("\n"),
        "| where | names |",
        "| --- | --- |",
        *(f"| `eval`: `SET.` of a set of kind {kind} | {names} |" for kind, names in found.items()),
        "| `eval`: `SET.` of any set | `low`, `high`, `n`, `failed`, `truncated`, `leakage.n`, `leakage.share`, "
        "`leakage.clean`, `intervals.FIGURE.low`, `intervals.FIGURE.high` |",
        "| `eval`: `SET.` of EvalScope and lm-evaluation-harness | `score`, `reported`, `metrics.NAME`, `second.acc` |",
        f"| `eval` | {_named({'speed': speed([meter])})}, `memory`; `bytes` and `parity` of what was evaluated |",
        f"| `merge`, `quantize`, `eval` | {_named({'parity': Sums(positions=1, predicted=1).result()})} |",
        "| `eval`, beside another | `forgotten(@stage.SET)` and `learnt(@stage.SET)`; without `.SET` of all sets |",
        "",
    ]


GATES = """\
## What a gate may name

Any number that a stage measured, by its path in `report.json`. Its own values may begin with its name, as in
`score.ceval-mini.acc`; those of another stage begin with `@` and that one's. All stages have `bytes`, the size of their
files, and `seconds`. What was not measured fails its gate.

With `at 95 %` at its end a condition must hold at both ends of an interval: that of a score, or of its difference from
the same score of another stage on the same questions. All scores of questions have one.
"""
COMMON = ("low", "high", "n", "failed", "truncated", "intervals")


def _named(metrics: Mapping[str, Any], path: str = "") -> str:
    """The paths of numbers, in code."""
    found = []
    for name, value in metrics.items():
        if isinstance(value, Mapping) and name not in COMMON:
            found.append(_named(value, f"{path}{name}."))
        elif name not in COMMON and not isinstance(value, str | Mapping):
            found.append(f"`{path}{name}`")
    return ", ".join(filter(None, found))


def _values(text: str) -> str:
    return IN_TOML.get(text) or f"`{text}`"


def page() -> str:
    """The whole page."""
    lines = [
        "# Reference",
        "",
        "Made from the code by `docs/make_reference.py`; do not edit by hand.",
        "",
        "## Commands",
        "",
    ]
    lines += [
        "| command | what it does |",
        "| --- | --- |",
        *(f"| `suite {v}` | {text} |" for v, (text, _) in VERBS.items()),
        "",
    ]
    lines += ["## Every stage's table", "", *table(Wiring), *gate_names(), "## `[serve]`", "", *table(Serve)]
    lines += [
        "## `[serve.models.NAME]`",
        "",
        f"{Model.__doc__} The settings from `{INHERITED[0]}` to `{INHERITED[-1]}` above, and:",
        "",
        *table(Model, INHERITED),
    ]
    lines += [
        "## `[env.NAME]`",
        "",
        f"What stands in for the pins of an environment that comes with the suite ({', '.join(envs.BUILT_IN)}), or is",
        "one of your own; `suite env install NAME --pipeline FILE` makes it.",
        "",
        *table(envs.Settings),
    ]
    lines += ["## `set.toml`", "", "What describes a question set: [evaluation](evaluation.md).", "", *table(SetFile)]
    for name in KINDS:
        stage = kind(name)
        lines += [
            f"## `{name}`",
            "",
            *(line.strip() for line in (stage.__doc__ or "").strip().splitlines()),
            "",
            *table(stage),
        ]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv:
        raise SystemExit(
            "docs/reference.md is out of date: python docs/make_reference.py"
            if PAGE.read_text("utf-8") != page()
            else 0
        )
    PAGE.write_text(page(), "utf-8")
