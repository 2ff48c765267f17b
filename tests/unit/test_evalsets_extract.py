"""Finding the one option that a reply chooses, in replies as models really write them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evalsets.extract import letter, letters, named, number

HARD = {
    # bare letters, marks, cases, widths
    "B": "B", "b": "B", " B\n": "B", "B.": "B", "b)": "B", "(B)": "B", "[b]": "B", "**B**": "B", "`B`": "B", "Ｂ": "B", "（ｂ）": "B",
    "B. Paris": "B", "B: Paris": "B", "A.巴黎": "A", "B、巴黎": "B", "Option D": "D", "选项C": "C", "选B": "B",
    "$\\boxed{\\text{C}}$": "C", "So it is \\boxed{D}.": "D",
    # announcements
    "The answer is B.": "B", "Answer: b": "B", "Answer:\nB": "B", "The correct answer is (C) Paris": "C", "The correct option would be D": "D",
    "答案：c": "C", "答案:Ｃ": "C", "答案是 D。": "D", "答案为A": "A", "正确答案为：（Ａ）": "A", "故选D": "D", "我选择C。": "C", "本题应选B": "B",
    "The best choice would be option A.": "A", "the answer is a": "A", "I would go with C": "C", "I think it is B": "B", "I'd choose option B.": "B",
    # running on: what comes after the first explicit answer does not count
    "B\n\nQuestion: next\nAnswer: C": "B", "Answer: B\n\nQuestion: next\nAnswer: C": "B", "答案：A\n问题：下一题\n答案：B": "A",
    "B Question: y\nA. 1": "B", "A Question: y\nB. 1": "A", "A 因为最大": "A", "B, because A is too small": "B", "C. Paris\nD. London": "C",
    "I think B.\n\nQuestion: next\nAnswer: C": "B", "I do not know.\n\nQuestion: next\nAnswer: C": None,
    # denial
    "not B": None, "Not A, so B": "B", "B, not C": "B", "The answer is not B but C": "C", "答案不是B，是C": "C", "不选A，选C": "C",
    "B is wrong, C is right": "C", "It can't be A": None, "选项A错误，选项B正确，答案：B": "B", "我认为B是错的，应该选A": "A",
    "A is wrong. B is wrong. C is right.": "C", "B is not right. The answer is C": "C", "D rather than A": "D",
    "neither A nor B, so C": "C", "A is incorrect; B is incorrect; C is correct.": "C", "A：不对。B：正确。": "B", "不是A也不是B，而是D": "D", "排除A、B，选C": "C",
    "The answer is not A. It is D.": "D", "It isn't B": None, "Neither A nor B": None, "I choose B over A": "B", "B (not C)": "B",
    "A: wrong\nB: right": "B", "A - incorrect\nB - correct": "B", "A) wrong, B) right": "B", "A (wrong), B (right)": "B", "A: Wrong. B: Wrong. C: Right. D: Wrong.": "C",
    "A ❌ B ✅": "B", "A ×\nB √": "B", "A：错误\nB：正确": "B", "A项错误，C项正确": "C", "A不符合题意，B符合题意": "B", "B: wrong": None, "A: incorrectly stated": "A", "B: wrong turns cost time": "B",
    "C does not fit; D does": "D", "A is ruled out, so D": "D", "C is the wrong answer, B the right one": "B", "A cannot be correct; therefore D": "D", "neither C nor D, so A": "A", "B is right, A is wrong": "B",
    "Answer (A, B, C or D): C": "C", "Answer (A/B/C/D): b": "B", "答案（A、B、C或D）：D": "D", "(A, B, C)": None, "(A, B or C)?": None,
    "答案是B，不是A": "B", "选B，不是A": "B", "B，不是A": "B", "答案是B不是A": "B", "B，而不是A": "B", "The answer is B, is not A": "B", "The answer is B, isn't A": "B", "b, not a": "B",
    "答案：B，错误选项是A": "B", "应选C，错误的是D": "C", "错误的选项是B": "B", "A是错误选项，选C": "C", "A、B错误，选C": "C", "我认为是B，A错误": "B", "A不是，B是": "B",
    "A and B are wrong, so it must be C": "C", "I considered A and B. A is wrong.": "B", "A: no\nB: yes": "B", "A rather than B": "A",
    "C was my first thought, but B is right": "B", "B was the first to say so": "B",
    # the options once more, before the answer: alone they are none
    "A. x\nB. y\nC. z\nD. w\n\nThe answer is B": "B", "The options are:\nA. x\nB. y\nC. z\nD. w\nSo the answer is (C).": "C", "A. 红\nB. 黄\nC. 蓝\nD. 绿\n\n答案：D": "D",
    "A. x\nB. y\nC. z\nD. w": None, "A. x\nQuestion: next\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: D": "A", "A. x\nB. y\nAnswer: B": "B", "A. x\nB. y": None,
    "A. x\nB. y\nC. z\nD. w\n\nB. y": "B", "A. x\nB. y\nC. z\nD. w\n\nnot B": None, "A. x B. y C. z D. w\nB": "B", "A. x B. y C. z D. w The answer is B": "B", "A.红，B.黄，C.蓝，D.绿\n选B": "B",
    "A. (0, 1)\nB. (1, 2)\nC. (2, 3)\nD. (3, 4)\nC": "C", "A. x\nB. y\nC. z\nD. Both A and B\n\nD": "D", "A. x\nB. y\nC. z\nD. Both A and B": None,
    "A. x\nB. y\nC. z\nD. w\nQuestion: next\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: D": None, "Question: Which?\nA. x\nB. y\nC. z\nD. w\nAnswer: D": "D", "The answer is B.\n\nA. x\nB. y\nC. z\nD. w": "B",
    # doubt
    "A? No, B.": "B", "是B吗？不，是C。": "C", "The answer is A? No, C": "C", "B?": None,
    # marks of formats
    "__B__": "B", "_B_": "B", "# Answer\nB": "B", "**Answer**: B": "B", "The answer: option (b)": "B", "<answer>B</answer>": "B", "<answer>c</answer>": "C", "<Answer>\n(ｃ)\n</Answer>": "C", "【答案】Ｂ": "B",
    "The answer is 'C'.": "C", "The answer is ‘c’": "C", "I think 'C'": "C", "C's the one": None,
    "\\(\\boxed{D}\\)": "D", "\\mathbf{(A)}": "A", "答案是“B”": "B", "故答案为:Ｄ.": "D", "因此选择 B 项": "B", "Ｂ．巴黎": "B", "ANSWER: C": "C",
    "B_1": None, "snake_B_case": None, "BBBB": None,
    # undecided
    "": None, "Paris": None, "Either A or B": None, "A or B": None, "b or c": None, "B and C": None, "A/B": None, "The answer is A or B": None, "答案：B、C": None, "B, A is wrong": "B", "Answer: B, not C": "B", "A, B": None, "A, B, C, D": None,
    "ABCD": None, "I do not know.": None, "我不知道": None, "答案：": None,
    # letters that are words or parts of words
    "A dog is the answer": None, "A common mistake is C++. The answer is D": "D", "C++ is a language": None, "D'accord": None,
    "e.g. this": None, "a good question": None, "The answer is a dog": None, "A-level": None, "A is correct": "A", "a is correct": "A",
    # reasoning
    "<think>maybe A, or C</think>B": "B", "<think>A or B ...": None, "<THINK>A</THINK>\n\nThe answer is D": "D",
    "perhaps the answer is A? no\n</think>\nAnswer: B": "B", "<thought>A</thought>C": "C", "<reasoning>A": None,
}  # fmt: skip


FORMS = (
    "{}", "{}.", "({})", "**{}**", "Answer: {}", "The answer is {}.", "答案：{}", "答案是{}。", "故选{}", "我选{}", "\\boxed{{{}}}", "正确答案是（{}）",
)  # fmt: skip


@pytest.mark.parametrize(("reply", "chosen"), HARD.items())
def test_hard_replies(reply: str, chosen: str | None) -> None:
    assert letter(reply) == chosen


@pytest.mark.parametrize(
    "part",
    [
        "(",
        "*",
        "A, ",
        "answer: ",
        "答案是",
        "\\boxed{",
        "\n",
        "not B ",
        "<think>",
        "1,",
        "#### ",
        "#### 1+",
        "B. A, ",
        "A (x), ",
        "A. x\nB. y\n",
        "A and ",
    ],
)
def test_a_reply_that_repeats_itself_is_read_in_no_time(part: str) -> None:
    """Models do end in loops: what is cubic in their length would never return."""
    for read in (letter, letters, number):
        read(part * 3000)
    named(part * 3000, WORDS)


@given(
    st.permutations("ABCD"),
    st.sampled_from(["{}: {}", "{} - {}", "({}) {}", "{}. {}", "Option {} is {}"]),
    st.sampled_from(["\n", ", ", "; "]),
)
def test_who_judges_each_option_chooses_the_one_that_is_right(order: list[str], form: str, between: str) -> None:
    *wrong, right = order
    verdicts = [form.format(option, "right" if option == right else "wrong") for option in "ABCD"]
    assert letter(between.join(verdicts)) == right
    assert letters("\n".join(verdicts)) == right
    assert set(wrong) | {right} == set("ABCD")


BARE = (
    "{}. y",
    "{}，因为最大",
    "I think {}.",
    "So {} is correct.",
    "It must be {}, not E.",
    "<answer>{}</answer>",
    "“{}”",
)


@settings(deadline=None)
@given(
    st.sampled_from("ABCD"),
    st.lists(st.text("xyz 红1", min_size=1), min_size=4, max_size=4),
    st.sampled_from(FORMS + BARE),
    st.sampled_from(["{}. {}", "{}) {}", "({}) {}", "**{}.** {}", "- {}: {}", "{}、{}"]),
    st.sampled_from(["", "Let us see:\n", "Question: which?\n"]),
)
def test_who_repeats_the_options_chooses_what_comes_after(
    right: str, texts: list[str], form: str, item: str, heading: str
) -> None:
    listed = heading + "\n".join(item.format(option, text) for option, text in zip("ABCD", texts, strict=True))
    assert letter(f"{listed}\n\n{form.format(right)}") == right
    assert letters(f"{listed}\n\n{form.format(right)}") == right
    assert letter(listed) is None


def test_only_the_options_of_the_question_count() -> None:
    assert letter("E") is None
    assert letter("E", "ABCDE") == "E"
    assert letter("The answer is I", "ABCDEFGHIJ") == "I"
    assert letter("I think so", "ABCDEFGHIJ") is None


forms = st.sampled_from(FORMS)
options = st.sampled_from("ABCD")


@given(forms, options, st.sampled_from([str.upper, str.lower, lambda c: chr(ord(c) + 0xFEE0)]))
def test_every_form_in_every_case_and_width(form: str, option: str, written: object) -> None:
    assert callable(written)
    assert letter(form.format(written(option))) == option


@given(forms, options, st.text())
def test_what_a_model_adds_later_changes_nothing(form: str, option: str, more: str) -> None:
    assert letter(f"{form.format(option)}\n\nQuestion: {more}") == option


@given(
    st.text(
        st.characters(exclude_characters="abcdABCDａｂｃｄＡＢＣＤ", max_codepoint=0x9FFF, exclude_categories=["Cs"])
    )
)
def test_no_letter_no_answer(reply: str) -> None:
    import unicodedata

    plain = "".join(c for c in reply if not set("abcdABCD") & set(unicodedata.normalize("NFKC", c)))
    assert letter(plain) is None


@given(st.text())
def test_any_reply_gives_an_option_or_nothing(reply: str) -> None:
    assert letter(reply) in {None, *"ABCD"}


WORDS = {"A": "dirty", "B": "clean", "C": "nine", "D": "ninety nine"}


@pytest.mark.parametrize(
    ("reply", "chosen"),
    [
        ("clean", "B"),
        ("The opposite of dirty is clean.", "B"),
        ("The opposite of CLEAN is “Dirty”!", "A"),
        ("It is ninety nine.", "D"),
        ("It is ninety nine, I think", None),
        ("dirty or clean, hard to say", None),
        ("unclean", None),
        ("It is not clean.", None),
        ("Either dirty or clean", None),
        ("Dirty is wrong, clean is right.", "B"),
        ("Either A. dirty or B. clean", None),
        ("Not A: clean", "B"),
        ("A. dirty\nB. clean\nC. nine\nD. ninety nine", None),
        ("A. dirty\nB. clean\nC. nine\nD. ninety nine\nIt is clean.", "B"),
        ("", None),
    ],
)
def test_the_words_of_an_option(reply: str, chosen: str | None) -> None:
    assert named(reply, WORDS) == chosen


@pytest.mark.parametrize(
    ("reply", "chosen"),
    [
        ("dirty and clean", "AB"),
        ("Clean.", "B"),
        ("ninety nine", "D"),
        ("clean, not dirty", "B"),
        ("dirty or clean", None),
        ("B clean, D ninety nine, or all", None),
        ("nothing", None),
    ],
)
def test_the_words_of_several_options(reply: str, chosen: str | None) -> None:
    assert named(reply, WORDS, several=True) == chosen


def test_letters_in_the_words_of_an_option_are_words() -> None:
    assert named("Vitamin C and D", {"A": "vitamin C", "B": "vitamin C and D"}) == "B"


def test_the_words_of_an_option_in_chinese() -> None:
    options = {"A": "一月", "B": "十一月", "C": "五", "D": "十五"}
    assert named("十月之后是十一月。", options) == "B"
    assert named("三乘五等于十五", options) == "D"


@given(st.sampled_from("ABCD"), st.text(alphabet="xyz ", max_size=5))
def test_a_reply_that_ends_with_an_option_chooses_it(letter_: str, before: str) -> None:
    assert named(f"{before} {WORDS[letter_]}.", WORDS) == letter_
