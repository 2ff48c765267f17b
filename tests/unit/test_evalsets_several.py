"""Finding the options that a reply chooses where several may be right: all of them, or none."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evalsets.extract import letters

LISTED = "A. x\nB. y\nC. z\nD. w\n\n"

SEVERAL = {
    # lists in every form
    "A, C": "AC", "AC": "AC", "ABD.": "ABD", "A and B are right": "AB", "a, c": "AC", "(A) (C)": "AC", "A和C": "AC", "A、B、D": "ABD", "Ａ，Ｃ": "AC", "A & D": "AD",
    "The correct options are **A**, C and (D), not B.": "ACD", "答案：A、C": "AC", "答案：ACD": "ACD", "选AB": "AB", "故选：BD": "BD", "\\boxed{A, C}": "AC",
    "C, A": "AC", "A. Paris\nC. London": "AC", "- A\n- C": "AC", "Both A and C": "AC", "A, A": "A", "ABCD": "ABCD", "Option A and option C": "AC",
    # one
    "B": "B", "The answer is A.": "A", "答案：B": "B",
    # letters with words
    "The correct options are B (foo) and D (bar).": "BD", "B. Paris and D. Rome": "BD", "正确选项为：B. 北京，D. 上海": "BD", "B: foo, D: bar": "BD", "(B) foo\n(D) bar": "BD",
    "The correct options are A (foo), C (bar)": "AC", "B) foo, D) bar": "BD", "B - foo, D - bar": "BD", "b. foo\nd. bar": "BD", "B、北京；D、上海": "BD", "选项B（北京）和选项D（上海）": "BD",
    "- **B. foo**\n- **D. bar**": "BD", "**B.** foo\n\n**D.** bar": "BD", "The correct answers are **B. foo** and **D. bar**.": "BD", "B (vitamin C) and D (bar)": "BD", "B (a cat) and C (a dog)": "BC",
    "B. foo is big.\nD. bar is small.": "BD", "B (a cat)": "B", "The answer is B. foo": "B", "I choose B (foo) and D (bar).": "BD",
    # of whom more may be meant
    "B Paris and D Rome": None, "B. Paris. D. Rome.": None, "Answer: B, A is too small": None, "Answer: A (x) or C (y)": None, "B. foo\nD. bar\n\nToo small:\nA. baz\nC. qux": None,
    "B (foo) is correct, D (bar) is wrong": None, "(B) foo is correct\n(D) bar is wrong": None, "The answer is B (foo). I excluded A (baz) and C (qux).": None, "答案：A. 北京 C. 上海": None,
    # what is said of others
    "The answer is B. A is too small.": "B", "The answer is A. B is too small and C is too large.": "A", "Answer: B, since A and C are too small": "B", "Answer: B, C because A is too small": "BC",
    "Answer: A, C. B and D are too small": "AC", "Answer: B, D\n\nA. baz is too small.\nC. qux is too big.": "BD", "B and D, not A and C": "BD", "答案：B、C，错误的是A、D": "BC", "(B), (D)，其他选项错误。": "BD",
    # the options once more
    f"{LISTED}Answer: B, D": "BD", f"{LISTED}B, D": "BD", f"{LISTED}Both B and D": "BD", f"Question: which?\n{LISTED}B. y\nD. w": "BD", "A.红，B.黄，C.蓝，D.绿\n选B、D": "BD", LISTED: None, f"The options are:\n{LISTED}": None,
    f"The correct options are:\n{LISTED}": "ABCD", "(A), (B), (C), (D)": "ABCD", "A. x\nB. y": "AB", f"The answers are B and D.\n\n{LISTED}": "BD",
    # marks of formats
    "<answer>AC</answer>": "AC", "<answer>a, c</answer>": "AC", "\\boxed{\\text{AC}}": "AC", "(AC)": "AC",
    # running on, reasoning, denial
    "Answer: A,B\n\nQuestion: x\nAnswer: C": "AB", "<think>A</think>B C": "BC", "A、B、D正确，C错误": "ABD", "A是错的，B、C对": "BC",
    # a verdict on each
    "A: right\nB: wrong\nC: right\nD: wrong": "AC", "A正确，B错误，C正确": "AC", "A ✓ B ✗ C ✓": "AC", "A is right.\n\nQuestion: is C?": "A", "C is correct": "C",
    "A: true\nB: false\nC: true\nD: false": "AC", "A and C are correct, B and D are wrong": "AC", "A、B正确，C、D错误": "AB", "A,B,D正确，C错误": "ABD", "A、B都错，C对": "C", "B and D are correct; A (foo) isn't": "BD",
    "A: right\nB: right\nC: right\nD: right": "ABCD", "a, c are correct": "AC",
    # undecided, or none
    "A or B": None, "A或B": None, "The answer is either A or C": None, "A dog": None, "I do not know": None, "": None, "不知道": None, "Bad question": None, "add": None,
}  # fmt: skip


@pytest.mark.parametrize(("reply", "chosen"), SEVERAL.items())
def test_several_letters(reply: str, chosen: str | None) -> None:
    assert letters(reply) == chosen


@settings(deadline=None, max_examples=50)
@given(
    st.sets(st.sampled_from("ABCDEFGHIJ"), min_size=1),
    st.sampled_from([", ", "、", "", " and ", "和", "; ", "\n"]),
    st.sampled_from(
        ["{}", "Answer: {}", "答案：{}", "The correct options are {}.", "\\boxed{{{}}}", "**{}**", "（{}）"]
    ),
)
def test_several_letters_in_every_form(chosen: set[str], between: str, form: str) -> None:
    right = "".join(sorted(chosen))
    assert letters(form.format(between.join(right)), "ABCDEFGHIJ") == right


@settings(deadline=None, max_examples=50)
@given(st.text())
def test_any_reply_gives_some_options_or_nothing(reply: str) -> None:
    found = letters(reply)
    assert found is None or (found and set(found) <= set("ABCD") and list(found) == sorted(set(found)))


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.sampled_from("ABCD"), min_size=2, max_size=3, unique=True),
    st.sampled_from(["{} (foo)", "{}: foo", "{}) foo", "({}) foo", "{}. foo", "**{}.** foo", "选项{}（北京）", "{}、北京"]),
    st.sampled_from([", ", " and ", "\n", "；", "，", "\n- "]),
    st.sampled_from(["{}", "Answer: {}", "答案：{}", "The correct options are {}.", f"{LISTED}{{}}", "<answer>{}</answer>"]),
    st.sampled_from(["", "\n\nI hope this helps.", "\n\nQuestion: next\nAnswer: A", ". The others are too small."]),
)  # fmt: skip
def test_letters_with_words_are_read_whole(chosen: list[str], item: str, between: str, form: str, more: str) -> None:
    reply = form.format(between.join(item.format(option) for option in sorted(chosen))) + more
    assert letters(reply) == "".join(sorted(chosen))
