"""How good a reply is, on a scale of 0 to 1.

overlap.py    ROUGE, BLEU, chrF, by the libraries that define them
words.py      exact match, token F1, Jaccard, regular expressions
own.py        a person's own `module:function`
calls.py      calls of tools by JSON value
toolbench.py  ToolBench's figures of plan, action and arguments
rules.py      instructions that can be verified
refusals.py   whether a reply refuses
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from evalsets.metrics import own
from evalsets.metrics.overlap import ROUGE, bleu, chrf, rouge, words_chinese
from evalsets.metrics.words import exact, f1, jaccard, regex
from suite.errors import SuiteError, near

__all__ = [
    "ROUGE", "bleu", "check", "chrf", "exact", "f1", "figures", "headline", "jaccard", "likeness", "regex", "rouge",
    "words_chinese",
]  # fmt: skip

SINGLE: dict[str, Callable[[str, str], float]] = {
    "exact": exact, "f1": f1, "chrf": chrf, "jaccard": jaccard, "regex": regex,
}  # fmt: skip
KNOWN = ("rouge", "bleu", *SINGLE, "judge")


TAKEN = (
    "id", "digest", "subset", "language", "prompt", "reply", "finish", "tokens", "error", "expected", "parsed", "score",
    "grade", "verdict", "low", "high", "n", "failed", "truncated",
)  # fmt: skip
"""Names that rows and figures have for other things."""


def check(names: list[str], where: str) -> None:
    """Raise SuiteError for a metric that nobody knows, or a first one that a single reply does not have."""
    for name in names:
        if ":" in name:
            own.load(name, where)
        elif name not in KNOWN:
            raise SuiteError(f"unknown metric '{name}'", where=where, hint=f"{near(name, KNOWN)}, or module:function")
    named = [name for metric in names for name in figures(metric) or (metric,)]
    for name in (name for i, name in enumerate(named) if name in (*TAKEN, *named[:i])):
        raise SuiteError(f"two figures would have the name '{name}'", where=where, hint="call the function otherwise")
    if names[0] == "bleu":
        hint = "bleu is a figure of the whole set, and intervals need one of each question"
        raise SuiteError("bleu cannot be the first metric", where=where, hint=hint)


def headline(names: Iterable[str]) -> str:
    """The figure that the first metric gives."""
    return figures(next(iter(names)))[-1]


def figures(name: str) -> tuple[str, ...]:
    """The names of a metric's figures of one reply; those of bleu, which has none, and a function's by its own name."""
    if name == "rouge":
        return ROUGE
    return () if name == "bleu" else (name.partition(":")[2] or name,)


def likeness(names: Iterable[str], language: str, reply: str, expected: str) -> dict[str, float]:
    """How far a reply is what was expected, by those metrics that one reply has; a judge is asked elsewhere."""
    found: dict[str, float] = {}
    for name in names:
        if name == "rouge":
            found |= rouge(language, reply, expected)
        elif name in SINGLE:
            found[name] = SINGLE[name](reply, expected)
        elif ":" in name:
            found[figures(name)[0]] = own.score(name, reply, expected)
    return found
