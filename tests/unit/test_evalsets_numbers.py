"""Finding the number that a reply answers with."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evalsets.extract import number, same

quick = settings(deadline=None, max_examples=50)

HARD = {
    # bare, signs, separators, units
    "7": "7", "72.": "72", "1.10": "1.10", "-5": "-5", "−4": "-4", "x = -5": "-5", "5-3": "3", "It took 1,000,000 years": "1000000", "$1,234.50": "1234.50",
    "it costs $5.": "5", "-$5": "-5", "50%": "50", "72kg": "72", ".5": "0.5", "共72个": "72", "１２３": "123", "2.50e3": "2.50e3", "3.5万元": "35000", "1亿": "100000000",
    "1 200 000 people": "1200000", "12 345.6": "12345.6", "1,00,000": "100000", "2024 300": "300",
    # fractions
    "3/4": "3/4", "½ of it": "1/2", "1½": "3/2", "1 3/4 cups": "7/4", "\\frac{3}{4}": "3/4", "\\dfrac{-1}{2}": "-1/2", "1/0": "0",
    # several: the last one
    "3 + 4 = 7": "7", "1,2,3": "3", "She had 3, then 5 more, so 8.": "8", "10 - 3 = 7": "7", "5 \\times 3 = 15": "15",
    # marked: the first such
    "#### 72": "72", "so 3 x 4 = 12\n#### 12\n\nQuestion: next #### 5": "12", "\\boxed{42}": "42", "so \\boxed{\\frac{3}{4}} of 8": "3/4", "\\boxed{1{,}234}": "1234",
    "The answer is 72 apples. Then 5 more?": "72", "Answer: **42** (not 43)": "42", "The final answer is: $\\boxed{18}$ dollars": "18", "答案是：１２３，不是4": "123",
    "答案：-3": "-3", "最终结果为 12 元，共 3 人": "12", "the answer is (72)": "72", "The answer is about $7.50 in 3 parts": "7.50",
    # what is meant for machines, before what is said
    "Answer: Natalia sold 48/2 = 24 clips in May, 48 + 24 = 72 in all.\n#### 72": "72", "Answer: First, 3 + 4 = 7. So \\boxed{14}": "14", "<answer>12</answer> (3 steps)": "12", "The answer is 5.\n#### 7": "7",
    "#### $1,234.50": "1234.50", "####12.": "12", "#### **72** clips": "72", "#### 72. That is 6 dozen.": "72", "#### Answer: 72": "72", "\\boxed{x=5}": "5",
    # headings and steps are none
    "#### Step 1: 5 apples\nThe answer is 12": "12", "#### 1. Add: 3+4=7\n#### 2. Double it: 14\nThe answer is 14": "14", "Answer:\n1. Add 3 and 4: 7\n2. Double it: 14": "14",
    # working
    "The answer is 5 x 10 = 50": "50", "The answer is 5 x 10 = 50. There are 3 boxes": "50", "#### 3+4=7": "7", "答案是 5×10=50（元）": "50", "The answer is $5 \\times 10 = 50$ dollars": "50",
    "The answer is 5 apples + 3 apples = 8 apples.": "8", "The answer is 50% of 20 = 10": "10", "The answer is 3 + 4. That is 7.": "7", "The answer is 1/2 = 0.5": "1/2", "The answer is 24 = 48/2": "24",
    "The answer is 3 + 4": None, "3 + 4": None, "10 - 3": None, "#### 3+4": None, "5^2": None,
    "答案：小明有 3+4=7 个苹果……答案是 14": "14", "Answer: John has 5 and Mary 3, so 8 in total.": "8", "Answer: Natalia sold 72 clips altogether.\nThat is 6 boxes": "72", "Answer:\n72\n\n48/2 = 24 in 2 months": "72",
    # denied, doubted
    "The answer is not 5 but 6": "6", "答案不是5，而是6": "6", "It is not 5": None, "It is not 1 3/4": None, "The answer is 5? No, it is 6": "6",
    # an announcement without a number is none
    "The answer is below.\nIt is 9": "9", "Answer: see 1.\n2": "1",
    # running on
    "It is 12.\n\nQuestion: 5 + 5?\n#### 10": "12", "I do not know.\n问题：1+1\n#### 2": None,
    "3 + 4 = 7\nQuestion: 5 + 5\n5 + 5 = 10": "7", "等于7\n问题：1+1\n2": "7",
    # reasoning, LaTeX, emphasis
    "<think>12 or 13</think>It is **13**": "13", "\\(x = 9\\)": "9", "$$x=\\text{8}$$": "8", "<think>12": None,
    # no number
    "": None, "no": None, "H2O": None, "NA": None, "v1.2.3": None, "x2": None, "9" * 100: None,
}  # fmt: skip


@pytest.mark.parametrize(("reply", "found"), HARD.items())
def test_hard_replies(reply: str, found: str | None) -> None:
    assert number(reply) == found


FORMS = ("{}", "{}.", "${}", "= {}", "#### {}", "\\boxed{{{}}}", "The answer is {}.", "答案：{}", "答案是{}元。", "**{}**", "({})")  # fmt: skip


@quick
@given(st.sampled_from(FORMS), st.integers(-(10**9), 10**9), st.booleans())
def test_every_whole_number_in_every_form(form: str, value: int, separated: bool) -> None:
    found = number(form.format(f"{value:,}" if separated else value))
    assert found is not None
    assert same(found, str(value))


@quick
@given(
    st.sampled_from(["#### {}", "\\boxed{{{}}}", "The answer is {}.", "答案：{}。", "<answer>{}</answer>", "Final answer: **{}** clips"]),
    st.sampled_from(["{0} + {1} = {2}", "{0}+{1}={2}", "{0} clips + {1} clips = {2} clips", "{2}", "${2}", "x = {2}"]),
    st.sampled_from(["", "First, 3 + 4 = 7.\n", "Answer: They sold 48/2 = 24 clips and 3 more.\n"]),
    st.integers(0, 10**6),
    st.integers(0, 10**6),
)  # fmt: skip
def test_working_is_no_answer(form: str, working: str, before: str, one: int, other: int) -> None:
    found = number(before + form.format(working.format(one, other, one + other)))
    assert found == str(one + other)


@quick
@given(st.sampled_from(FORMS), st.decimals(-(10**6), 10**6, places=2))
def test_decimals_stay_as_they_are_written(form: str, value: Decimal) -> None:
    found = number(form.format(f"{value:.2f}"))
    assert found is not None
    assert found.lstrip("-") == f"{abs(value):.2f}"
    assert same(found, str(value))


@quick
@given(st.text(max_size=60))
def test_any_reply_gives_a_number_or_nothing(reply: str) -> None:
    found = number(reply)
    assert found is None or isinstance(Fraction(found), Fraction)


@quick
@given(st.text("0123456789.,/-+eE万亿½ $%{}\\frac#", max_size=30))
def test_what_looks_like_a_number_is_one_or_is_none(reply: str) -> None:
    found = number(reply)
    assert found is None or same(found, found)


def test_values_are_compared_not_texts() -> None:
    assert same("1.10", "1.1")
    assert same("3/4", "0.75")
    assert same("2e3", "2000")
    assert not same("0.33", "1/3")
