"""What a run ends with: a table of every measured artifact against its parent, as text, Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from suite.plan import Plan
from suite.references import External
from suite.runner import Outcome
from suite.runs import link
from suite.stages import Artifact
from suite.store import tree_files

COLUMNS = ("artifact", "size", "accuracy (95 %)", "ROUGE-L", "perplexity", "KL to parent", "against parent", "verdict")


@dataclass
class Row:
    """One evaluated artifact: its scores, and how they differ from its parent's."""

    artifact: str
    parent: str | None
    bytes: int
    scores: dict[str, Any]
    parity: dict[str, Any]
    changes: dict[str, float] = field(default_factory=dict)
    verdicts: dict[str, str] = field(default_factory=dict)
    gates_held: bool = True
    state: str = "done"

    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of COLUMNS."""
        accuracy = next(
            (f"{_percent(s['acc'])} [{_percent(s['low'])}, {_percent(s['high'])}]" for s in self._sets("acc")), "-"
        )
        rouge = next((f"{s['rougeL']:.3f}" for s in self._sets("rougeL")), "-")
        perplexity = next((f"{s['ppl']:.3f}" for s in self._sets("ppl")), "-")
        kl = f"{self.parity['kl']:.1e}" if "kl" in self.parity else "-"
        changes = ", ".join(f"{name} {change:+.3f}" for name, change in self.changes.items())
        against = f"{changes} ({self.parent})" if self.parent else "-"
        return self.artifact, _size(self.bytes), accuracy, rouge, perplexity, kl, against, self.verdict

    @property
    def verdict(self) -> str:
        """Gates first, then the worst of the paired comparisons with the parent."""
        if not self.gates_held:
            return "gate failed"
        order = ("worse", "cannot tell", "better")
        return next((v for v in order if v in self.verdicts.values()), "measured")

    def _sets(self, metric: str) -> Iterator[dict[str, Any]]:
        return (s for s in self.scores.values() if isinstance(s, dict) and s.get(metric) is not None)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def rows(plan: Plan, outcomes: Mapping[str, Outcome]) -> list[Row]:
    """One row for each evaluation of the run, in its order, each compared with the evaluation of its parent."""
    found: dict[str, tuple[Row, Outcome, Artifact]] = {}
    for name, node in plan.nodes.items():
        outcome = outcomes[name]
        if outcome.kind != "eval" or outcome.artifact is None:
            continue
        source = node.inputs["model"][0]
        subject = source.artifact if isinstance(source, External) else outcomes[source].artifact
        if subject is None:
            continue
        label = source.name if isinstance(source, External) else source
        parity = subject.metrics.get("parity", {})
        held = all(v.held for v in outcome.verdicts)
        row = Row(
            label, None, artifact_bytes(subject), outcome.artifact.metrics, parity, gates_held=held, state=outcome.state
        )
        digest = outcome.artifact.record["inputs"]["model"][0]["digest"]
        found.setdefault(digest, (row, outcome, subject))
    for row, outcome, subject in found.values():
        parent = next((found[p] for p in parents(subject) if p in found), None)
        if parent and outcome.artifact and parent[1].artifact:
            from suite.evaluate import compare

            row.parent = parent[0].artifact
            row.changes = changes(row.scores, parent[0].scores)
            compared = compare(parent[1].artifact.path, outcome.artifact.path)
            row.verdicts = {name: str(c["verdict"]) for name, c in compared.items()}
    return [row for row, _, _ in found.values()]


def parents(artifact: Artifact) -> Iterator[str]:
    """Digests of what an artifact was made from, nearest first: the model or adapter, then its base, and theirs."""
    inputs = artifact.record.get("inputs", {})
    direct = [made for name in ("model", "adapter", "base") for made in inputs.get(name, ())]
    for made in direct:
        yield made["digest"]
    for made in direct:
        yield from parents(Artifact(Path(made["path"]), made["type"], made["digest"]))


def changes(scores: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, float]:
    """Differences of the headline metrics that both have: accuracy, ROUGE-L, perplexity."""
    found = {}
    for name, score in scores.items():
        for metric, short in (("acc", "acc"), ("rougeL", "ROUGE-L"), ("ppl", "ppl")):
            old = before.get(name)
            if (
                isinstance(score, dict)
                and isinstance(old, dict)
                and score.get(metric) is not None
                and old.get(metric) is not None
            ):
                found[short] = score[metric] - old[metric]
    return found


def artifact_bytes(artifact: Artifact) -> int:
    """Size of an artifact's files in bytes."""
    return int(artifact.record.get("bytes") or sum(p.stat().st_size for p in tree_files(artifact.path)))


