"""What a reply says in answer: without its reasoning and without a next question, of one width."""

from __future__ import annotations

import re
import unicodedata

THINKING = re.compile(
    r"<(think|thinking|thought|reasoning)>.*?(?:</\1>|\Z)|\A(?:(?!<think).)*?</think(?:ing)?>",
    re.DOTALL | re.IGNORECASE,
)
"""Reasoning, also where the prompt has its opening mark."""
TAGGED = re.compile(r"<(/?)(?:final[_ ]?)?answer>", re.IGNORECASE)
RUN_ON = re.compile(r"\n[ \t]*(?:Question|Q|Problem|Instruction|User|Human|问题|题目|用户)\s*\d*\s*:", re.IGNORECASE)
"""Where a model goes on with another question, whose answer is none to the one that was asked."""


def said(reply: str) -> str:
    """The part of a reply that may answer; `<answer>B</answer>` becomes `Answer: B`."""
    text = re.sub(r"(?<=\d)(?=[¼-¾⅐-⅞])", " ", THINKING.sub(" ", reply))  # 1½ is no 11/2
    text = unicodedata.normalize("NFKC", text)
    text = TAGGED.sub(lambda tag: "\n" if tag[1] else "\nAnswer: ", text).strip()
    run_on = RUN_ON.search(text, 1)
    return text[: run_on.start()] if run_on else text
