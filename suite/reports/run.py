"""What a run ends with: every evaluated artifact against the one it came from, stages, gates, and what to do next."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from evalsets.report import cases as set_cases
from suite import junit
from suite.document import Bullets, Document, Heading, Listing, Mono, Table, html, markdown, terminal
from suite.plan import Plan
from suite.references import External
from suite.reports import comparison
from suite.reports.comparison import Comparison, Pair, decided, nearest, size_text
from suite.reports.subjects import Subject, of_evaluation, unique
from suite.runner import Outcome
from suite.runs import link

ACCURACY = "accuracy (95 %)"
COLUMNS = ("artifact", "size", ACCURACY, "ROUGE-L", "perplexity", "KL to parent", "against parent", "verdict")
TITLE = "Every artifact against the one it came from"
SHORT = (("acc", "acc"), ("rougeL", "ROUGE-L"), ("ppl", "ppl"))
"""Figures whose change is shown in one line, and what they are called there."""


@dataclass
class Row:
    """One evaluated artifact: its scores, how they differ from its parent's, and what it forgot of its base."""

    artifact: str
    backend: str
    parent: str | None
    bytes: int
    scores: dict[str, Any]
    parity: dict[str, Any]
    changes: dict[str, float] = field(default_factory=dict)
    verdicts: dict[str, str] = field(default_factory=dict)
    comparisons: dict[str, Any] = field(default_factory=dict)
    base: str | None = None
    forgotten: dict[str, list[str]] = field(default_factory=dict)
    learnt: dict[str, list[str]] = field(default_factory=dict)
    gates_held: bool = True
    state: str = "done"

    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of COLUMNS."""
        acc, rouge, ppl = (self.scores.get(first(self.scores, metric)) for metric, _ in SHORT)
        accuracy = f"{_percent(acc['acc'])} [{_percent(acc['low'])}, {_percent(acc['high'])}]" if acc else "-"
        kl = f"{self.parity['kl']:.1e}" if "kl" in self.parity else "-"
        changes = ", ".join(f"{name} {change:+.3f}" for name, change in self.changes.items())
        against = f"{changes} ({self.parent})" if self.parent else "-"
        return (
            self.artifact, size_text(self.bytes), accuracy, f"{rouge['rougeL']:.3f}" if rouge else "-",
            f"{ppl['ppl']:.3f}" if ppl else "-", kl, against, self.verdict,
        )  # fmt: skip

    @property
    def verdict(self) -> str:
        """Gates first, then the worst of the paired comparisons with the parent."""
        if not self.gates_held:
            return "gate failed"
        order = ("worse", "cannot tell", "better")
        return next((v for v in order if v in self.verdicts.values()), "measured")


def first(scores: Mapping[str, Any], metric: str) -> str:
    """The first set that has a figure; empty where none has."""
    return next(iter(having(scores, metric)), "")


def having(scores: Mapping[str, Any], metric: str) -> list[str]:
    """The sets that have a figure, in the order in which they were asked."""
    return [name for name, found in scores.items() if isinstance(found, dict) and found.get(metric) is not None]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


@dataclass(frozen=True)
class Ending:
    """What became of a run: its outcomes by stage, and what it evaluated, each against its parent and its base."""

    plan: Plan
    outcomes: Mapping[str, Outcome]
    rows: list[Row]
    parents: Comparison
    bases: Comparison
    commands: list[str]


def ending(plan: Plan, outcomes: Mapping[str, Outcome], run_dir: Path) -> Ending:
    """Everything that the reports of a run say."""
    found = _evaluated(plan, outcomes)
    subjects = [subject for subject, _ in found]
    parents = comparison.compare(subjects, comparison.PARENT)
    bases = decided(subjects, [(s, base) for s in subjects if (base := _base(s, subjects))])
    beside = {pair.subject.name: pair for pair in parents.pairs}
    origins = {pair.subject.name: pair for pair in bases.pairs}
    rows = [_row(s, made, beside.get(s.name), origins.get(s.name)) for s, made in found]
    return Ending(plan, outcomes, rows, parents, bases, next_commands(plan, outcomes, run_dir))


def _evaluated(plan: Plan, outcomes: Mapping[str, Outcome]) -> list[tuple[Subject, list[Outcome]]]:
    """What was evaluated, in the order of the plan, with all its evaluations behind one backend; the first counts."""
    found: dict[tuple[str, str], tuple[Subject, list[Outcome]]] = {}
    for name, node in plan.nodes.items():
        outcome = outcomes[name]
        if outcome.kind != "eval" or outcome.artifact is None:
            continue
        source = node.inputs["model"][0]
        label, artifact = (
            (source.name, source.artifact) if isinstance(source, External) else (source, outcomes[source].artifact)
        )
        subject = of_evaluation(outcome.artifact)
        subject = replace(subject, name=label, artifact=artifact or subject.artifact)
        found.setdefault((subject.digest, subject.backend), (subject, []))[1].append(outcome)
    named = unique(subject for subject, _ in found.values())
    return [(subject, made) for subject, (_, made) in zip(named, found.values(), strict=True)]


def _base(subject: Subject, others: Sequence[Subject]) -> Subject | None:
    """The first of all that `subject` was made from, as far as it was evaluated."""
    base, seen = None, subject
    while (before := nearest(seen, others)) is not None and before is not base:
        base = seen = before
    return base


def _row(subject: Subject, made: list[Outcome], beside: Pair | None, origin: Pair | None) -> Row:
    scores = {name: subject.metrics[name] for name in (*subject.sets, *subject.metrics)}  # sets first, as asked
    row = Row(subject.name, subject.backend, None, subject.bytes or 0, scores, subject.parity)
    row.gates_held = all(v.held for outcome in made for v in outcome.verdicts)
    row.state = made[0].state
    if beside:
        row.parent = beside.reference.name
        row.changes = changes(row.scores, beside.reference.metrics)
        row.verdicts = {name: found.verdict for name, found in beside.differences.items()}
        row.comparisons = {name: found.json() for name, found in beside.differences.items()}
    if origin:
        row.base = origin.reference.name
        row.forgotten = {name: [r["id"] for r in d.forgotten] for name, d in origin.differences.items()}
        row.learnt = {name: [r["id"] for r in d.learnt] for name, d in origin.differences.items()}
    return row


def changes(scores: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, float]:
    """How accuracy, ROUGE-L and perplexity differ, each on the first set that has it, where both were asked that."""
    named = {short: (first(scores, metric), metric) for metric, short in SHORT}
    return {
        short: scores[name][metric] - before[name][metric]
        for short, (name, metric) in named.items() if name in having(before, metric)
    }  # fmt: skip


def show(console: Console, found: Ending) -> None:
    """Print the table."""
    if found.rows:
        console.print(terminal(_table(found), TITLE))


def _table(found: Ending) -> Table:
    """A row for each artifact; what was asked by several sets is shown of the first, which the header names."""
    several = {name for row in found.rows for name in having(row.scores, "acc")}
    named = next(filter(None, (first(row.scores, "acc") for row in found.rows)), "")
    header = [f"{named}, {column}" if column == ACCURACY and len(several) > 1 else column for column in COLUMNS]
    return Table(header, [row.cells() for row in found.rows])


def write(run_dir: Path, found: Ending) -> None:
    """Leave report.json, report.md, report.html and junit.xml in the run's directory."""
    stages = [
        {
            "name": o.name, "kind": o.kind, "makes": o.makes, "state": o.state, "key": o.key,
            "seconds": round(o.seconds, 3),
            "metrics": o.artifact.metrics if o.artifact else {}, "error": str(o.error) if o.error else None,
            "gates": [asdict(v) for v in o.verdicts], "warnings": o.warnings,
        }
        for o in found.outcomes.values()
    ]  # fmt: skip
    artifacts = [{**asdict(row), "verdict": row.verdict} for row in found.rows]
    whole = {"pipeline": found.plan.name, "artifacts": artifacts, "stages": stages, "next": found.commands}
    shown = document(found)
    (run_dir / "report.json").write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", "utf-8")
    (run_dir / "report.md").write_text(markdown(shown), "utf-8")
    shown.add(*comparison.questions(found.parents))
    (run_dir / "report.html").write_text(html(shown), "utf-8")
    (run_dir / "junit.xml").write_text(junit.xml(found.plan.name, list(cases(found))), "utf-8")


