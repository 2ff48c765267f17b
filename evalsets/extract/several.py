r"""Which options a reply chooses where several may be right: all that it names in its first explicit answer, or none.

An answer is a group of letters (`A, C`, `AC`, `A and C`) with which the reply begins or that it announces, or letters
that each have words (`B (foo) and D (bar)`, `B. foo\nD. bar`). A verdict on each option is read as such. Whose answer
may have more letters than are understood is not read: half an answer is another answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from evalsets.extract.phrases import (
    AFFIRMED,
    AMONG,
    ANNOUNCED,
    DENIED_AFTER,
    END,
    around_list,
    following,
    goes_on,
    standing,
)
from evalsets.extract.reply import said

MARKS = re.compile(r"[*_`$\"'“”‘’「」『』《》\[\]{}<>]|\\(?:boxed|text|mathrm|mathbf)(?=\{)")
"""What may stand around each letter of several; round brackets may stand around an option's words too."""
UNDECIDED = re.compile(r"\s*(?:\bor\b|或)", re.IGNORECASE)
CLAIMED = re.compile(r"(?:answers?|correct|right|true|正确|答案)[^\n?]*$", re.IGNORECASE)
"""A heading under which a list of all options is an answer."""
ITEM = re.compile(r"[A-Za-z][ \t]*([.:、()]|(?<=\s)[-–—](?=\s))(?=[ \t]*[^\s.,;:。])")
"""A letter with words; the mark between them is the same for all."""
OPTION = r"(?:(?i:option|choice)\s+|选项\s*)?"
BESIDE = rf"(?:[,;、/&+]\s*(?:and\s+)?|\band\s+|[和与及]\s*){OPTION}\(?"
BELOW = rf"\n\s*(?:[-•]\s*)?{OPTION}\(?"
ENDS = re.compile(r"(?<!(?<![A-Za-z])[A-J])[.!?。](?=\s|$)|\n|其他|其余|\b(?:others?|rest)\b")
STOP = re.compile(
    rf"{ENDS.pattern}|\b(?:because|since|as|but|while|whereas|however|not|wrong|incorrect)\b|因为|由于|而|但|不|错"
)
"""Where something else is said than which options are right."""
WRONG = re.compile(r"(?:\b(?:wrong|incorrect|false|not (?:right|correct))|错误?|不正确|不对)\W*(?:[,;\n]|$)")
CLAUSE = re.compile(r"\s+(?:is|are|was|were|do|does)\b")
"""`Answer: A, C is too small`: whose letters are a group, and whose are not, is unclear."""


def letters(reply: str, options: str = "ABCD") -> str | None:
    """The options that the reply chooses where several may be right, in alphabetical order; None where it names none.

    >>> letters("The correct options are **A**, C and (D), not B.")
    'ACD'
    """
    text = MARKS.sub("", re.sub(r"\\boxed(?=\{)", "\nAnswer: ", said(reply))).strip()
    before, after = around_list(text, options)
    for part in (before, after):
        if (explicit := _explicit(part, options)) is not None:
            return "".join(sorted(explicit)) or None
    if re.search(rf"\b[{options}](?:\s+or\s+|\s*或\s*)[{options}]\b", after):
        return None
    affirmed, others = standing(after, options)
    if not affirmed and not others:
        affirmed, others = standing(text, options)
        if len(others) == len(options) and not CLAIMED.search(before):
            return None
    return "".join(sorted(affirmed or others)) or None


def _explicit(text: str, options: str) -> set[str] | None:
    """The first explicit answer, empty where it is undecided or not understood; None where there is none."""
    upper, lower = (rf"(?:\([{some}]\)|[{some}]{END}\)?)" for some in (options, options.lower()))
    group = re.compile(
        rf"\s*(?:[-•]\s+)?(?i:options?\s+|choices?\s+|选项)?"
        rf"(?:\(?[{options}]{{2,}}{END}\)?|{upper}(?:{AMONG}{upper})*|{lower}(?:{AMONG}{lower})*)"
    )
    for start in (0, *(found.end() for found in ANNOUNCED.finditer(text))):
        found = group.match(text, start)
        if not found:
            continue
        rest = following(text, found)
        chosen = re.findall(f"[{options}]", re.sub(r"\b(?:and|or|options?)\b", "", found[0], flags=re.I).upper())
        if (found[0].strip() in ("a", "A", "I") and goes_on(rest)) or DENIED_AFTER.match(rest):
            continue
        if UNDECIDED.search(found[0]) or UNDECIDED.match(rest):
            return set()
        if AFFIRMED.match(rest):
            return standing(text, options)[0] or set(chosen)
        if re.search(r"[,\n]", found[0]) and CLAUSE.match(rest):
            return set()
        return _with_words(text, found.end(), set(chosen), options)
    return None


def _with_words(text: str, end: int, chosen: set[str], options: str) -> set[str]:
    """The letters of a group that ends at `end`, and those that follow with words; empty where others may be meant."""
    last = end - 1 - (text[end - 1] == ")")
    item = ITEM.match(text, last)
    mark = item[1] if item and not (len(chosen) > 1 and item[1] == ")") else ""
    some = options if text[last].isupper() else options.lower()
    letter = rf"([{some}])[ \t]*{re.escape(mark)}(?=[ \t]*\S)"
    named = list(_items(text, end, letter)) if mark else []
    chosen |= {found[1].upper() for found in named if not DENIED_AFTER.match(text, found.end(1))}
    begin, end = end, named[-1].end() if named else end
    if (named or mark not in ("", ".")) and WRONG.search(text, begin, _first(ENDS, text, end + 1)):
        return set()
    at_the_end = r"(?=\W*$)" if mark == "." else ""  # for this mark may have ended the answer
    unread = re.compile(rf"(?:{BESIDE}|\bor\s+\(?|或\s*)([{some}]){END}{at_the_end}")
    later = re.compile(rf"[\s(]{letter}" if mark else r"(?!)")
    after = (*unread.finditer(text, end, _first(STOP, text, end + len(mark))), *later.finditer(text, end))
    more = {found[1].upper() for found in after if not DENIED_AFTER.match(text, found.end(1))}
    return chosen if more <= chosen else set()


def _items(text: str, end: int, letter: str) -> Iterator[re.Match[str]]:
    """The letters with words that follow: in the same sentence, and at the beginning of the lines below it."""
    beside, below = re.compile(BESIDE + letter), re.compile(rf"[^\n]*{BELOW}{letter}")
    stop = _first(STOP, text, end + 1)
    while True:
        found = beside.search(text, end, stop)
        if not found and (found := below.match(text, end)):
            stop = _first(STOP, text, found.end())
        if not found:
            return
        yield found
        end = found.end()


def _first(pattern: re.Pattern[str], text: str, start: int) -> int:
    """Where a pattern is found first; the end of the text where it is not."""
    found = pattern.search(text, start)
    return found.start() if found else len(text)
