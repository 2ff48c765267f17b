"""Which option a reply chooses: the first explicit answer wins.

A model that answers right and then runs on into the next question is right; one that names no option, or weighs two
without deciding, gave no answer. Three readings are tried in turn: the reply begins with a letter; an announcement
("the answer is", "答案：", "故选") is followed by one; one capital letter alone is named and not denied. Where a reply
repeats the list of options, they are tried on what follows it: the list alone chooses nothing. A reply without a letter
is read for the words of an option: those with which it ends, or the only ones that it has.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping

from evalsets.extract.phrases import (
    ANNOUNCED,
    DENIED_AFTER,
    DENIED_BEFORE,
    DOUBTED,
    END,
    FIRST_THOUGHT,
    NEAR,
    OR_ANOTHER,
    around_list,
    following,
    goes_on,
    standing,
)
from evalsets.extract.reply import said

OPEN = (
    r"[\s*_`'\"(\[{<“‘「『【《$]*+(?:\\(?:boxed|text|mathrm|mathbf)\{\s*+){0,4}+[\s*(]*+"
    r"(?:(?:option|choice)\s++|选项\s*+|选\s*+)?[*(“\"]*+"
)
"""What may stand before the letter: quotes, brackets, emphasis, LaTeX, the word "option"."""
OFFERED = re.compile(r"\([A-J](?:\s*(?:,\s*(?:or\b)?|/|\bor\b|、|或)\s*[A-J]){2,}\)")
"""What a question offers, which a reply may repeat: `Answer (A, B, C or D): C`."""
LISTED = re.compile(r"\s*,\s*[A-Z]\s*(?:,|or\b|and\b|$)", re.IGNORECASE)
OR = re.compile(r"\bor\b|或")


def letter(reply: str, letters: str = "ABCD") -> str | None:
    """The option that the reply chooses, in upper case, or None where it does not say."""
    text = OFFERED.sub("", said(reply)).strip()
    one = re.compile(f"{OPEN}([{letters}]){END}", re.IGNORECASE)
    before, after = around_list(text, letters)
    for part in (before, after):
        if chosen := _leading(part, one, letters) or _announced(part, one):
            return chosen
    return _only(after, letters) or _only(text, letters)


def named(reply: str, options: Mapping[str, str], *, several: bool = False) -> str | None:
    """The letter of the option whose words the reply gives, or with `several` all of them; None where it is unclear.

    So is a reply that names letters too: who reads words there would decide between them.

    >>> named("The opposite of dirty is clean.", {"A": "dirty", "B": "clean"})
    'B'
    """
    letters = "".join(options)
    besides = " ".join(around_list(said(reply), letters))
    text = _plain(besides)
    found = {letter: words for letter, option in options.items() if (words := _plain(option)) and _says(text, words)}
    for words in sorted(found.values(), key=len, reverse=True):
        besides = re.sub(re.escape(words), " ", besides, flags=re.IGNORECASE)
    if any(standing(besides, letters)) or not found:
        return None
    if several:
        parts = {words for words in found.values() if any(words in other for other in found.values() if other != words)}
        return None if OR.search(text) else "".join(letter for letter, words in found.items() if words not in parts)
    last = [letter for letter, words in found.items() if text.endswith(words)]
    if last:  # "ninety nine" ends with "nine" too: the longest is meant
        chosen = max(last, key=lambda letter: len(found[letter]))
        return None if re.search(rf"(?:{OR.pattern})\W*$", text[: -len(found[chosen])]) else chosen
    return next(iter(found)) if len(found) == 1 else None


def _plain(text: str) -> str:
    """Small letters of one width, without the marks at both ends."""
    return unicodedata.normalize("NFKC", text).lower().strip(" \t\n.。!！?？,，;；:：\"'“”‘’*`()（）")


def _says(text: str, words: str) -> bool:
    """Whether `words` stand in `text` and are not denied, not as a part of longer words or numbers."""
    places = re.finditer(rf"(?<![a-z0-9]){re.escape(words)}(?![a-z0-9])", text)
    return any(
        not DENIED_BEFORE.search(text[max(0, found.start() - NEAR) : found.start()])
        and not DENIED_AFTER.match(text, found.end())
        for found in places
    )


def _leading(text: str, one: re.Pattern[str], letters: str) -> str | None:
    """`B`, `b)`, `(B) because`, `**B**: ...`, and also `B Question: ...` of a model that runs on."""
    found = one.match(text)
    if not found:
        return None
    rest = following(text, found)
    maybe_word = found[1].islower() or found[1] in "AI"
    if _undecided(rest) or DENIED_AFTER.match(rest) or FIRST_THOUGHT.match(rest) or (maybe_word and goes_on(rest)):
        return None
    second = rf"[*_)]*[.:、)][^\n]*\n\s*[*_(]*{letters[1:2]}[*_)]*[.:、)]"
    if found[1] == letters[0] and re.match(second, text[found.end() :]):
        return None  # a list of options begins
    return found[1].upper()


def _announced(text: str, one: re.Pattern[str]) -> str | None:
    """The letter after the first announcement that is followed by one."""
    for announcement in ANNOUNCED.finditer(text):
        found = one.match(text, announcement.end())
        if not found:
            continue
        rest = following(text, found)
        if not (found[1] in "aAI" and goes_on(rest)) and not DENIED_AFTER.match(rest) and not DOUBTED.match(rest):
            return None if _undecided(rest) else found[1].upper()
    return None


def _only(text: str, letters: str) -> str | None:
    """The one capital letter that stands alone in the reply and is not denied; None where there are several."""
    affirmed, others = standing(text, letters)
    return (affirmed | others).pop() if len(affirmed | others) == 1 else None


def _undecided(rest: str) -> bool:
    """Whether another letter follows, or a question mark."""
    return any(pattern.match(rest) for pattern in (OR_ANOTHER, LISTED, DOUBTED))
