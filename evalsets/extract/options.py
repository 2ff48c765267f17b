"""Which option a reply chooses, or which of them: the first explicit answer wins.

A model that answers right and then runs on into the next question is right; one that names no option, or weighs two
without deciding, gave no answer. Three readings are tried in turn: the reply begins with a letter; an announcement
("the answer is", "答案：", "故选") is followed by one; one capital letter alone is named and not denied. A reply
without a letter is read for the words of an option: those with which it ends, or the only ones that it has.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping

NEAR = 80
"""Characters around a letter in which it may be denied or doubted."""

THINKING = re.compile(
    r"<(think|thinking|thought|reasoning)>.*?(?:</\1>|\Z)|\A(?:(?!<think).)*?</think(?:ing)?>",
    re.DOTALL | re.IGNORECASE,
)
"""Reasoning, also where the prompt has its opening mark."""

OPEN = (
    r"[\s*_`'\"(\[{<“‘「『【《$]*+(?:\\(?:boxed|text|mathrm|mathbf)\{\s*+){0,4}+[\s*(]*+"
    r"(?:(?:option|choice)\s++|选项\s*+|选\s*+)?[*(“\"]*+"
)
"""What may stand before the letter: quotes, brackets, emphasis, LaTeX, the word "option"."""

END = r"(?!_*[A-Za-z0-9'’+#]|-[A-Za-z0-9]|\.[A-Za-z]\.)"
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
DENIED_AFTER = re.compile(
    MARKED_OFF + r"(?:(?:is|are|was|looks|seems)\s+(?:the\s+)?"
    r"(?:not|wrong|incorrect|false|impossible|ruled\s+out|excluded|eliminated)"
    r"|isn['’]t|does(?:n['’]t|\s+not)\s+(?:fit|work|apply|match)|can(?:['’]t|not)\s+be"
    r"|(?:wrong|incorrect|not\s+(?:right|correct))(?=\W*(?:$|\n|[A-Z]\b))"
    r"|是?(?:错|不对|不正确|不是|有误|不符合|不成立)|[×✗✘❌])",
    re.IGNORECASE,
)
AFFIRMED = re.compile(
    MARKED_OFF + r"(?:(?:is|are)\s+(?:right|correct)\b|(?:right|correct)(?=\W*(?:$|\n|[A-Z]\b))"
    r"|是?(?:正确|对(?![于应比象称]))|[√✓✔✅])",
    re.IGNORECASE,
)
DOUBTED = re.compile(r"[\s*_`'\")\]”’」]*(?:\?|吗|么)")
VERB = re.compile(r"\s+(?:is|because|since|as|seems|would|must|should)\b")
ANOTHER = re.compile(r"\s*(?:or|and|/|、|或|和|与)[\W_]*[A-Z]\b", re.IGNORECASE)
MARKS = re.compile(r"[*_`$\"'“”‘’「」『』《》()\[\]{}<>]")
"""What may stand around each letter of several."""
AMONG = (
    r"(?:\s*[,;、/&+\n]\s*(?:and\s+|or\s+)?|\s+(?:and|or)\s+|\s*[和与及]\s*|\s+(?=[A-Za-z](?![a-z])))"
    r"(?i:option\s+|选项)?"
)
"""What may stand between them."""
RUN_ON = re.compile(r"\n[ \t]*(?:Question|Q|Problem|Instruction|User|Human|问题|题目|用户)\s*\d*\s*:", re.IGNORECASE)
"""Where a model goes on with another question."""
UNDECIDED = re.compile(r"\s*(?:\bor\b|或)", re.IGNORECASE)
OFFERED = re.compile(r"\([A-J](?:\s*(?:,\s*(?:or\b)?|/|\bor\b|、|或)\s*[A-J]){2,}\)")
"""What a question offers, which a reply may repeat: `Answer (A, B, C or D): C`."""
LISTED = re.compile(r"\s*,\s*[A-Z]\s*(?:,|or\b|and\b|$)", re.IGNORECASE)


def letter(reply: str, letters: str = "ABCD") -> str | None:
    """The option that the reply chooses, in upper case, or None where it does not say."""
    text = OFFERED.sub("", unicodedata.normalize("NFKC", THINKING.sub(" ", reply))).strip()
    one = re.compile(f"{OPEN}([{letters}]){END}", re.IGNORECASE)
    after = text[_restated(text, letters) :]
    return (
        (_announced(after, one) if after != text else None)
        or _leading(text, one)
        or _announced(text, one)
        or _only(text, letters)
    )


def _restated(text: str, letters: str) -> int:
    """Where a list of all options ends with which the reply begins, perhaps under a heading; 0 where there is none."""
    lines = "".join(rf"[ \t]*[*_(]*{letter}[*_)]*[.:、)][^\n]*(?:\n\s*|\Z)" for letter in letters)
    found = re.match(rf"(?:[^\n]{{0,{NEAR}}}\n\s*)?{lines}", text)
    return found.end() if found else 0


def letters(reply: str, options: str = "ABCD") -> str | None:
    """The options that the reply chooses where several may be right, in alphabetical order; None where it names none.

    >>> letters("The correct options are **A**, C and (D), not B.")
    'ACD'
    """
    text = unicodedata.normalize("NFKC", THINKING.sub(" ", reply))
    text = MARKS.sub("", re.sub(r"\\(?:boxed|text|mathrm|mathbf)\b", "", text)).strip()
    one = f"[{options}{options.lower()}]"
    group = re.compile(rf"\s*(?i:options?\s+|choices?\s+|选项)?(?:[{options}]{{2,}}|{one}(?:{AMONG}{one})*){END}")
    for start in (0, *(found.end() for found in ANNOUNCED.finditer(text))):
        found = group.match(text, start)
        if found and not _a_word(found[0].strip(), _rest(text, found)) and not DENIED_AFTER.match(_rest(text, found)):
            if UNDECIDED.search(found[0]) or UNDECIDED.match(text, found.end()):
                return None
            if AFFIRMED.match(_rest(text, found)):
                run_on = RUN_ON.search(text, 1)
                return "".join(sorted(_standing(text[: run_on.start()] if run_on else text, options)))
            listed = re.findall(rf"^\s*([{options}])[.:)、]", text[start:], re.MULTILINE)
            chosen = {*_alone(found[0], options), *(listed if listed and found[0].strip() == listed[0] else ())}
            return "".join(sorted(chosen))
    undecided = re.search(rf"\b[{options}](?:\s+or\s+|\s*或\s*)[{options}]\b", text)
    return None if undecided else "".join(sorted(_standing(text, options))) or None


def _alone(group: str, letters: str) -> set[str]:
    """The letters of a group such as `A, c and D`, without those of its words."""
    return {c.upper() for c in re.sub(r"\b(?:and|or)\b", " ", group) if c.upper() in letters}


def _a_word(group: str, rest: str) -> bool:
    """Whether a single letter is an article or a pronoun."""
    return group in ("a", "A", "I") and _goes_on(rest)


def named(reply: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option whose words the reply gives, or None where none or several fit.

    >>> named("The opposite of dirty is clean.", {"A": "dirty", "B": "clean"})
    'B'
    """
    text = _plain(THINKING.sub(" ", reply))
    found = [
        (len(words), letter) for letter, option in options.items() if (words := _plain(option)) and _has(text, words)
    ]
    last = [(size, letter) for size, letter in found if text.endswith(_plain(options[letter]))]
    if last:  # "ninety nine" ends with "nine" too: the longest is meant
        return max(last)[1]
    return found[0][1] if len(found) == 1 else None


