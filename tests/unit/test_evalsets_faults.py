"""Endpoints that fail in every way, over our own sets and published layouts: scores are what the rule implies."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from openai_fake import Say, serve

from evalsets import sets
from evalsets.ask import Client
from evalsets.evaluation import Evaluation, evaluate
from evalsets.sets import EvalSet, Question

OVERFLOW = b'{"error": {"message": "maximum context length is 16 tokens", "code": "context_length_exceeded"}}'
RIGHT = {
    "choice": lambda q: f"答案：{q.expected}", "numeric": lambda q: f"So it is {q.expected}.", "qa": lambda q: q.expected,
}  # fmt: skip
WRONG = {
    "choice": lambda q: f"答案：{next(x for x in q.letters if x != q.expected)}", "numeric": lambda q: "It is 123456789.",
    "qa": lambda q: "ξ",
}  # fmt: skip


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


def choices(folder: Path, split: str, header: str, n: int) -> None:
    for subject in ("art", "law"):
        rows = [f"{i},Item {i} of {subject}?,w{i},x{i},y{i},z{i},{'ABCD'[i % 4]}" for i in range(n // 2)]
        write(folder / split / f"{subject}_{split}.csv", "\n".join([header, *rows]))


def published(folder: Path) -> dict[str, Path]:
    """C-Eval's layout, and those that ms-swift and EvalScope call mcq and qa; 36 questions each."""
    choices(folder / "ceval", "val", "id,question,A,B,C,D,answer", 36)
    mcq = [
        {"question": f"Which is {i}?", **{x: f"{x} {i}" for x in "ABCD"}, "answer": "ABCD"[i % 4]} for i in range(36)
    ]
    write(folder / "mcq" / "all_val.jsonl", "\n".join(map(json.dumps, mcq)))
    qa = [{"query": f"say number {i}", "response": f"number {i} is said"} for i in range(36)]
    write(folder / "qa" / "default.jsonl", "\n".join(map(json.dumps, qa)))
    return {name: folder / name for name in ("ceval", "mcq", "qa")}


def key(messages: Any, tools: Any) -> str:
    return json.dumps([list(messages), list(tools or ())], sort_keys=True)


class Faulty:
    """Answers question number i as `i % 12` says; knows what its answers are worth."""

    def __init__(self, questions: list[Question], kind: str) -> None:
        self.numbers = {key(q.messages, q.tools): i for i, q in enumerate(questions)}
        self.questions, self.kind = questions, kind
        self.seen: Counter[int] = Counter()

    def __call__(self, body: dict[str, Any]) -> Say:
        if "prompt" in body:
            return Say(status=400, body=b'{"error": {"message": "echo is not supported"}}')
        i = self.numbers[key(body["messages"], body.get("tools"))]
        self.seen[i] += 1
        first, question = self.seen[i] == 1, self.questions[i]
        right, wrong = (table.get(self.kind, lambda _: "Certainly.")(question) for table in (RIGHT, WRONG))
        says = {
            0: Say(status=400, body=OVERFLOW), 1: Say(status=500), 4: Say(body=b"<html>a proxy</html>"), 6: Say(""),
            7: Say(right, finish="length"), 8: Say(wrong), 9: Say(f"<think>{wrong}? No.</think>{right}"),
        }  # fmt: skip
        once = {2: Say(status=503), 3: Say(status=429, headers={"retry-after": "0"}), 5: Say(right, cut=True)}
        return once[i % 12] if first and i % 12 in once else says.get(i % 12, Say(right))

    def count(self, *rests: int) -> int:
        return sum(i % 12 in rests for i in range(len(self.questions)))


QUESTIONS = 36


def run(rule: Any, asked: EvalSet, out: Path) -> Evaluation:
    with serve(rule) as fake:
        client = Client(fake.url, concurrency=8, attempts=3, pause=0.001, timeout=30)
        return evaluate(client, "m", [asked], out, out / "journal", limit=QUESTIONS)


SHIPPED = [name for name in sets.names() if name != "perplexity"]


@pytest.mark.parametrize("name", [*SHIPPED, "ceval", "mcq", "qa"])
def test_nothing_is_dropped_and_nothing_is_scored_as_something_else(name: str, tmp_path: Path) -> None:
    asked = sets.load(str(published(tmp_path / "published").get(name, name)))
    questions = asked.questions(QUESTIONS)
    rule = Faulty(questions, asked.kind)
    total = run(rule, asked, tmp_path / "out").metrics[asked.name]
    assert (total["n"], total["failed"], total["truncated"]) == (len(questions), rule.count(0, 1, 4), rule.count(7))
    rows = [json.loads(x) for x in (tmp_path / f"out/answers/{asked.name}.jsonl").read_text("utf-8").splitlines()]
    assert [row["id"] for row in rows] == [q.id for q in questions]
    errors = {0: "HTTP 400: maximum context length", 1: "HTTP 500", 4: "not an OpenAI reply: <html>"}
    for i, row in enumerate(rows):
        assert row["error"].startswith(errors.get(i % 12, "")), row
        assert bool(row["error"]) == (i % 12 in errors)
        assert row["score"] == 0 or not row["error"]
        assert rule.seen[i] == {1: 3, 2: 2, 3: 2, 5: 2}.get(i % 12, 1)
    if asked.kind in ("choice", "numeric"):
        right = rule.count(2, 3, 5, 7, 9, 10, 11)
        assert total["acc"] == right / len(questions)
        assert total["unparsed"] == rule.count(6)
        assert [row["score"] for row in rows] == [float(i % 12 in (2, 3, 5, 7, 9, 10, 11)) for i in range(len(rows))]
    if asked.file.likelihood:
        assert total["likelihood"] == {"not_available": "HTTP 400: echo is not supported"}


@pytest.mark.parametrize("name", ["arithmetic", "qa"])
def test_an_endpoint_that_dies_half_way_is_asked_for_the_rest_only(name: str, tmp_path: Path) -> None:
    asked = sets.load(str(published(tmp_path / "published").get(name, name)))
    questions = asked.questions(QUESTIONS)
    by_text = {key(q.messages, q.tools): q for q in questions}
    answered: list[str] = []

    def dying(body: dict[str, Any]) -> Say:
        if len(answered) >= len(questions) // 2:
            return Say("x", cut=True)
        answered.append(key(body["messages"], body.get("tools")))
        return Say(RIGHT[asked.kind](by_text[answered[-1]]))

    first = run(dying, asked, tmp_path / "one").metrics[asked.name]
    assert first["failed"] == len(questions) - len(answered)
    asked_again: list[str] = []

    def well(body: dict[str, Any]) -> Say:
        asked_again.append(key(body["messages"], body.get("tools")))
        return Say(RIGHT[asked.kind](by_text[asked_again[-1]]))

    run(well, asked, tmp_path / "one")
    assert sorted(answered + asked_again) == sorted(by_text)
    run(well, asked, tmp_path / "two")
    for file in ("report.json", f"answers/{asked.name}.jsonl"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
