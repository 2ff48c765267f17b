"""A model as judge: what it is asked, how its verdicts are read, and what its silence means."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evalsets import judge, sets
from evalsets.ask import Reply
from evalsets.score import headline, score
from evalsets.sets import EvalSet, Question

ABOUT = 'kind = "qa"\ntitle = "t"\nlanguages = ["en"]\nlicense = "CC0-1.0"\nsource = "a test"\n'


def loaded(folder: Path, metrics: str) -> tuple[EvalSet, list[Question]]:
    (folder / "set.toml").write_text(f"{ABOUT}metrics = {metrics}\n", "utf-8")
    rows = ({"query": f"Question {i}?", "response": f"reference {i}"} for i in range(4))
    (folder / "x.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    found = sets.load(str(folder))
    return found, found.questions()


@pytest.mark.parametrize(
    ("verdict", "grade"),
    [
        ("Right.\nGrade: [[10]]", 10), ("[[1]]", 1), ("Grade: 7", 7), ("**Grade:** 7/10", 7), ("grade = 6.5.", 6.5), ("[[8/10]]", 8),
        ("The [[3]] would be too low. Grade: [[4]]", 4), ("<think>Grade: [[2]]</think>Grade: [[9]]", 9), ("Grade: [[0]]", None), ("Grade: [[11]]", None),
        ("Very good!", None), ("", None), ("10", None), ("[[A]]", None),
    ],
)  # fmt: skip
def test_grades_are_read(verdict: str, grade: float | None) -> None:
    assert judge.grade(verdict) == grade


def test_a_grade_that_is_missing_fails_its_question_and_is_no_zero(tmp_path: Path) -> None:
    asked, questions = loaded(tmp_path, '["judge", "exact"]')
    replies = {q.id: Reply(q.id, "", f"reply {q.id}") for q in questions}
    replies[questions[3].id] = Reply("", "", error="HTTP 500")
    wanted = judge.requests(questions, replies, "j")
    assert [r.id for r in wanted] == [f"{q.id}#judge" for q in questions[:3]]
    assert all(t in wanted[0].body["messages"][0]["content"] for t in ("Question 0?", "reference 0", "reply x/00001"))
    verdicts = ("Grade: [[10]]", "Grade: [[4]]", "who knows")
    replies |= {r.id: Reply(r.id, "", text) for r, text in zip(wanted, verdicts, strict=True)}
    found = score(asked, questions, replies)
    assert headline(asked) == "judge"
    assert [r["grade"] for r in found.rows] == [10, 4, None, None]
    assert [r["error"] for r in found.rows] == ["", "", "judge: no grade in 'who knows'", "HTTP 500"]
    assert [r["score"] for r in found.rows] == [1, pytest.approx(1 / 3), None, 0]
    assert found.total["judge"] == pytest.approx((1 + 1 / 3 + 0) / 3)
    assert found.total["low"] <= found.total["judge"] <= found.total["high"]
    assert [found.total[name] for name in ("n", "failed", "ungraded", "exact")] == [4, 2, 1, 0]


def test_a_judge_that_nobody_asked_is_no_zero(tmp_path: Path) -> None:
    for metrics in ('["judge"]', '["exact", "judge"]'):
        asked, questions = loaded(tmp_path, metrics)
        total = score(asked, questions, {q.id: Reply(q.id, "", "x") for q in questions}).total
        where = total if metrics == '["judge"]' else total["judge"]
        assert judge.NOT_ASKED in where["not_available"]
