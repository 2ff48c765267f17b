"""How replies speak of options: they announce, affirm, deny and doubt them, and repeat the list."""

from __future__ import annotations

import re
from functools import cache

NEAR = 80
"""Characters around a letter in which it may be denied or doubted."""
LONGEST = 300
"""Characters of an option that is repeated."""

END = r"(?!_*(?:[A-Za-z0-9+#]|['’][A-Za-z])|-[A-Za-z0-9]|\.[A-Za-z]\.)"
"""The letter is not the beginning of a word, a contraction, C++, A-level or e.g."""

ANNOUNCED = re.compile(
    r"""\b(?:answers?|choices?|options?|solution)\s*(?:should\s+be|would\s+be|must\s+be|is|are|:|=|->)+
      | \b(?:answer|go|choose|pick|select|chose|picked|selected)\s+(?:with\s+)?(?=[\W_]*(?:option\s+|choice\s+)?[A-Z]\b)
      | (?:答案|选项)\s*(?:应该|应当|应|就|便)?(?:是|为|选|选择)?\s*:?
      | (?<![不别没])选(?:择|(?!项))\s*:?
      | \\boxed(?=\{)
    """,
    re.VERBOSE | re.IGNORECASE,
)
DENIED_BEFORE = re.compile(
    r"(?:\b(?:not|neither|nor|none\s+of|isn['’]?t|never|can(?:no|['’])t\s+be|than|rule\s+out|exclude|eliminate)\b|不是|并非|不选|不为|而非|排除)"
    r"[\s*_`'\"(\[“‘「]*(?:(?:option|choice)\s+|选项\s*)?$",
    re.IGNORECASE,
)
MARKED_OFF = r"[\s*_`'\")\]”’」.:,、(\-–—]*(?:选项|项)?\s*"
"""What may stand between a letter and what is said of it."""
ANOTHER = r"[\s*_`'\"(“‘「:]{0,3}(?:option\s+|选项)?(?-i:[A-J])(?![A-Za-z0-9])"
"""In `B，不是A` and `B, is not A` the words that follow B are about A; so are they in `B，错误的是A`."""
DENIED_AFTER = re.compile(
    MARKED_OFF + r"(?:(?:is|are|was|looks|seems)\s+(?:the\s+|all\s+|both\s+)?"
    rf"(?:not(?!{ANOTHER})|wrong|incorrect|false|impossible|ruled\s+out|excluded|eliminated)"
    rf"|isn['’]t(?!{ANOTHER})|do(?:es)?(?:n['’]t|\s+not)\s+(?:fit|work|apply|match)|can(?:['’]t|not)\s+be"
    r"|(?:wrong|incorrect|false|no|not\s+(?:right|correct))\b(?=\W*(?:$|\n|[A-Z]\b))"
    rf"|(?:都|均|皆)?(?:不是(?!{ANOTHER})|是?(?:错|不对|不正确|有误|不符合|不成立)"
    rf"(?!误?(?:题意)?的?(?:选项|答案|项|(?<=的))(?:是|为|有|:){ANOTHER})|[×✗✘❌]))",
    re.IGNORECASE,
)
AFFIRMED = re.compile(
    MARKED_OFF + r"(?:(?:is|are)\s+(?:also\s+|both\s+|all\s+)?(?:right|correct|true)\b(?!\s*\?)"
    r"|(?:right|correct|true|yes)\b(?=\W*(?:$|\n|[A-Z]\b))(?!\s*\?)"
    r"|[也都均皆]?是?(?:正确|对(?![于应比象称]))(?!吗|\?)|[√✓✔✅])",
    re.IGNORECASE,
)
DOUBTED = re.compile(r"[\s*_`'\")\]”’」]*(?:\?|吗|么)")
FIRST_THOUGHT = re.compile(r"\s+(?:was|seemed|looked)\b[^.\n]*\b(?:but|however|though|until)\b", re.IGNORECASE)
"""`C was my first thought, but` takes C back."""
VERB = re.compile(r"\s+(?:is|because|since|as|seems|would|must|should|was|seemed|looked|rather|over|not)\b")
OR_ANOTHER = re.compile(r"\s*(?:or|and|/|、|或|和|与)[\W_]*[A-Z](?![A-Za-z0-9])", re.IGNORECASE)
AMONG = (
    r"(?:\s*[,;、/&+]\s*(?:and\s+|or\s+)?|\s+(?:and|or)\s+|\s*[和与及]\s*|[ \t]+(?=\(?[A-Za-z](?![a-z]))"
    r"|\s*\n\s*(?:[-•]\s*)?(?=\(?[A-Za-z]\)?[.。]?\s*(?:\n|\Z)))(?i:option\s+|选项)?"
)
"""What may stand between the letters of several."""
TOGETHER = re.compile(MARKED_OFF + r"(?:are|were|do|don['’]t|都|均|皆)", re.IGNORECASE)
"""What is said after `A, B` of both."""
ALONE = re.compile(MARKED_OFF + r"(?:is|isn['’]t|was|does|doesn['’]t|looks|seems)\b", re.IGNORECASE)


