"""Gates: conditions on measured values, such as `ceval-mini.acc >= @before.ceval-mini.acc - 0.02 at 95 %`.

A side is numbers and measured values joined by + - * /. A value is a path into this stage's metrics, which may begin
with the stage's own name (`score.ceval-mini.acc`), `@stage.path` into another's, or `forgotten(@stage.set)`: how many
questions of a set that stage answered right and this one does not (`forgotten(@stage)`: of all sets; `learnt(...)`: the
reverse). A value that was not measured fails the gate: nothing passes unmeasured. Names may have letters of any script
and dots (`arc-1.5.acc`, `2wiki.acc`); one that could be a number, or has other signs, is quoted (`"2024 exam".acc`).

With `at 95 %` the condition must hold wherever the true score may be: at both ends of its interval or, beside the same
score of another stage, of the interval of their difference on the same questions. So few questions prove little.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from suite.errors import SuiteError
from suite.evidence import Bounds, Evidence, Unmeasured

QUOTED = r"""(?:"[^"]+"|'[^']+')"""
NUMBERED = r"\d+(?![eE][-+]?\d)[^\W\d][\w:-]*"
"""A name that begins with digits and is no number, nor the rest of one: `a-1.5e3` is a difference without spaces."""
NAME = rf"(?:[^\W\d][\w:-]*|{NUMBERED}|{QUOTED})"
PART = rf"(?:\w[\w:-]*|{QUOTED})"
# alone it would rather be a slip: 4_000_000, 10min
PATH = rf"(?!{NUMBERED}(?![\w:.-])){NAME}(?:(?:\.{PART})*\.{NAME})?"
STAGE = r"[A-Za-z][\w-]*(?:\[[^@\s]*\])?"
TOKEN = re.compile(
    rf"""\s*(?:(?P<number>\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)(?![\w.])
    | (?P<flips>forgotten|learnt)\(\s*@(?P<other>{STAGE})(?:\.(?P<set>{PART}(?:\.{PART})*))?\s*\)
    | @(?P<stage>{STAGE})\.(?P<path>(?:{PART}\.)*{NAME})
    | (?P<own>{PATH})
    | (?P<op>>=|<=|==|>|<|[-+*/()]))""",
    re.VERBOSE,
)
LIKE_NUMBER = re.compile(rf"(@{STAGE}\.|\.)?(\d[\w:-]*(?:\.\d[\w:-]*)*)([\w.:-]*)")
"""What cannot be read, but could with its second part in quotes."""
HINT = (
    "write it like 'ceval-mini.acc >= @before.ceval-mini.acc - 0.02 at 95 %'"
    " (put spaces around - and +, quotes around names with other signs)"
)
AT = re.compile(r"\s+at\s+(\d+(?:\.\d+)?)\s*%\s*$")
COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "==": operator.eq,
}  # fmt: skip
SUMS: dict[str, Callable[[float, float], float]] = {"+": operator.add, "-": operator.sub}
PRODUCTS: dict[str, Callable[[float, float], float]] = {"*": operator.mul, "/": operator.truediv}


@dataclass(frozen=True)
class Verdict:
    """Whether a gate held, and the numbers that decided it."""

    gate: str
    held: bool
    reason: str


class Value(NamedTuple):
    """A measured value in a gate: of this stage, or of `stage`; or the questions that flipped since that one."""

    path: str
    stage: str | None = None
    of: Literal["metrics", "forgotten", "learnt"] = "metrics"


Lookup = Callable[[Value], float]
Term = Callable[[Lookup], float]


