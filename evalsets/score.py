"""From questions and replies to scores: nothing leaves the denominator.

A failed question scores 0, a reply that names no option is wrong, a truncated one is scored as it stands; all three are
counted beside the score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from evalsets import metrics
from evalsets.ask import Reply, Request
from evalsets.extract import letter, named
from evalsets.sets import EvalSet, Question
from evalsets.statistics import bootstrap, wilson

Row = dict[str, Any]


@dataclass(frozen=True)
class Scores:
    """What a set gave: the figures of the whole, of each subset, and one row for each question, in order of id."""

    total: dict[str, Any]
    subsets: dict[str, dict[str, Any]]
    rows: list[Row]


def requests(asked: EvalSet, question: Question, model: str) -> list[Request]:
    """What is sent for a question: that with the question's own id first, then `ID#A` and so on for its options.

    The requests for options have the endpoint read the prompt with each option, which takes log-probabilities; one
    that gives none still answers the first.
    """
    if asked.kind == "perplexity":
        return [_echo(question.id, question.text, model)]
    options = continuations(question) if asked.file.likelihood else {}
    return [_chat(asked, question, model), *(_echo(f"{question.id}#{o}", p, model) for o, p in options.items())]


def continuations(question: Question) -> dict[str, str]:
    """A choice question as texts to continue, each with one option's letter after it.

    This is the form in which lm-evaluation-harness asks MMLU and C-Eval: solved examples, the question, a space and the
    letter. As the texts differ in the letter only, so do the sums of their log-probabilities: no token boundary is
    needed to compare options.
    """
    turns = "".join(
        m["content"] + {"user": " ", "assistant": "\n\n", "system": "\n\n"}[m["role"]] for m in question.messages
    )
    return {letter: turns + letter for letter in question.letters}


def _echo(name: str, prompt: str, model: str) -> Request:
    """A request for the log-probabilities of a text's tokens."""
    body = {"model": model, "prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 0, "temperature": 0}
    return Request(name, "completions", body)


def _chat(asked: EvalSet, question: Question, model: str) -> Request:
    generation = asked.file.generation
    body = {
        "model": model, "messages": list(question.messages), "max_tokens": generation.max_tokens,
        "temperature": generation.temperature, "seed": generation.seed,
    }  # fmt: skip
    if generation.stop:
        body["stop"] = generation.stop
    return Request(question.id, "chat/completions", body)


def score(asked: EvalSet, questions: list[Question], replies: Mapping[str, Reply]) -> Scores:
    """Score every question of a set; a question without a reply is a failed one."""
    row = _ROW[asked.kind]
    rows = []
    for question in questions:
        reply = replies.get(question.id) or Reply(question.id, "", error="not asked")
        rows.append(_common(question, reply) | row(asked, question, reply))
        if asked.file.likelihood:
            rows[-1] |= _likely(question, replies)
    subsets = sorted({r["subset"] for r in rows})
    parts = {name: [r for r in rows if r["subset"] == name] for name in subsets}
    total = figures(asked, rows)
    each = {name: figures(asked, part) for name, part in parts.items()}
    if asked.kind == "choice":
        total["macro"] = fmean(part["acc"] for part in each.values())
    if asked.file.likelihood:
        total |= _likelihood(questions, rows, replies)
    return Scores(total, each, rows)


def _common(question: Question, reply: Reply) -> Row:
    prompt = list(question.messages) or question.text
    return {
        "id": question.id, "digest": question.digest, "subset": question.subset, "language": question.language,
        "prompt": prompt, "reply": reply.text, "finish": reply.finish, "tokens": reply.tokens, "error": reply.error,
    }  # fmt: skip


def _choice(_: EvalSet, question: Question, reply: Reply) -> Row:
    options = dict(zip(question.letters, question.options, strict=True))
    chosen = letter(reply.text, question.letters) or named(reply.text, options)
    return {"expected": question.expected, "parsed": chosen, "score": float(chosen == question.expected)}


def _likely(question: Question, replies: Mapping[str, Reply]) -> Row:
    """The option whose letter is likeliest after the question; None where not every option was measured."""
    found = {o: replies[name].logprobs for o in question.letters if (name := f"{question.id}#{o}") in replies}
    if len(found) < len(question.letters) or not all(found.values()):
        return {"likely": None, "likely_score": 0.0}
    likely = max(found, key=lambda option: math.fsum(found[option]))
    return {"likely": likely, "likely_score": float(likely == question.expected)}


def _likelihood(questions: list[Question], rows: list[Row], replies: Mapping[str, Reply]) -> dict[str, Any]:
    """How often the likeliest option is right; or why nobody knows."""
    options = [replies.get(f"{q.id}#{o}") for q in questions for o in q.letters]
    if refused := next((r for r in options if r and r.refused), None):
        return {"likelihood": {"not_available": refused.error}}
    right = sum(r["likely_score"] == 1 for r in rows)
    low, high = wilson(right, len(rows))
    unmeasured = sum(r["likely"] is None for r in rows)
    return {"likelihood": {"acc": right / len(rows), "low": low, "high": high, "failed": unmeasured}}


def _qa(asked: EvalSet, question: Question, reply: Reply) -> Row:
    row = {"expected": question.expected, **likeness(asked.file.metrics, question.language, reply, question.expected)}
    return row | {"score": row[headline(asked)]}


def likeness(asked: Collection[str], language: str, reply: Reply, expected: str) -> dict[str, float]:
    """How far a reply is what was expected, by those of the metrics in `asked` that one reply has."""
    found = metrics.rouge(language, reply.text, expected) if "rouge" in asked else {}
    if "exact" in asked:
        found["exact"] = metrics.exact(reply.text, expected) if not reply.error else 0.0
    return found


def _perplexity(_: EvalSet, question: Question, reply: Reply) -> Row:
    return {"nll": -math.fsum(reply.logprobs), "tokens": len(reply.logprobs), "bytes": len(question.text.encode())}


_ROW: dict[str, Callable[[EvalSet, Question, Reply], Row]] = {
    "choice": _choice, "qa": _qa, "perplexity": _perplexity,
}  # fmt: skip


def headline(asked: EvalSet) -> str:
    """The figure that stands for a set, has the interval and decides comparisons."""
    if asked.kind == "qa":
        return {"rouge": "rougeL", "exact": "exact"}[asked.file.metrics[0]]
    return {"choice": "acc", "perplexity": "ppl"}[asked.kind]


def figures(asked: EvalSet, rows: list[Row]) -> dict[str, Any]:
    """The figures of some scored rows of a set."""
    counts = _counts(rows)
    if asked.kind == "choice":
        right = sum(r["score"] == 1 for r in rows)
        low, high = wilson(right, len(rows))
        unparsed = sum(r["parsed"] is None and not r["error"] for r in rows)
        return {"acc": right / len(rows), "low": low, "high": high, **counts, "unparsed": unparsed}
    if asked.kind == "qa":
        return text_figures(asked.file.metrics, rows)
    return {**_perplexity_figures(rows), **counts}


def _counts(rows: list[Row]) -> dict[str, int]:
    return {
        "n": len(rows),
        "failed": sum(bool(r["error"]) for r in rows),
        "truncated": sum(r["finish"] == "length" for r in rows),
    }


def text_figures(asked: Iterable[str], rows: list[Row]) -> dict[str, Any]:
    """The means of some rows' likeness, their corpus BLEU, and the interval of what `score` holds."""
    low, high = bootstrap([r["score"] for r in rows])
    return {**_likeness_figures(asked, rows), "low": low, "high": high, **_counts(rows)}


def _likeness_figures(asked: Iterable[str], rows: list[Row]) -> dict[str, float]:
    found: dict[str, float] = {}
    for metric in asked:
        if metric == "bleu":
            found["bleu"] = _bleu(rows)
        else:
            names = metrics.ROUGE if metric == "rouge" else ("exact",)
            found |= {name: fmean(r[name] for r in rows) for name in names}
    return found


def _bleu(rows: list[Row]) -> float:
    """Corpus BLEU of each language by its own tokenizer; of several, the mean weighted by questions."""
    total = 0.0
    for language in sorted({r["language"] for r in rows}):
        part = [r for r in rows if r["language"] == language]
        total += len(part) * metrics.bleu(language, [r["reply"] for r in part], [r["expected"] for r in part])
    return total / len(rows)


def _perplexity_figures(rows: list[Row]) -> dict[str, float | None]:
    """exp of the mean negative log-likelihood of a token, over the tokens of all texts that were answered."""
    answered = [r for r in rows if not r["error"]]
    if not answered:
        return {"ppl": None, "low": None, "high": None}
    nll, tokens = [r["nll"] for r in answered], [r["tokens"] for r in answered]
    low, high = bootstrap(nll, tokens)
    mean = math.fsum(nll) / sum(tokens)
    return {"ppl": math.exp(mean), "low": math.exp(low), "high": math.exp(high), "tokens": sum(tokens)}
