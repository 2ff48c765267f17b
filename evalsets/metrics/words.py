"""Likeness by words that needs no library: exact match, F1 and Jaccard over tokens, and regular expressions.

A token is a word of letters and digits, or one Chinese character.
"""

from __future__ import annotations

import re
import string
from collections import Counter

from evalsets.extract.pattern import found

TOKEN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]|[^\s\u3400-\u4dbf\u4e00-\u9fff]+")
ARTICLES = re.compile(r"\b(?:a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation + "，。、；：？！“”‘’（）《》〈〉【】「」『』—…·～")


def exact(reply: str, reference: str) -> float:
    """1 if they are equal but for white space around them."""
    return float(reply.strip() == reference.strip())


def tokens(text: str) -> list[str]:
    """Words and Chinese characters in small letters, without punctuation and English articles (SQuAD's normalization).

    >>> tokens("The cat, 一只猫!")
    ['cat', '一', '只', '猫']
    """
    return TOKEN.findall(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)))


def f1(reply: str, reference: str) -> float:
    """Token F1 of SQuAD (arXiv:1606.05250) and, over characters, of CMRC (arXiv:1810.07366); 1 where both are empty."""
    said, right = tokens(reply), tokens(reference)
    if not said or not right:
        return float(said == right)
    both = (Counter(said) & Counter(right)).total()
    return 2 * both / (len(said) + len(right))


def jaccard(reply: str, reference: str) -> float:
    """Tokens that both have, of those that either has; 1 where both have none."""
    said, right = set(tokens(reply)), set(tokens(reference))
    return len(said & right) / len(said | right) if said | right else 1.0


def regex(reply: str, pattern: str) -> float:
    """1 if the regular expression, which is what was expected, is found in the reply."""
    return float(bool(found(pattern, reply)))
