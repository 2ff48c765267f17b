"""Artifacts side by side: quality with intervals, cost, what is better or worse and what cannot be told."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evalsets.compare import Difference, Row, corrected, difference, right
from evalsets.report import TOO_FEW, label, number
from suite.document import Bullets, Document, Heading, Part, Table
from suite.errors import SuiteError, near
from suite.reports.subjects import Subject

PARENT = "parent"
ALONE = "llamacpp"
"""The backend that serves one request at a time."""
CHANGED = 500
"""Questions of a set in a page; it says how many more there are."""
NAMED = 20
"""Forgotten questions of a set that are named in a line; the JSON has them all."""
WORST = 5
"""Subjects of a set that are named among what was forgotten."""


@dataclass(frozen=True)
class Pair:
    """A subject beside the one it is compared with, by set."""

    subject: Subject
    reference: Subject
    differences: dict[str, Difference]


@dataclass(frozen=True)
class Comparison:
    """Subjects in order, and those that are compared; all verdicts are decided as one family."""

    subjects: list[Subject]
    pairs: list[Pair]

    @property
    def tests(self) -> int:
        """How many differences were tested."""
        return sum(found.change is not None for pair in self.pairs for found in pair.differences.values())


def compare(subjects: Sequence[Subject], against: str = "") -> Comparison:
    """Each of the others against the first, or the one named, or what it was made from (`parent`).

    Raises SuiteError for a name that none of them has.
    """
    if against == PARENT:
        found = [(subject, parent) for subject in subjects if (parent := nearest(subject, subjects))]
    else:
        names = [subject.name for subject in subjects]
        if against and against not in names:
            raise SuiteError(f"--against: '{against}' is none of what is compared", hint=near(against, names))
        reference = subjects[names.index(against) if against else 0]
        found = [(subject, reference) for subject in subjects if subject is not reference]
    return decided(subjects, found)


def nearest(subject: Subject, others: Sequence[Subject]) -> Subject | None:
    """The one of `others` that `subject` was made from, the nearest of them behind the same backend if possible."""
    for digest in subject.parents():
        made = [other for other in others if other.digest == digest and other.report]
        if made:
            return min(made, key=lambda other: other.backend != subject.backend)
    return None


def decided(subjects: Sequence[Subject], pairs: Sequence[tuple[Subject, Subject]]) -> Comparison:
    """Compare these pairs on every set that both sides have."""
    family = {
        (i, name): difference(reference.report, subject.report, name)
        for i, (subject, reference) in enumerate(pairs) if subject.report and reference.report
        for name in subject.sets if name in reference.sets
    }  # fmt: skip
    found: list[dict[str, Difference]] = [{} for _ in pairs]
    for (i, name), one in zip(family, corrected(list(family.values())), strict=True):
        found[i][name] = one
    return Comparison(list(subjects), [Pair(*pair, by_set) for pair, by_set in zip(pairs, found, strict=True)])


def plain(found: Comparison) -> dict[str, Any]:
    """The comparison for machines."""
    subjects = [
        {
            "name": s.name, "backend": s.backend, "bytes": s.bytes, "speed": s.speed, "memory": s.metrics.get("memory"),
            "parity": s.parity, "report": str(s.report.folder) if s.report else None,
            "elsewhere": {name: str(folder) for name, folder in s.report.elsewhere.items()} if s.report else {},
            "sets": {name: one["total"] for name, one in s.sets.items()},
        }
        for s in found.subjects
    ]  # fmt: skip
    pairs = [
        {
            "subject": p.subject.name,
            "against": p.reference.name,
            "sets": {n: d.json() for n, d in p.differences.items()},
        }
        for p in found.pairs
    ]
    return {"subjects": subjects, "comparisons": pairs, "tests": found.tests, "correction": "Holm 1979"}


def document(found: Comparison) -> Document:
    """The comparison for people; plots are added by who has them."""
    shown = Document(" · ".join(subject.name for subject in found.subjects))
    shown.add(Heading("Quality"), quality(found.subjects), Heading("Cost"), *costs(found.subjects))
    notes = [f"{s.name} was not evaluated: suite eval" for s in found.subjects if not s.report]
    notes += [
        f"{pair.subject.name} and {pair.reference.name} were asked no set that is the same"
        for pair in found.pairs if pair.subject.report and pair.reference.report and not pair.differences
    ]  # fmt: skip
    notes += [
        f"{s.name}: {', '.join(s.report.elsewhere)} as an earlier evaluation found: the newest asked less of it"
        for s in found.subjects if s.report and s.report.elsewhere
    ]  # fmt: skip
    if notes:
        shown.add(Bullets(notes))
    shown.add(*tested(found), *forgetting(found.pairs))
    return shown


def tested(found: Comparison) -> list[Part]:
    """The differences with their verdicts, and what to know of them; nothing where no set is on both sides."""
    if not any(pair.differences for pair in found.pairs):
        return []
    about: dict[tuple[str, str], list[str]] = {}
    for pair in found.pairs:
        for name, one in pair.differences.items():
            for remark in one.remarks:
                about.setdefault((name, f"beside {pair.reference.name}: {remark}"), []).append(pair.subject.name)
    parts: list[Part] = [Heading("Differences"), explanation(found), differences(found)]
    remarks = [f"{name} of {', '.join(subjects)} {text}" for (name, text), subjects in about.items()]
    return [*parts, *([Bullets(remarks)] if remarks else []), *averages(found)]


def questions(found: Comparison) -> list[Part]:
    """Every question whose score changed, with both replies."""
    parts: list[Part] = []
    for pair in found.pairs:
        for name in pair.differences:
            table = changed(pair, name)
            if table.rows:
                shown = Table(table.header, table.rows[:CHANGED], searchable=True)
                parts += [Heading(f"{name}: {pair.subject.name} beside {pair.reference.name}", 3), shown]
            if len(table.rows) > CHANGED:
                parts.append(
                    f"{len(table.rows) - CHANGED} more questions changed; suite compare --diff {name} shows all."
                )
    return [Heading("Questions whose score changed"), *parts] if parts else []


def quality(subjects: Sequence[Subject]) -> Table:
    """The deciding figure of every set with its 95 % interval; and of how many questions, where these differ."""
    names = list(dict.fromkeys(name for subject in subjects for name in subject.sets))
    header = ["artifact", *(_called(name, subjects) for name in names)]
    several = {name for name in names if len({s.sets[name]["total"].get("n") for s in subjects if name in s.sets}) > 1}
    rows = [(s.name, *(_score(s.sets.get(name), name in several) for name in names)) for s in subjects]
    return Table(header, rows)


def _called(name: str, subjects: Sequence[Subject]) -> str:
    score = label(next(subject.sets[name]["headline"] for subject in subjects if name in subject.sets))
    return name if name == score else f"{name}, {score}"


def _score(found: Mapping[str, Any] | None, counted: bool) -> str:
    if found is None:
        return "-"
    total, headline = found["total"], found["headline"]
    if total.get(headline) is None:
        return "not available" if "not_available" in total else "not measured"
    leaked = total.get("leakage", {}).get("n", 0)
    of = f" of {total['n']}" if counted else ""
    ends = ", ".join(number(headline, total[end]) for end in ("low", "high") if end in total) or TOO_FEW
    return f"{number(headline, total[headline])} [{ends}]{of}" + (f", {leaked} leaked" if leaked else "")


def costs(subjects: Sequence[Subject]) -> list[Part]:
    """The table, and what its reader must know."""
    backends = {s.backend for s in subjects if s.speed}
    several = len(backends) > 1 and ALONE in backends
    note = f"{ALONE} is asked one question at a time, other backends several: compare their latencies with care."
    return [cost(subjects), note] if several else [cost(subjects)]


def cost(subjects: Sequence[Subject]) -> Table:
    """Size, speed, memory, and how far each is from what it was made from."""
    header = ("artifact", "backend", "size", "tokens/s", "latency, median", "latency, 95 %", "memory", "KL to parent",
              "same token", "perplexity, parent's and own")  # fmt: skip
    rows = []
    for s in subjects:
        parity, speed = s.parity, s.speed
        perplexity = f"{parity['ppl_parent']:.4g}, {parity['ppl_child']:.4g}" if "ppl_child" in parity else "-"
        rows.append((
            s.name, s.backend or "-", _or_dash(s.bytes, size_text),
            _or_dash(speed.get("tokens_per_s"), "{:.0f}".format),
            _or_dash(speed.get("latency_p50"), "{:.3f} s".format),
            _or_dash(speed.get("latency_p95"), "{:.3f} s".format),
            _or_dash(s.metrics.get("memory"), size_text), _or_dash(parity.get("kl"), "{:.1e}".format),
            _or_dash(parity.get("top1"), "{:.2%}".format), perplexity,
        ))  # fmt: skip
    return Table(header, rows)


def _or_dash(value: Any, shown: Any) -> str:
    return "-" if value is None else str(shown(value))


def size_text(count: int) -> str:
    """Bytes for people."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def explanation(found: Comparison) -> str:
    """What the verdicts mean."""
    several = (
        f" All {found.tests} tests are decided together: p is corrected by Holm's method. Each interval is of its own "
        "difference alone, so one that excludes 0 may stand beside a p that cannot tell."
        if found.tests > 1
        else ""
    )
    return (
        "On the same questions: McNemar's exact test where answers are right or wrong, else the paired bootstrap. "
        f"'Needed' is how many questions would show such a difference with a probability of 80 %.{several}"
    )