def document(found: Ending) -> Document:
    """The report for people."""
    shown = Document(found.plan.name)
    if found.rows:
        shown.add(Heading(TITLE), _table(found), Heading("Quality"), comparison.quality(found.parents.subjects))
        shown.add(Heading("Cost"), *comparison.costs(found.parents.subjects))
    shown.add(*comparison.tested(found.parents), *comparison.forgetting(found.bases.pairs))
    outcomes = found.outcomes.values()
    stages = [(o.name, o.kind, o.state, f"{o.seconds:.1f} s", Mono(o.key) if o.key else "-") for o in outcomes]
    shown.add(Heading("Stages"), Table(("stage", "kind", "state", "time", "artifact"), stages))
    gates = [(o.name, Mono(v.gate), "held" if v.held else "failed", v.reason) for o in outcomes for v in o.verdicts]
    if gates:
        shown.add(Heading("Gates"), Table(("stage", "gate", "result", "reason"), gates))
    notes = [f"{o.name}: {w}" for o in outcomes for w in o.warnings]
    notes += [f"{o.name}: {o.error.message}" for o in outcomes if o.error]
    if notes:
        shown.add(Heading("Notes"), Bullets(notes))
    if found.commands:
        shown.add(Heading("Next"), Listing(found.commands))
    return shown


