"""Gates: conditions on measured values, such as `ceval-mini.acc >= @before.ceval-mini.acc - 0.02`.

A side is a number, a path into this stage's metrics, or `@stage.path` into another's, joined by + - * /. A value that
was not measured fails the gate: nothing passes unmeasured.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from suite.errors import SuiteError

TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)"
    r"|@(?P<stage>[A-Za-z][\w-]*(?:\[[^@\s]*\])?)\.(?P<path>[A-Za-z][\w-]*(?:\.[A-Za-z][\w-]*)*)"
    r"|(?P<own>[A-Za-z][\w-]*(?:\.[A-Za-z][\w-]*)*)"
    r"|(?P<op>>=|<=|==|>|<|[-+*/()]))"
)
COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "==": operator.eq,
}  # fmt: skip
SUMS: dict[str, Callable[[float, float], float]] = {"+": operator.add, "-": operator.sub}
PRODUCTS: dict[str, Callable[[float, float], float]] = {"*": operator.mul, "/": operator.truediv}


class Unmeasured(Exception):
    """A gate names a value that no metric holds."""


@dataclass(frozen=True)
class Verdict:
    """Whether a gate held, and the numbers that decided it."""

    gate: str
    held: bool
    reason: str


Lookup = Callable[[str | None, str], float]
Term = Callable[[Lookup], float]


@dataclass(frozen=True)
class Gate:
    """One parsed condition; `stages` are the other stages that it reads."""

    text: str
    stages: tuple[str, ...]
    left: Term
    compare: str
    right: Term

    def judge(self, own: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]]) -> Verdict:
        """Decide on this stage's metrics and, by stage name, those of `stages`."""

        def look_up(stage: str | None, path: str) -> float:
            return value_at(own if stage is None else others.get(stage, {}), path, stage)

        try:
            left, right = self.left(look_up), self.right(look_up)
        except Unmeasured as missing:
            return Verdict(self.text, False, str(missing))
        except ZeroDivisionError:
            return Verdict(self.text, False, "division by zero")
        held = COMPARE[self.compare](left, right)
        return Verdict(self.text, held, f"{left:.4g} {self.compare} {right:.4g} is {'true' if held else 'false'}")


def value_at(metrics: Mapping[str, Any], path: str, stage: str | None) -> float:
    """The number at a dotted path such as `ceval-mini.acc`; raises Unmeasured with what there is."""
    node: Any = metrics
    for part in path.split("."):
        if not isinstance(node, Mapping) or part not in node:
            known = ", ".join(sorted(node)) if isinstance(node, Mapping) and node else "nothing"
            raise Unmeasured(f"'{path}' was not measured{f' by @{stage}' if stage else ''}; there is: {known}")
        node = node[part]
    if isinstance(node, bool) or not isinstance(node, int | float):
        raise Unmeasured(f"'{path}' is no number but {node!r}")
    return float(node)


def parse(text: str) -> Gate:
    """Read one gate; raises SuiteError with what was expected."""
    return _Parser(text).gate()


class _Parser:
    """Recursive descent: gate = sum compare sum; sum = product {+|- product}; product = atom {*|/ atom}."""

    def __init__(self, text: str) -> None:
        self.text, self.stages, self.at = text, [], 0
        self.tokens: list[re.Match[str]] = []
        position = 0
        while text[position:].strip():
            match = TOKEN.match(text, position)
            if not match:
                raise self.error(f"cannot read '{text[position:].strip()}'")
            self.tokens.append(match)
            position = match.end()

    stages: list[str]

    def error(self, what: str) -> SuiteError:
        hint = "write it like 'ceval-mini.acc >= @before.ceval-mini.acc - 0.02' (put spaces around - and +)"
        return SuiteError(f"gate '{self.text}': {what}", hint=hint)

    def op(self) -> str | None:
        return self.tokens[self.at]["op"] if self.at < len(self.tokens) else None

    def gate(self) -> Gate:
        left = self.chain(SUMS, lambda: self.chain(PRODUCTS, self.atom))
        compare = self.op()
        if compare not in COMPARE:
            raise self.error("expected one of >= <= > < ==")
        self.at += 1
        right = self.chain(SUMS, lambda: self.chain(PRODUCTS, self.atom))
        if self.at < len(self.tokens):
            raise self.error(f"unexpected '{self.tokens[self.at][0].strip()}'")
        return Gate(self.text, tuple(self.stages), left, compare, right)

    def chain(self, ops: Mapping[str, Callable[[float, float], float]], part: Callable[[], Term]) -> Term:
        term = part()
        while (op := self.op()) is not None and op in ops:
            self.at += 1
            term = _joined(ops[op], term, part())
        return term

    def atom(self) -> Term:
        if self.at >= len(self.tokens):
            raise self.error("a value is missing at its end")
        token = self.tokens[self.at]
        self.at += 1
        if token["number"]:
            number = float(token["number"])
            return lambda _: number
        if token["stage"]:
            self.stages.append(token["stage"])
            return lambda look_up: look_up(token["stage"], token["path"])
        if token["own"]:
            return lambda look_up: look_up(None, token["own"])
        if token["op"] == "-":
            inner = self.atom()
            return lambda look_up: -inner(look_up)
        if token["op"] == "(":
            inner = self.chain(SUMS, lambda: self.chain(PRODUCTS, self.atom))
            if self.op() != ")":
                raise self.error("a ')' is missing")
            self.at += 1
            return inner
        raise self.error(f"expected a value, found '{token[0].strip()}'")


def _joined(op: Callable[[float, float], float], left: Term, right: Term) -> Term:
    return lambda look_up: op(left(look_up), right(look_up))