def differences(found: Comparison) -> Table:
    """Every tested difference with its interval and verdict."""
    header = ("artifact", "against", "set", "difference", "95 % interval", "p", "verdict", "better", "worse",
              "questions", "left out", "needed")  # fmt: skip
    rows = [
        (pair.subject.name, pair.reference.name, name, *_difference(one))
        for pair in found.pairs for name, one in pair.differences.items()
    ]  # fmt: skip
    return Table(header, rows)


def averages(found: Comparison) -> list[Part]:
    """How averages differ that are no mean over questions, as BLEU; nothing where no set has one."""
    rows = [
        (pair.subject.name, pair.reference.name, name, label(figure), number(figure, moved.before),
         number(figure, moved.after), f"{moved.after - moved.before:+.3f}", f"{moved.low:+.3f} to {moved.high:+.3f}")
        for pair in found.pairs for name, one in pair.differences.items() for figure, moved in one.averages.items()
    ]  # fmt: skip
    header = ("artifact", "against", "set", "average", "against's", "artifact's", "difference", "95 % interval")
    said = "Averages of the same questions that no single question has a part of. No verdict: none of them is tested."
    return [Heading("Other averages", 3), said, Table(header, rows)] if rows else []


def _difference(found: Difference) -> tuple[str, ...]:
    if not found.change or found.p_corrected is None:
        return ("-", "-", "-", found.verdict, "-", "-", "0", str(found.left_out), "-")
    change = found.change
    unit = " bits/byte" if found.kind == "perplexity" else ""
    return (
        f"{change.difference:+.3f}{unit}", f"{change.low:+.3f} to {change.high:+.3f}", f"{found.p_corrected:.3g}",
        found.verdict, str(change.gained), str(change.lost), str(change.n), str(found.left_out),
        _or_dash(change.needed, str),
    )  # fmt: skip


