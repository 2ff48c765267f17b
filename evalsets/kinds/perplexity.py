"""Perplexity sets: how well a model predicts texts."""

from __future__ import annotations

import math
from typing import Any

from evalsets.ask import Reply
from evalsets.kinds.kind import Kind, Replies, Row, counts
from evalsets.sets.question import Question
from evalsets.sets.settings import SetFile
from evalsets.statistics import bootstrap


def _row(_: SetFile, question: Question, reply: Reply, __: Replies) -> Row:
    return {"nll": -math.fsum(reply.logprobs), "tokens": len(reply.logprobs), "bytes": len(question.text.encode())}


def _figures(_: SetFile, rows: list[Row]) -> dict[str, Any]:
    """exp of the mean negative log-likelihood of a token, over the tokens of all texts.

    Not measured where a text failed: those that fail may be the hard ones, and the rest would flatter.
    """
    if failed := sum(bool(r["error"]) for r in rows):
        return {"not_available": f"{failed} of {len(rows)} texts were not measured", **counts(rows)}
    nll, tokens = [r["nll"] for r in rows], [r["tokens"] for r in rows]
    low, high = bootstrap(nll, tokens)
    mean = math.fsum(nll) / sum(tokens)
    found = {"ppl": math.exp(mean), "low": math.exp(low), "high": math.exp(high), "tokens": sum(tokens)}
    return {**found, **counts(rows)}


KIND = Kind(lambda _: "ppl", _row, _figures)
