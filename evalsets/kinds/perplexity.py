"""Perplexity sets: how well a model predicts texts."""

from __future__ import annotations

import math
from typing import Any

from evalsets.ask import Reply
from evalsets.kinds.kind import Kind, Replies, Row, counts
from evalsets.sets.question import Question
from evalsets.sets.settings import SetFile
from evalsets.statistics import bootstrap, few


def _row(_: SetFile, question: Question, reply: Reply, __: Replies) -> Row:
    return {"nll": -math.fsum(reply.logprobs), "tokens": len(reply.logprobs), "bytes": len(question.text.encode())}


def _figures(_: SetFile, rows: list[Row]) -> dict[str, Any]:
    """exp of the mean negative log-likelihood of a token, over the tokens of all texts.

    Not measured where a text failed: those that fail may be the hard ones, and the rest would flatter. Without an
    interval where there are but a few: resamples of these do not tell how much other texts may differ.
    """
    if failed := sum(bool(r["error"]) for r in rows):
        return {"not_available": f"{failed} of {len(rows)} texts were not measured", **counts(rows)}
    nll, tokens = [r["nll"] for r in rows], [r["tokens"] for r in rows]
    ends = {} if few(len(rows)) else bootstrap(nll, tokens)._asdict()
    found = {"ppl": math.fsum(nll) / sum(tokens), **ends}
    return {**{name: math.exp(value) for name, value in found.items()}, "tokens": sum(tokens), **counts(rows)}


KIND = Kind(lambda _: "ppl", _row, _figures)
