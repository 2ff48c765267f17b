"""Gate expressions: what they read, what they refuse, and that nothing passes unmeasured."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from suite import gate
from suite.errors import SuiteError

OWN = {"ceval-mini": {"acc": 0.8, "n": 50}, "ok": True, "parity": {"kl": 1e-3}}
OTHERS = {"before": {"ceval-mini": {"acc": 0.81}}, "small[gptq,4]": {"size": 2}}


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("ceval-mini.acc >= 0.8", True),
        ("ceval-mini.acc > 0.8", False),
        ("ceval-mini.acc >= @before.ceval-mini.acc - 0.02", True),
        ("ceval-mini.acc >= @before.ceval-mini.acc", False),
        ("parity.kl < 1e-2", True),
        ("ceval-mini.acc / ceval-mini.n * 2 == (0.8 / 50) * 2", True),
        ("@small[gptq,4].size <= 2 + -0", True),
        ("1 - 0.5 - 0.25 == 0.25", True),
    ],
)
def test_judged(text: str, held: bool) -> None:
    assert gate.parse(text).judge(OWN, OTHERS).held is held


@pytest.mark.parametrize("path", ["nothing", "ceval-mini.nothing", "ceval-mini", "ok", "@before.nothing", "@gone.acc"])
def test_what_was_not_measured_does_not_pass(path: str) -> None:
    for text in (f"{path} >= 0", f"{path} < 1", f"0 <= {path}"):
        verdict = gate.parse(text).judge(OWN, OTHERS)
        assert not verdict.held
        assert "not measured" in verdict.reason or "no number" in verdict.reason


def test_division_by_zero_does_not_pass() -> None:
    assert not gate.parse("1 / 0 >= 0").judge(OWN, OTHERS).held


@pytest.mark.parametrize(
    "text", ["", "a", "a >=", ">= 1", "a >= 1 2", "a => 1", "(a >= 1", "a >= 1 and b >= 2", "@a >= 1", "a-0.5 > 0"]
)
def test_refused(text: str) -> None:
    with pytest.raises(SuiteError, match="gate"):
        gate.parse(text)


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        parsed = gate.parse(text)
    except SuiteError:
        return
    parsed.judge(OWN, OTHERS)


@given(st.integers(0, 99), st.integers(1, 99), st.integers(0, 99))
def test_sums_and_products_as_in_arithmetic(a: int, b: int, c: int) -> None:
    assert gate.parse(f"{a} + {b} * {c} - {a} / {b} == {a + b * c - a / b!r}").judge({}, {}).held