@dataclass(frozen=True)
class Gate:
    """One parsed condition on `values` of the stage `name`.

    `confidence` is a share, or None where the numbers are taken as they are.
    """

    text: str
    values: tuple[Value, ...]
    left: Term
    compare: str
    right: Term
    confidence: float | None = None
    name: str = ""

    @property
    def stages(self) -> tuple[str, ...]:
        """The other stages that it reads."""
        return tuple(value.stage for value in self.values if value.stage)

    def judge(self, own: Evidence, others: Mapping[str, Evidence]) -> Verdict:
        """Decide on what is known of this stage's artifact and, by stage name, of those of `stages`."""
        try:
            if self.confidence is None:
                held, said = self._at(lambda value: self._measured(value, own, others))
                return Verdict(self.text, held, f"{said} is {'true' if held else 'false'}")
            return self._judge_sure(own, others)
        except Unmeasured as missing:
            return Verdict(self.text, False, str(missing))
        except ZeroDivisionError:
            return Verdict(self.text, False, "division by zero")

    def _at(self, look_up: Lookup) -> tuple[bool, str]:
        left, right = self.left(look_up), self.right(look_up)
        return COMPARE[self.compare](left, right), f"{left:.4g} {self.compare} {right:.4g}"

    def _judge_sure(self, own: Evidence, others: Mapping[str, Evidence]) -> Verdict:
        assert self.confidence is not None
        subject, *beside = sorted(set(self.values), key=lambda value: value.stage or "")
        of = own if subject.stage is None else _of(subject.stage, others)
        against = _of(beside[0].stage or "", others) if beside else None
        path = beside[0].path if beside else self._path(subject, of.metrics)
        found = of.bounds(path, self.confidence, against)
        ends = [self._at(_replaced(subject, end, found)) for end in (found.low, found.high)]
        held = all(end for end, _ in ends)
        where = f" beside {found.beside:.4g}" if found.beside is not None else ""
        sure = f"at {100 * self.confidence:.4g} % on {found.n} questions"
        said = (
            f"{path} is {found.low:.4g} to {found.high:.4g}{where} {sure}{f' ({found.remark})' if found.remark else ''}"
        )
        if held:
            return Verdict(self.text, True, f"{said}: true at both ends")
        undecided = " (and true at the other end: more questions could tell)" if any(end for end, _ in ends) else ""
        false = next(text for end, text in ends if not end)
        return Verdict(self.text, False, f"{said}: {false} is false{undecided}")

    def _measured(self, value: Value, own: Evidence, others: Mapping[str, Evidence]) -> float:
        if value.of != "metrics":
            learnt, forgotten = own.flips(_of(value.stage or "", others), value.path)
            return float(forgotten if value.of == "forgotten" else learnt)
        metrics = (own if value.stage is None else _of(value.stage, others)).metrics
        return value_at(metrics, self._path(value, metrics), value.stage)

    def _path(self, value: Value, metrics: Mapping[str, Any]) -> str:
        """The path of a value without this stage's name, where that does not begin a metric's name too."""
        return value.path if value.stage or _first(value.path, metrics) else _bare(value.path, self.name)


def _bare(path: str, name: str) -> str:
    """A path without the name of the stage whose value it is."""
    return path.removeprefix(f"{name}.") if name else path


def _of(stage: str, others: Mapping[str, Evidence]) -> Evidence:
    if stage not in others:
        raise Unmeasured(f"@{stage} made nothing")
    return others[stage]


def _replaced(subject: Value, end: float, found: Bounds) -> Lookup:
    return lambda value: end if value == subject or found.beside is None else found.beside


def _first(path: str, metrics: Mapping[str, Any]) -> str:
    """The name at the beginning of a path, the longest of several, for names may have dots; empty where none is."""
    return max((name for name in metrics if f"{path}.".startswith(f"{name}.")), key=len, default="")


def value_at(metrics: Mapping[str, Any], path: str, stage: str | None) -> float:
    """The number at a dotted path such as `ceval-mini.acc`; raises Unmeasured with what there is."""
    node: Any = metrics
    rest = path
    while rest:
        name = _first(rest, node) if isinstance(node, Mapping) else ""
        if isinstance(node, Mapping) and "not_available" in node and not name:
            raise Unmeasured(f"'{path}' is not available: {node['not_available']}")
        if not name:
            known = ", ".join(sorted(node)) if isinstance(node, Mapping) and node else "nothing"
            by = f" by @{stage}" if stage else ""
            elsewhere = "" if stage or node is not metrics else "; a value of another stage begins with @"
            raise Unmeasured(f"'{path}' was not measured{by}; there is: {known}{elsewhere}")
        node, rest = node[name], rest[len(name) + 1 :]
    if isinstance(node, bool) or not isinstance(node, int | float):
        raise Unmeasured(f"'{path}' is no number but {node!r}")
    return float(node)


