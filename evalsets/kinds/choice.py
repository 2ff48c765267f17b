"""Choice sets: the letters that a reply names, and the letter that is likeliest after the question."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

from evalsets.ask import Reply
from evalsets.extract import letter, letters, named, narrowed
from evalsets.kinds.kind import Kind, Replies, Row, accuracy, counts, judged
from evalsets.sets.question import Question
from evalsets.sets.settings import SetFile
from evalsets.statistics import mean_interval


def continuations(question: Question) -> dict[str, str]:
    """A question as texts to continue, each with one option's letter at its end, by request id.

    This is how lm-evaluation-harness asks MMLU and C-Eval, where it reports the raw sum of log-probabilities as `acc`:
    solved examples, the question, a space (none after a Chinese colon) and the letter. All letters are of one length,
    so normalizing by it, as in `acc_norm`, changes nothing. As the texts differ in the letter only, so do the sums of
    their log-probabilities: no token boundary is needed to compare them.
    """
    whole = ""
    for message in question.messages:
        whole += message["content"]
        if message["role"] != "user":
            whole += "\n\n"
        elif not whole.endswith(("：", " ", "\n")):
            whole += " "
    return {f"{question.id}#{option}": whole + option for option in question.letters}


def _row(file: SetFile, question: Question, reply: Reply, replies: Replies) -> Row:
    options = dict(zip(question.letters, question.options, strict=True))
    said = narrowed(file.extract, reply.text)
    by_letter = letters if file.multiple else letter
    chosen = by_letter(said, question.letters) or named(said, options, several=file.multiple)
    row: Row = {"expected": question.expected, "parsed": chosen, "score": float(chosen == question.expected)}
    if file.multiple:
        row["partial"] = _partial(chosen or "", question.expected)
        if file.metric == "partial":
            row["score"] = row["partial"]
    if file.likelihood:
        row |= _likely(question, replies)
    if file.metric == "likelihood":
        row |= {"generated": row["score"], "score": row["likely_score"]}
    return row


def _partial(chosen: str, right: str) -> float:
    """The share of right letters that were named, as examiners mark it: a wrong one spoils them all."""
    return len(chosen) / len(right) if set(chosen) <= set(right) else 0.0


def _likely(question: Question, replies: Replies) -> Row:
    """The option whose letter is likeliest; None where not every option was measured.

    Why not is in `likely_error`, or in `likely_refused` where the endpoint gives no log-probabilities at all.
    """
    found = [reply for name in continuations(question) if (reply := replies.get(name))]
    measured = [reply.logprobs for reply in found if reply.logprobs]
    if len(measured) == len(question.letters):
        sums = [math.fsum(logprobs) for logprobs in measured]
        likely = question.letters[sums.index(max(sums))]
        return {"likely": likely, "likely_score": float(likely == question.expected)}
    row: Row = {"likely": None, "likely_score": 0.0}
    for name, lost in (("likely_error", False), ("likely_refused", True)):
        if why := next((reply.error for reply in found if reply.error and reply.refused is lost), ""):
            return row | {name: why}
    return row


def _figures(file: SetFile, rows: list[Row]) -> dict[str, Any]:
    found = judged(rows)
    found["failed"] = sum(bool(r["error"] or r.get("likely_error")) for r in rows)
    if file.multiple:
        found["partial"] = fmean(r["partial"] for r in rows)
    if file.metric == "partial":
        found |= mean_interval([r["score"] for r in rows])._asdict()
    if file.likelihood:
        found["likelihood"] = _likelihood(rows)
    if file.metric != "likelihood":
        return found
    if "not_available" in found["likelihood"]:
        return {**found["likelihood"], **counts(rows)}
    return found | {"generated": fmean(r["generated"] for r in rows)}


def _likelihood(rows: list[Row]) -> dict[str, Any]:
    """How often the likeliest option is right, or why nobody knows."""
    unmeasured = [r for r in rows if r["likely"] is None]
    if len(unmeasured) == len(rows) and not any("likely_error" in r for r in rows):
        why = next((r["likely_refused"] for r in rows if "likely_refused" in r), "the options were not asked")
        return {"not_available": why}
    return {**accuracy(rows, "likely_score"), "failed": len(unmeasured)}


KIND = Kind(lambda file: "partial" if file.metric == "partial" else "acc", _row, _figures)