def forgetting(pairs: Sequence[Pair]) -> list[Part]:
    """What the one before answered right and the other does not, and the reverse; nothing where no question flipped."""
    rows, named = [], []
    for pair in pairs:
        for name, found in pair.differences.items():
            lost, learnt = found.forgotten, found.learnt
            if not lost and not learnt:
                continue
            known = sum(right(a) for a, _ in found.pairs)
            rows.append((pair.subject.name, pair.reference.name, name, f"{len(lost)} of {known}", str(len(learnt)),
                         ", ".join(_worst(found))))  # fmt: skip
            if lost:
                ids = [str(row["id"]) for row in lost[:NAMED]] + (
                    [f"{len(lost) - NAMED} more"] if len(lost) > NAMED else []
                )
                named.append(f"{pair.subject.name} forgot of {name}, beside {pair.reference.name}: {', '.join(ids)}")
    if not rows:
        return []
    header = ("artifact", "beside", "set", "forgotten", "learnt", "most in")
    return [Heading("Forgotten and learnt"), Table(header, rows), Bullets(named)]


def _worst(found: Difference) -> Iterator[str]:
    """The subjects with the most losses."""
    for subject, counts in list(found.subjects().items())[:WORST]:
        if counts["lost"] > counts["gained"]:
            yield f"{subject} {counts['lost']} of {counts['n']}"


def changed(pair: Pair, name: str) -> Table:
    """The questions of a set whose score changed: what was asked and expected, and both replies."""
    found = pair.differences[name]
    header = ("question", "change", "asked", "expected", f"{pair.reference.name} said", f"{pair.subject.name} said")
    rows = [
        (str(b["id"]), "better" if found.better(a, b) else "worse", asked(b), _text(b.get("expected")), _said(a),
         _said(b))
        for a, b in found.pairs if found.better(a, b) or found.better(b, a)
    ]  # fmt: skip
    return Table(header, rows, searchable=True)


def asked(row: Row) -> str:
    """The question's own words: the last message, without solved examples."""
    prompt = row["prompt"]
    return prompt if isinstance(prompt, str) else _text(prompt[-1].get("content")) if prompt else ""


def _said(row: Row) -> str:
    return f"{row['nll']:.2f} nats" if "nll" in row else str(row["reply"])


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)