def parse(text: str, name: str = "") -> Gate:
    """Read one gate of the stage that its file calls `name`; raises SuiteError with what was expected."""
    return _Parser(text, name).gate()


class _Parser:
    """Recursive descent: gate = sum compare sum; sum = product {+|- product}; product = atom {*|/ atom}."""

    def __init__(self, text: str, name: str) -> None:
        self.text, self.name, self.at = text, name, 0
        self.values: list[Value] = []
        self.tokens: list[re.Match[str]] = []
        sure = AT.search(text)
        self.confidence = float(sure[1]) / 100 if sure else None
        text = text[: sure.start()] if sure else text
        position = 0
        while text[position:].strip():
            match = TOKEN.match(text, position)
            if not match:
                raise self.unread(text[position:].strip())
            self.tokens.append(match)
            position = match.end()

    def error(self, what: str, hint: str = HINT) -> SuiteError:
        return SuiteError(f"gate '{self.text}': {what}", hint=hint)

    def unread(self, rest: str) -> SuiteError:
        name = LIKE_NUMBER.match(rest)
        quoted = f'{name[1] or ""}"{name[2]}"{name[3]}' if name else ""
        hint = f"write {quoted} if that is a name (and spaces around - and +)" if name else HINT
        if name and name[1] == "." and (not self.tokens or self.tokens[-1]["op"]):
            hint = f"write 0{rest.split()[0]} if that is a number"
        return self.error(f"cannot read '{rest}'", hint)

    def op(self) -> str | None:
        return self.tokens[self.at]["op"] if self.at < len(self.tokens) else None

    def gate(self) -> Gate:
        left = self.chain(SUMS, lambda: self.chain(PRODUCTS, self.atom))
        compare = self.op()
        if compare not in COMPARE:
            found = self.tokens[self.at][0].strip() if self.at < len(self.tokens) else ""
            after = self.text[: self.tokens[self.at - 1].end()].strip()
            raise self.error(f"expected one of >= <= > < == after '{after}'" + (f", found '{found}'" if found else ""))
        self.at += 1
        right = self.chain(SUMS, lambda: self.chain(PRODUCTS, self.atom))
        if self.at < len(self.tokens):
            raise self.error(f"unexpected '{self.tokens[self.at][0].strip()}'")
        self.check_sure()
        return Gate(self.text, tuple(self.values), left, compare, right, self.confidence, self.name)

    def check_sure(self) -> None:
        """With `at`: one score, or one beside the same of another stage; more have no interval together."""
        if self.confidence is None:
            return
        if not 0.5 <= self.confidence < 1:
            raise self.error("'at' takes 50 to 99.99 %")
        own, others = ([v for v in self.values if (v.stage is None) == mine] for mine in (True, False))
        one = len(self.values) == 1
        two = len(own) == len(others) == 1 and others[0].path in (own[0].path, _bare(own[0].path, self.name))
        if not ((one or two) and all(value.of == "metrics" for value in self.values)):
            named = ", ".join(f"@{v.stage}.{v.path}" if v.stage else v.path for v in self.values)
            what = "with 'at' it compares one score with a number, or with the same score of another stage"
            raise self.error(f"{what}, not {named or 'numbers only'}")

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
        if token["own"] or token["stage"] or token["flips"]:
            value = _value(token)
            self.values.append(value)
            return lambda look_up: look_up(value)
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


def _value(token: re.Match[str]) -> Value:
    path = re.sub(QUOTED, lambda quoted: quoted[0][1:-1], token["set"] or token["own"] or token["path"] or "")
    if token["flips"]:
        return Value(path, token["other"], "forgotten" if token["flips"] == "forgotten" else "learnt")
    return Value(path, token["stage"])


def _joined(op: Callable[[float, float], float], left: Term, right: Term) -> Term:
    return lambda look_up: op(left(look_up), right(look_up))
