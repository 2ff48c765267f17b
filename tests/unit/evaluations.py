"""Evaluations as an `eval` stage leaves them, made from scores; and models in a store that they are of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evalsets import report
from evalsets.statistics import bootstrap, mean_interval
from suite.stages import Artifact
from suite.store import Store

SPEED = {"tokens_per_s": 100.0, "latency_p50": 0.1, "latency_p95": 0.2}


def rows(scores: Sequence[float]) -> list[dict[str, Any]]:
    """One row for each score, in the subjects art and law by turns."""
    return [
        {
            "id": f"{('art', 'law')[i % 2]}/{i:03d}", "digest": f"digest {i}", "subset": ("art", "law")[i % 2], "language": "en",
            "prompt": [{"role": "user", "content": f"Question {i}?"}], "reply": f"said {'right' if score == 1 else 'wrong'} <b>",
            "finish": "stop", "tokens": 3, "error": "", "expected": "A", "parsed": "A" if score == 1 else "B", "score": score,
        }
        for i, score in enumerate(scores)
    ]  # fmt: skip


def texts(nll: Sequence[float]) -> list[dict[str, Any]]:
    """One row for each negative log-likelihood, of a text of 10 tokens and 30 bytes."""
    return [
        {
            "id": f"t/{i}", "digest": f"text {i}", "subset": "t", "language": "en", "prompt": f"text {i}", "reply": "",
            "finish": "", "tokens": 10, "error": "", "nll": value, "bytes": 30,
        }
        for i, value in enumerate(nll)
    ]  # fmt: skip


def write(out: Path, model: str, quiz: Sequence[float], nll: Sequence[float] = ()) -> dict[str, Any]:
    """Leave a report with the set `quiz`, and `texts` if there are any; returns its metrics."""
    (out / "answers").mkdir(parents=True)
    sets: dict[str, dict[str, Any]] = {}
    about = {"title": "A set", "digest": "d", "subsets": {}, "problems": []}
    low, high = mean_interval(quiz)
    figures = {
        "acc": sum(quiz) / len(quiz),
        "low": low,
        "high": high,
        "n": len(quiz),
        "failed": 0,
        "truncated": 0,
        "unparsed": 0,
    }
    sets["quiz"] = {"kind": "choice", "headline": "acc", "total": figures, **about}
    found = {"quiz": rows(quiz)}
    if nll:
        low, high = bootstrap(nll, [10.0] * len(nll))
        figures = {
            "ppl": 2.0,
            "low": low,
            "high": high,
            "n": len(nll),
            "failed": 0,
            "truncated": 0,
            "tokens": 10 * len(nll),
        }
        sets["texts"] = {"kind": "perplexity", "headline": "ppl", "total": figures, **about}
        found["texts"] = texts(nll)
    for name, lines in found.items():
        (out / "answers" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    report.write(out, model, sets)
    return {name: dict(one["total"]) for name, one in sets.items()} | {"speed": SPEED}


def stored(
    store: Store, key: str, name: str, kind: str, inputs: Mapping[str, Artifact] | None = None, **metrics: Any
) -> Artifact:
    """A model, adapter or package in the store, of 1000 bytes."""
    with store.make(key, _record(name, "make", kind, inputs or {}, {})) as making:
        assert making
        (making.out / "config.json").write_text(json.dumps({"name": name, "key": key}).ljust(1000), "utf-8")
        making.metrics = metrics
    return _kept(store, key)


def evaluated(
    store: Store, key: str, subject: Artifact, quiz: Sequence[float], nll: Sequence[float] = (), backend: str = "torch"
) -> Artifact:
    """An evaluation of `subject` in the store."""
    record = _record(f"score[{subject.name}]", "eval", "report", {"model": subject}, {})
    with store.make(key, record) as making:
        assert making
        making.metrics = write(making.out, "model", quiz, nll) | {"backend": backend}
    return _kept(store, key)


def _record(
    name: str, kind: str, makes: str, inputs: Mapping[str, Artifact], settings: dict[str, Any]
) -> dict[str, Any]:
    described = {
        field: [{"path": str(a.path), "type": a.type, "digest": a.digest, "name": a.name}]
        for field, a in inputs.items()
    }
    return {
        "name": name,
        "kind": kind,
        "type": makes,
        "settings": settings,
        "inputs": described,
        "made": f"2026 {name}",
    }


def _kept(store: Store, key: str) -> Artifact:
    found = store.get(key)
    assert found
    return found