def standing(text: str, letters: str) -> tuple[set[str], set[str]]:
    """The capital letters that a reply says are right, and those that it names and neither affirms nor denies.

    What is said of `A and B` holds for both; in `B, A is wrong` it holds for A only.
    """
    affirmed, others, denied = set[str](), set[str](), set[str]()
    for found in re.finditer(
        rf"(?<![A-Za-z0-9_.\-])(?<![A-Za-z]['’])[{letters}]{END}(?:{AMONG}[{letters}]{END})*", text
    ):
        group = re.findall(f"[{letters}]", found[0])
        rest = following(text, found)
        if group[-1] in "AI" and goes_on(rest):
            group.pop()
        if not group or DOUBTED.match(rest) or FIRST_THOUGHT.match(rest):
            continue
        whole = TOGETHER.match(rest) or not (re.search(r"[,;\n]", found[0]) or ALONE.match(rest))
        wrong = set[str]()
        if DENIED_BEFORE.search(text[max(0, found.start() - NEAR) : found.start()]):
            wrong.update(group if whole else group[:1])
        if DENIED_AFTER.match(rest):
            wrong.update(group if whole else group[-1:])
        denied |= wrong
        (affirmed if AFFIRMED.match(rest) else others).update(set(group) - wrong)
    return affirmed - denied, others - denied


@cache
def _list(letters: str) -> re.Pattern[str]:
    """All options one after the other, each behind its letter."""
    marked = {letter: rf"[-*_( \t]*{letter}[*_)]*[.:、)](?![ \t]*(?:[,;]|\(?[{letters}][.:)]))" for letter in letters}
    first, *others = (marked[letter] for letter in letters)
    gaps = "".join(rf"(?>[\s\S]{{0,{LONGEST}}}?(?=[\s,;]{mark}))[\s,;]{mark}" for mark in others)
    return re.compile(rf"(?:^|[\n:])\s*{first}{gaps}")


def around_list(text: str, letters: str) -> tuple[str, str]:
    """What stands before and after a list of all options that a reply repeats; nothing and all where it has none."""
    found = _list(letters).search(text)
    if not found:
        return "", text
    line = text.find("\n", found.end())
    end = len(text) if line < 0 else line
    announced = ANNOUNCED.search(text, found.end(), end)
    return text[: found.start()], text[announced.start() if announced else end :].strip()


def following(text: str, found: re.Match[str]) -> str:
    """What follows a letter, as far as it may say something of it."""
    return text[found.end() : found.end() + NEAR]


def goes_on(rest: str) -> bool:
    """Whether words follow as after an article or a pronoun, "A dog", and not as after an answer, "A is right"."""
    said = (VERB, OR_ANOTHER, AFFIRMED, DENIED_AFTER)
    return bool(re.match(r"[ \t]+[a-z]", rest)) and not any(pattern.match(rest) for pattern in said)