def show(console: Console, measured: list[Row]) -> None:
    """Print the table."""
    if not measured:
        return
    table = Table(
        *COLUMNS[:1], box=box.SIMPLE_HEAD, title="Every artifact against the one it came from", title_justify="left"
    )
    for column in COLUMNS[1:]:
        table.add_column(
            column, justify="right" if column in ("size", "ROUGE-L", "perplexity", "KL to parent") else "left"
        )
    styles = {"worse": "red", "gate failed": "bold red", "better": "green"}
    for row in measured:
        *cells, verdict = row.cells()
        style = styles.get(verdict, "")
        table.add_row(*map(escape, cells), Text(verdict, style=style))
    console.print(table)


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


def write(run_dir: Path, plan: Plan, outcomes: Mapping[str, Outcome], measured: list[Row], commands: list[str]) -> None:
    """Leave report.json and report.md in the run's directory."""
    stages = [
        {
            "name": o.name, "kind": o.kind, "makes": o.makes, "state": o.state, "key": o.key,
            "seconds": round(o.seconds, 3),
            "metrics": o.artifact.metrics if o.artifact else {}, "error": str(o.error) if o.error else None,
            "gates": [asdict(v) for v in o.verdicts], "warnings": o.warnings,
        }
        for o in outcomes.values()
    ]  # fmt: skip
    artifacts = [{**asdict(row), "verdict": row.verdict} for row in measured]
    whole = {"pipeline": plan.name, "artifacts": artifacts, "stages": stages, "next": commands}
    (run_dir / "report.json").write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", "utf-8")
    (run_dir / "report.md").write_text(markdown(plan, outcomes, measured, commands), "utf-8")


def markdown(plan: Plan, outcomes: Mapping[str, Outcome], measured: list[Row], commands: list[str]) -> str:
    """The report for people."""
    parts = [f"# {plan.name}\n"]
    if measured:
        parts += [
            "## Every artifact against the one it came from\n",
            _table(COLUMNS, [row.cells() for row in measured]),
        ]
    stage_rows = [
        (o.name, o.kind, o.state, f"{o.seconds:.1f} s", f"`{o.key}`" if o.key else "-") for o in outcomes.values()
    ]
    parts += ["## Stages\n", _table(("stage", "kind", "state", "time", "artifact"), stage_rows)]
    gates = [
        (o.name, f"`{v.gate}`", "held" if v.held else "**failed**", v.reason)
        for o in outcomes.values()
        for v in o.verdicts
    ]
    if gates:
        parts += ["## Gates\n", _table(("stage", "gate", "result", "reason"), gates)]
    notes = [f"- {o.name}: {w}" for o in outcomes.values() for w in o.warnings]
    notes += [f"- {o.name}: **{o.error.message}**" for o in outcomes.values() if o.error]
    if notes:
        parts += ["## Notes\n", "\n".join(notes) + "\n"]
    if commands:
        parts += ["## Next\n", "```\n" + "\n".join(commands) + "\n```\n"]
    return "\n".join(parts)


def _table(header: tuple[str, ...], cells: Sequence[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *cells]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines) + "\n"
