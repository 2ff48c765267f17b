"""The options of a multiple-choice row and which of them are right: in columns as in files, in lists as on hubs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from evalsets.sets.record import Record

LETTERS = "ABCDEFGHIJ"
ANSWERS = ("answer", "answerKey")
BETWEEN = set(",;、")
"""What may stand between the letters of several right answers, besides space."""
WITHHELD = ("", "-1")
"""What stands for an answer that nobody gives away, in files and, as a class, on hubs."""


@dataclass(frozen=True)
class Options:
    """The texts of two to ten options, and the letter of each by what an answer may call it, in capitals."""

    texts: tuple[str, ...]
    called: Mapping[str, str]

    @property
    def letters(self) -> str:
        """The letters under which they are listed, e.g. "ABCD"."""
        return LETTERS[: len(self.texts)]

    def right(self, row: Record, multiple: bool) -> str:
        """The right letters of the row in alphabetical order; raises SuiteError where it names none."""
        given = next((value for name in ANSWERS if (value := row.get(name))), "")
        named = "".join(map(str, given)) if isinstance(given, list) else str(given)
        right = set("".join(named.upper().split())) - BETWEEN
        if not right or not right <= self.called.keys():
            withheld = "the answers of a test split are often withheld: ask its val split"
            hint = withheld if given in WITHHELD else f"write one of {', '.join(self.called)}"
            raise row.error(f"answer is '{given}'", hint)
        if len(right) > 1 and not multiple:
            raise row.error(f"answer is '{given}'", "with several right options, set multiple = true")
        return "".join(sorted(self.called[name] for name in right))


def options(row: Record) -> Options:
    """Those in columns A, B, ..., read up to the first letter that is missing, or in a list `choices`.

    The list is of texts, whose answer is a letter or, as a class on Hugging Face is, a number from 0; or it is
    {"text": [...], "label": [...]}, and an answer is a label. Raises SuiteError with the row's place.
    """
    texts, called = _columns(row) if row.get("choices") is None else _listed(row)
    if len(texts) < 2:
        raise row.error("a question needs at least two options, in columns A, B, ... or in a list 'choices'")
    return Options(texts, called)


def _columns(row: Record) -> tuple[tuple[str, ...], dict[str, str]]:
    texts: list[str] = []
    for letter in LETTERS:
        if row.get(letter) in (None, ""):
            break
        texts.append(row.cell(letter))
    letters = LETTERS[: len(texts)]
    return tuple(texts), dict(zip(letters, letters, strict=True))


def _listed(row: Record) -> tuple[tuple[str, ...], dict[str, str]]:
    given = row.get("choices")
    labelled = isinstance(given, dict)
    texts, labels = (given.get("text"), given.get("label")) if labelled else (row.list("choices"), None)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise row.error("'choices' must hold texts", '["one", ...], or {"text": ["one", ...], "label": ["A", ...]}')
    if len(texts) > len(LETTERS):
        raise row.error(f"'choices' has {len(texts)} options, and at most {len(LETTERS)} can be asked")
    letters = LETTERS[: len(texts)]
    if not labelled:
        return tuple(texts), {letter: letter for letter in letters} | {
            str(i): letter for i, letter in enumerate(letters)
        }
    called = dict(zip(map(str.upper, map(str, labels or ())), letters, strict=False))
    if len(called) < len(texts) or any(len(label) != 1 for label in called):
        raise row.error("'choices' needs a label of one letter or digit for each text")
    return tuple(texts), called