def _plain(text: str) -> str:
    """Small letters of one width, without the marks at both ends."""
    return unicodedata.normalize("NFKC", text).lower().strip(" \t\n.。!！?？,，;；:：\"'“”‘’*`()（）")


def _has(text: str, words: str) -> bool:
    """Whether `words` stand in `text`, not as a part of longer words or numbers."""
    return bool(re.search(rf"(?<![a-z0-9]){re.escape(words)}(?![a-z0-9])", text))


def _leading(text: str, one: re.Pattern[str]) -> str | None:
    """`B`, `b)`, `(B) because`, `**B**: ...`, and also `B Question: ...` of a model that runs on."""
    found = one.match(text)
    if not found:
        return None
    rest = _rest(text, found)
    maybe_word = found[1].islower() or found[1] in "AI"
    if _undecided(rest) or DENIED_AFTER.match(rest) or (maybe_word and _goes_on(rest)):
        return None
    return found[1].upper()


def _announced(text: str, one: re.Pattern[str]) -> str | None:
    """The letter after the first announcement that is followed by one."""
    for announcement in ANNOUNCED.finditer(text):
        found = one.match(text, announcement.end())
        if not found:
            continue
        rest = _rest(text, found)
        if not (found[1] in "aAI" and _goes_on(rest)) and not DENIED_AFTER.match(rest) and not DOUBTED.match(rest):
            return None if _undecided(rest) else found[1].upper()
    return None


def _only(text: str, letters: str) -> str | None:
    """The one capital letter that stands alone in the reply and is not denied; None where there are several."""
    named = _standing(text, letters)
    return named.pop() if len(named) == 1 else None


def _standing(text: str, letters: str) -> set[str]:
    """The capital letters that stand alone and are not denied."""
    named = set()
    for found in re.finditer(rf"(?<![A-Za-z0-9_'’.\-])[{letters}]{END}", text):
        before, rest = text[max(0, found.start() - NEAR) : found.start()], _rest(text, found)
        if not (
            (found[0] in "AI" and _goes_on(rest))
            or DENIED_BEFORE.search(before)
            or DENIED_AFTER.match(rest)
            or DOUBTED.match(rest)
        ):
            named.add(found[0])
    return named


def _rest(text: str, found: re.Match[str]) -> str:
    """What follows a letter, as far as it may say something of it."""
    return text[found.end() : found.end() + NEAR]


def _undecided(rest: str) -> bool:
    """Whether another letter follows, or a question mark."""
    return any(pattern.match(rest) for pattern in (ANOTHER, LISTED, DOUBTED))


def _goes_on(rest: str) -> bool:
    """Whether words follow as after an article or a pronoun, "A dog", and not as after an answer, "A is right"."""
    said = (VERB, ANOTHER, AFFIRMED, DENIED_AFTER)
    return bool(re.match(r"[ \t]+[a-z]", rest)) and not any(pattern.match(rest) for pattern in said)