def cases(found: Ending) -> Iterator[junit.Case]:
    """A test case for each stage, each gate, and each set of an evaluation."""
    for outcome in found.outcomes.values():
        seconds = outcome.seconds if outcome.state == "done" else 0.0
        if outcome.error:
            yield junit.Case(outcome.name, outcome.kind, str(outcome.error), "error")
        elif outcome.artifact is None:
            yield junit.Case(outcome.name, outcome.kind, f"{outcome.state}: what it needs has not passed", "skipped")
        else:
            yield junit.Case(outcome.name, outcome.kind, said=outcome.state, seconds=seconds)
            if outcome.kind == "eval":
                yield from set_cases(outcome.name, of_evaluation(outcome.artifact).sets)
        for v in outcome.verdicts:
            problem = "" if v.held else f"gate '{v.gate}' does not hold: {v.reason}"
            yield junit.Case(outcome.name, v.gate, problem, said=v.reason)


def next_commands(plan: Plan, outcomes: Mapping[str, Outcome], run_dir: Path) -> list[str]:
    """What a person may want to type now, ready to paste."""

    def path(source: str | External) -> Path | None:
        if isinstance(source, External):
            return source.artifact.path
        return link(run_dir, source) if outcomes[source].passed else None

    commands = []
    if plan.serve and plan.serve_sources:
        paths = {place: path(source) for place, source in plan.serve_sources.items()}
        base, loras = paths.get(("base",)), {place[1]: at for place, at in paths.items() if place[0] == "adapters"}
        if all(paths.values()):
            lora = f" --lora {','.join(f'{n}={p}' for n, p in loras.items())}" if loras else ""
            commands.append(f"suite serve --model {base}{lora}" if base else f"suite serve --config {plan.file}")
            name = next(iter(loras), base.name if base else next(iter(plan.serve.models)))
            commands.append(f"suite chat --url http://{plan.serve.host}:{plan.serve.port} --model {name}")
    for name, outcome in outcomes.items():
        if outcome.makes == "package" and outcome.passed and outcome.artifact:
            folder = link(run_dir, name)
            if (outcome.artifact.path / "Modelfile").is_file():
                made = outcome.artifact.metrics.get("name", name)
                commands.append(f"cd {folder} && ollama create {made} -f Modelfile")
    return commands
