r"""The number that a reply answers with.

Four readings are tried in turn, from what is meant for machines to what is only likely: after `####`, as in GSM8K; in
`\boxed{}`; announced ("the answer is", "答案："); the last one. Within each the first counts, for a model that answers
right and then runs on is right. `5 x 10 = 50` is read as 50, and an announcement with which working begins ("Answer:
First, 3 + 4 = 7.") is none. Numbers stay as they are written (1.10), but for separators of thousands; `same` compares
their values.
"""

from __future__ import annotations

import re
from fractions import Fraction

from evalsets.extract.reply import said

_PLAIN = r"(?:\d{1,3}(?:,\d{3}|[ ]\d{3}(?![\d/%]))+(?!\d)|\d{1,2}(?:,\d\d)+,\d{3}(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = rf"""(?<![A-Za-z_\d])(?<!\d\.)
    (?P<sign>(?<![\d)\]}}])[-+]\s?[$¥€£]?)?
    (?:(?P<whole>\d+)[ ]+(?=\d+/))?
    (?P<number>{_PLAIN})
    (?:(?P<exponent>[eE][-+]?\d{{1,2}})(?![\w]) | /(?P<below>\d*[1-9]\d*)(?![\d/]))?
    (?:[ ]?(?P<times>[万亿]))?"""
NUMBER = re.compile(_NUMBER, re.VERBOSE)
FRACTION = re.compile(r"\\[dt]?frac\s*\{?\s*(-?\d+)\s*\}?\s*\{?\s*(\d+)\s*\}?")
HASHES = re.compile(r"\#\#\#\#")
BOXED = re.compile(r"\\boxed\s*\{")
WORDS = re.compile(
    r"""\b(?:final\s+|correct\s+)?answer\s*(?:is|:|=|to\s+be)+
      | 答案\s*(?:应该|应|就)?(?:是|为)?\s*:?
      | (?:最终|最后)?结果\s*(?:是|为|:)
    """,
    re.VERBOSE | re.IGNORECASE,
)
ANSWER = re.compile(
    rf"""(?P<between>(?:[\s$¥€£*_"'“‘:=~≈({{] | [A-Za-z]\s*=
      | (?<![A-Za-z])(?:about|approximately|around|roughly|simply|just|exactly|only|thus|therefore|but|equal\s+to)\b
      | 而是|大约|约|一?共|总共|等于
    ){{0,40}}+){_NUMBER}""",
    re.VERBOSE | re.IGNORECASE,
)
"""A number after what may stand between it and its announcement."""
ENDS = re.compile(r"[\n。!?]|\.(?!\d)")
STEP = re.compile(r"[.):]\s+\S")
"""What follows the number of a step: `#### 1. Add them`."""
STEPS = re.compile(r"(?:####|\n)\s*1[.):]\s+\S")
OPERATOR = r"(?:[-+*/×÷^]|x(?=\s*\d)|\\(?:times|cdot|div)\b)"
OPERAND = re.compile(rf"\s*(?:{OPERATOR}\s*[$¥€£(]*\d|(?:%|[^\W\d]+)?\s*(?:{OPERATOR}|of\b)\s*[$¥€£(]*\d[^=≈\n]*[=≈])")
"""What follows a number with which something is worked out: `5 x 10`, `5 apples + 3 apples =`, `50% of 20 =`."""
WORKED_OUT = re.compile(r"\d\s*(?:[+*×÷^]|\s-\s|\bx|\\(?:times|cdot|div))\s*$")
DENIED = re.compile(
    rf"(?:\b(?:not|isn['’]t|rather\s+than|instead\s+of)\b|不是|而非)\s*[$¥€£*]*"
    rf"(?:\d+[ ]+(?=\d+/))?(?:{_PLAIN})(?:/\d+|[ ]?[万亿])?"
)
TIMES = {"万": 10**4, "亿": 10**8}
LONGEST = 60
"""Digits of a number that anybody means."""


def number(reply: str) -> str | None:
    r"""The number that the reply answers with, or None where it has none.

    >>> number("She pays 3 x $1,200.50 = $3,601.50 in all.")
    '3601.50'
    >>> number(r"so \boxed{\frac{3}{4}} of it")
    '3/4'
    """
    text = _plain(reply)
    for marks in (HASHES, BOXED, WORDS):
        for mark in marks.finditer(text):
            if written := _announced(text, mark.end(), sentence=marks is WORDS):
                return written
    numbers = [(found.start("number"), written) for found in NUMBER.finditer(text) if (written := _written(found))]
    start, last = numbers[-1] if numbers else (0, None)
    return None if WORKED_OUT.search(text[max(0, start - LONGEST) : start]) else last


def _announced(text: str, start: int, *, sentence: bool) -> str | None:
    """The number that follows an announcement directly, worked out, or is the only one of the `sentence` that follows.

    None where it is an operand, a step or doubted, or where the sentence has several: then working begins there.
    """
    found = ANSWER.match(text, start)
    if not found:
        numbers = list(NUMBER.finditer(_sentence(text, start))) if sentence else []
        return _written(numbers[0]) if len(numbers) == 1 else None
    if text.startswith("?", found.end()):
        return None
    if OPERAND.match(text, found.end()):
        _, *results = re.split("[=≈]", _sentence(text, found.end()))
        result = ANSWER.match(results[-1]) if results else None
        return _written(result) if result else None
    return None if STEP.match(text, found.end()) and STEPS.search(text) else _written(found)


def _sentence(text: str, start: int) -> str:
    """The rest of a sentence, as far as anybody would look."""
    return ENDS.split(text[start : start + 3 * LONGEST], maxsplit=1)[0]


def same(one: str, other: str) -> bool:
    """Whether two numbers have one value: 1.10 is 1.1, and 0.75 is 3/4."""
    return Fraction(one) == Fraction(other)


def _plain(reply: str) -> str:
    """ASCII signs, LaTeX without its marks inside numbers, no number that a reply says it does not mean."""
    text = said(reply).replace("⁄", "/").replace("−", "-").replace("–", "-")
    text = text.replace("{,}", ",").replace(r"\,", "").replace(r"\!", "")
    text = FRACTION.sub(r"\1/\2", text)
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*\{|\*\*|\\?\$(?=\s*[-+]?\s*\d)|\\[()\[\]]", " ", text)
    return DENIED.sub(" ", text)


def _written(found: re.Match[str]) -> str | None:
    """A match as a number that `Fraction` reads; None for one that is too long to be meant."""
    if sum(len(part or "") for part in found.group("whole", "number", "below")) > LONGEST:
        return None
    sign = "-" if found["sign"] and found["sign"].startswith("-") else ""
    plain = re.sub("[, ]", "", found["number"])
    plain = "0" + plain if plain.startswith(".") else plain
    if found["below"] and "." not in plain:
        if found["whole"]:
            plain = str(int(found["whole"]) * int(found["below"]) + int(plain))
        plain = f"{plain}/{found['below']}"
    elif found["exponent"]:
        plain += found["exponent"]
    if found["times"]:
        plain = str(Fraction(plain) * TIMES[found["times"]])
    return sign + plain
