"""The number that a reply answers with: after `####`, boxed or announced, where the first such counts; else its last.

A model that answers right and then runs on into another question is right. Numbers stay as they are written (1.10),
but for separators of thousands; `same` compares their values.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from evalsets.extract.options import RUN_ON, THINKING

_PLAIN = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
NUMBER = re.compile(
    rf"""(?<![A-Za-z_\d])(?<!\d\.)
    (?P<sign>(?<![\d)\]}}])[-+]\s?[$¥€£]?)?
    (?:(?P<whole>\d+)[ ]+(?=\d+/))?
    (?P<number>{_PLAIN})
    (?:(?P<exponent>[eE][-+]?\d{{1,2}})(?![\w]) | /(?P<below>\d*[1-9]\d*)(?![\d/]))?
    (?:[ ]?(?P<times>[万亿]))?""",
    re.VERBOSE,
)
FRACTION = re.compile(r"\\[dt]?frac\s*\{?\s*(-?\d+)\s*\}?\s*\{?\s*(\d+)\s*\}?")
MARKED = re.compile(
    r"""\#\#\#\#
      | \\boxed\s*\{
      | \b(?:final\s+|correct\s+)?answer\s*(?:is|:|=|to\s+be)+
      | 答案\s*(?:应该|应|就)?(?:是|为)?\s*:?
      | (?:最终|最后)?结果\s*(?:是|为|:)
    """,
    re.VERBOSE | re.IGNORECASE,
)
NEAR = re.compile(r"[^\d\n.。!?]{0,40}?")
"""What may stand between an announcement and its number: a few words, a currency, emphasis."""
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
    for marked in MARKED.finditer(text):
        found = NUMBER.search(text, marked.end(), marked.end() + 2 * LONGEST)
        if found and NEAR.fullmatch(text, marked.end(), found.start()) and (written := _written(found)):
            return written
    run_on = RUN_ON.search(text, 1)
    before = text[: run_on.start()] if run_on else text
    numbers = [written for found in NUMBER.finditer(before) if (written := _written(found))]
    return numbers[-1] if numbers else None


def same(one: str, other: str) -> bool:
    """Whether two numbers have one value: 1.10 is 1.1, and 0.75 is 3/4."""
    return Fraction(one) == Fraction(other)


def _plain(reply: str) -> str:
    """One width, ASCII signs, LaTeX without its marks inside numbers."""
    text = re.sub(r"(?<=\d)(?=[¼-¾⅐-⅞])", " ", THINKING.sub(" ", reply))  # 1½ is no 11/2
    text = (
        unicodedata.normalize("NFKC", text)
        .replace("⁄", "/")
        .replace("−", "-")
        .replace("–", "-")
        .replace("{,}", ",")
        .replace(r"\,", "")
        .replace(r"\!", "")
    )
    text = FRACTION.sub(r"\1/\2", text)
    return re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*\{|\*\*|\\?\$(?=\s*[-+]?\s*\d)|\\[()\[\]]", " ", text)


def _written(found: re.Match[str]) -> str | None:
    """A match as a number that `Fraction` reads; None for one that is too long to be meant."""
    if len(found[0]) > LONGEST:
        return None
    sign = "-" if found["sign"] and found["sign"].startswith("-") else ""
    plain = found["number"].replace(",", "")
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
