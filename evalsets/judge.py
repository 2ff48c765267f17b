"""A language model as judge: what it is asked, and how its verdicts are read (arXiv:2306.05685).

A reply is graded from 1 to 10 beside its reference; artifacts are compared by the grades of the same questions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from evalsets.ask import Reply, Request
from evalsets.extract.reply import THINKING
from evalsets.sets.question import Question

NOT_ASKED = "no judge was asked: give the address and the model of one"
LONGEST = 1024
"""Tokens that a judge may think aloud in."""

GRADE = """You grade an answer to a question. Compare it with the reference: is it right, complete and to the point?
Do not prefer long answers. Explain in one or two sentences, then end with a line of exactly this form:
Grade: [[N]]
where N is a whole number from 1 (useless) to 10 (as good as the reference, or better).

[Question]
{question}

[Reference]
{reference}

[Answer to grade]
{reply}
[End of the answer]"""

GRADED = re.compile(
    r"\[\[\s*(\d+(?:\.\d+)?)\s*(?:/\s*10\s*)?\]\]|\bgrade\W{0,6}(\d+(?:\.\d+)?)(?![\d.]*\d)", re.IGNORECASE
)


def requests(questions: Iterable[Question], replies: Mapping[str, Reply], model: str) -> list[Request]:
    """What a judge is asked of each reply that there is; ids are `ID#judge`, under which `score` finds the grades."""
    found = []
    for question in questions:
        reply = replies.get(question.id)
        if reply and not reply.error:
            asked = GRADE.format(question=question.stem, reference=question.expected, reply=reply.text)
            found.append(_request(f"{question.id}#judge", asked, model))
    return found


def _request(name: str, content: str, model: str) -> Request:
    body = {
        "model": model, "messages": [{"role": "user", "content": content}], "max_tokens": LONGEST, "temperature": 0.0,
        "seed": 0,
    }  # fmt: skip
    return Request(name, "chat/completions", body)


def grade(verdict: str) -> float | None:
    """The last grade in a judge's words, from 1 to 10; None where there is none.

    >>> grade("Mostly right, but it leaves out the year.\\nGrade: [[7]]")
    7.0
    """
    found = [float(bracketed or plain) for bracketed, plain in GRADED.findall(THINKING.sub(" ", verdict))]
    return found[-1] if found and 1 <= found[-1] <= 10 else None


def graded(name: str, reply: Reply, replies: Mapping[str, Reply]) -> dict[str, Any]:
    """A row's `grade`, `judge`, which is the grade from 0 to 1, and what the judge said.

    Without a reply it is 0. Where the judge failed, or gave no grade, it is None, for the reply may be good, and nobody
    knows; such a question has failed.
    """
    if reply.error:
        return {"grade": None, "judge": 0.0}
    verdict = replies.get(f"{name}#judge") or Reply("", "", error=NOT_ASKED)
    found = None if verdict.error else grade(verdict.text)
    if found is None:
        why = verdict.error or f"no grade in {verdict.text[-60:]!r}"
        return {"grade": None, "judge": None, "verdict": verdict.text, "error": f"judge: {why}"}
    return {"grade": found, "judge": (found - 1) / 9, "verdict": verdict.text}
