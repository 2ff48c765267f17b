"""Instructions that a program can verify, as in IFEval (arXiv:2311.07911), with rules of our own for two languages.

Each rule is a class whose fields are the keys of a check: `{"rule": "words", "most": 5}`. A Chinese character is a
word, so limits mean the same length in both languages.
"""

from __future__ import annotations

import json
import re
import unicodedata
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from evalsets.language import CHINESE
from suite.config import Config, Where, parse
from suite.errors import SuiteError, near

WORD = re.compile(
    r"[\u3400-\u4dbf\u4e00-\u9fff]|[^\W_\u3400-\u4dbf\u4e00-\u9fff]+(?:['’-][^\W_\u3400-\u4dbf\u4e00-\u9fff]+)*"
)
SENTENCE_END = re.compile(r"[.!?](?!\w)|[。！？\n]")
ITEM = re.compile(r"^\s*(?:[-*•]|\d+[.)、])\s*\S", re.MULTILINE)


class Rule(Config):
    """One thing that a reply must keep."""

    @abstractmethod
    def kept(self, reply: str) -> bool:
        """Whether `reply`, without white space around it, keeps the rule."""


class Count(Rule):
    """A number of somethings, from `least` to `most`."""

    least: int = 0
    most: int | None = None

    @abstractmethod
    def count(self, reply: str) -> int:
        """How many there are."""

    def kept(self, reply: str) -> bool:
        return self.least <= self.count(reply) and (self.most is None or self.count(reply) <= self.most)


class Words(Count):
    """Words, and Chinese characters."""

    def count(self, reply: str) -> int:
        return len(WORD.findall(reply))


class Sentences(Count):
    """Sentences, ended by a mark or a line."""

    def count(self, reply: str) -> int:
        return sum(bool(WORD.search(part)) for part in SENTENCE_END.split(reply))


class Items(Count):
    """Lines of a list, with a bullet or a number."""

    def count(self, reply: str) -> int:
        return len(ITEM.findall(reply))


class Times(Count):
    """How often `text` occurs, in small letters or large."""

    text: str

    def count(self, reply: str) -> int:
        return reply.lower().count(self.text.lower())


class Json(Rule):
    """Nothing but JSON, an object with all `keys` if there are any; a fence of Markdown around it is not JSON."""

    keys: list[str] = Field(default=[])

    def kept(self, reply: str) -> bool:
        try:
            value = json.loads(reply)
        except (ValueError, RecursionError):
            return False
        return not self.keys or (isinstance(value, dict) and set(self.keys) <= set(value))


class Contains(Rule):
    """All `texts`, in small letters or large."""

    texts: list[str]

    def kept(self, reply: str) -> bool:
        return all(text.lower() in reply.lower() for text in self.texts)


class Without(Rule):
    """None of `texts`, in small letters or large, of full width or half: "," stands for "，" too."""

    texts: list[str]

    def kept(self, reply: str) -> bool:
        plain = unicodedata.normalize("NFKC", reply).lower()
        return bool(reply) and not any(unicodedata.normalize("NFKC", text).lower() in plain for text in self.texts)


class Starts(Rule):
    """Begins with `text`."""

    text: str

    def kept(self, reply: str) -> bool:
        return reply.startswith(self.text)


class Ends(Rule):
    """Ends with `text`."""

    text: str

    def kept(self, reply: str) -> bool:
        return reply.endswith(self.text)


class Language(Rule):
    """`en`: letters and no Chinese character; `zh`: more Chinese characters than words in Latin letters."""

    language: Literal["en", "zh"]

    def kept(self, reply: str) -> bool:
        chinese, latin = len(CHINESE.findall(reply)), len(re.findall(r"[A-Za-z]+", reply))
        return latin > 0 and chinese == 0 if self.language == "en" else chinese > latin


class Case(Rule):
    """All letters are `upper` or `lower`, and there are some."""

    case: Literal["upper", "lower"]

    def kept(self, reply: str) -> bool:
        return reply.isupper() if self.case == "upper" else reply.islower()


RULES: dict[str, type[Rule]] = {kind.__name__.lower(): kind for kind in (
    Words, Sentences, Items, Times, Json, Contains, Without, Starts, Ends, Language, Case,
)}  # fmt: skip


def check(values: Any, where: str) -> Rule:
    """The rule that a check of a row names; raises SuiteError with the row's place."""
    if not isinstance(values, Mapping) or values.get("rule") not in RULES:
        name = values.get("rule") if isinstance(values, Mapping) else values
        raise SuiteError(f"unknown rule {name!r}", where=where, hint=near(str(name), RULES))
    return parse(RULES[values["rule"]], {k: v for k, v in values.items() if k != "rule"}, _Row(where))


class _Row(Where):
    """The place of every key of a row."""

    def __init__(self, place: str) -> None:
        self.place = place

    def __call__(self, path: tuple[str | int, ...]) -> str:
        del path
        return self.place


def kept(reply: str, checks: list[Mapping[str, Any]]) -> list[bool]:
    """Which checks a reply keeps; an empty reply keeps none."""
    plain = reply.strip()
    return [bool(plain) and check(values, "").kept(plain) for values in checks]
