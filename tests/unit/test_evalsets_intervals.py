"""Every score has an interval: it holds the score, is what the library's own resampling gives, and is shown."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalsets import report, sets
from evalsets.ask import Reply
from evalsets.external.harness import Found, figures
from evalsets.intervals import interval, moved
from evalsets.metrics import bleu
from evalsets.score import Scores, headline, requests, score
from evalsets.statistics import Interval, average_interval, flips_interval, wilson

COUNTS = ("low", "high", "reported")


def half_right(name: str) -> Scores:
    """Two of three questions of a shipped set answered as its references say, the rest with words that all kinds read."""
    asked = sets.load(name)
    questions = asked.questions()
    replies = {}
    for i, question in enumerate(questions):
        right = question.expected
        if asked.kind == "tools":
            right = "\n".join(json.dumps(call, sort_keys=True, ensure_ascii=False) for call in question.expected)
        text = str(right) if i % 3 else "The answer is B, 7."
        for j, request in enumerate(requests(asked, question, "m")):
            replies[request.id] = Reply(request.id, "", text, "stop", logprobs=(-1.0 - (i * 7 + j * 3) % 5, -2.0))
    return score(asked, questions, replies)


@pytest.mark.parametrize("name", sets.names())
def test_every_score_of_a_set_lies_in_an_interval_of_its_own(name: str) -> None:
    found = half_right(name)
    deciding = headline(sets.load(name))
    for total in (found.total, *found.subsets.values()):
        sure = total.get("intervals", {})
        assert total["low"] <= total[deciding] <= total["high"]
        scores = {key: value for key, value in total.items() if isinstance(value, float) and key not in COUNTS}
        assert {deciding, *sure} <= set(scores)
        assert all(scores[name] == 0 for name in set(scores) - {deciding, *sure})  # of calls where none was made
        for figure, ends in sure.items():
            assert 0 <= ends["low"] <= scores[figure] <= ends["high"] <= 1
            assert ends["low"] < ends["high"] or total["n"] == 1
        for of in (*total.get("categories", {}).values(), *([total["likelihood"]] if "likelihood" in total else ())):
            assert of["low"] <= of["acc"] <= of["high"]


def rows(count: int, language: str = "en") -> list[dict[str, Any]]:
    draw = random.Random(3)
    words = ["the", "ship", "left", "for", "Lisbon", "with", "seven", "old", "clocks", "and", "a", "goat"]
    texts = [" ".join(draw.choices(words, k=9)) for _ in range(count)]
    replies = [text if i % 3 else " ".join(draw.choices(words, k=7)) for i, text in enumerate(texts)]
    return [
        {"reply": a, "expected": b, "language": language, "subset": "x"} for a, b in zip(replies, texts, strict=True)
    ]


def test_the_interval_of_bleu_is_that_of_sacrebleus_resampling() -> None:
    from sacrebleu.metrics.bleu import BLEU

    some = rows(40)
    replies, references = [row["reply"] for row in some], [row["expected"] for row in some]
    said = BLEU(tokenize="13a").corpus_score(replies, [references], n_bootstrap=4000)
    found = interval("bleu", some)
    assert found
    assert (found.high - found.low) / 2 == pytest.approx(said._ci / 100, rel=0.06)
    assert (found.high + found.low) / 2 == pytest.approx(said._mean / 100, rel=0.03)
    both = interval("bleu", [*some, *({**row, "language": "zh"} for row in some)])
    perfect = [{**row, "reply": row["expected"]} for row in some]
    assert interval("bleu", perfect) == wilson(40, 40)
    assert both
    assert both.high - both.low == pytest.approx((found.high - found.low) / math.sqrt(2), rel=0.15)


def test_bleu_beside_another_is_resampled_with_the_same_questions() -> None:
    """Resampled by themselves, both sides would differ by more than the interval of one says."""
    draw = random.Random(1)
    before = [*rows(40), *({**row, "language": "zh"} for row in rows(20))]
    after = [{**row, "reply": row["expected"]} if draw.random() < 0.3 else row for row in before]
    pairs = list(zip(before, after, strict=True))
    found = moved("bleu", pairs)
    assert found
    sides = [
        40 / 60 * bleu("en", *texts(side[:40])) + 20 / 60 * bleu("zh", *texts(side[40:])) for side in (before, after)
    ]
    assert (found.before, found.after) == pytest.approx(sides)
    assert 0 < found.low < sides[1] - sides[0] < found.high
    alone = interval("bleu", before)
    assert alone
    assert found.high - found.low < 0.8 * (alone.high - alone.low)
    back = moved("bleu", [(b, a) for a, b in pairs])
    assert back
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low), abs=1e-3)


def texts(some: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    return [row["reply"] for row in some], [row["expected"] for row in some]


def test_few_replies_that_differ_say_little_of_bleu() -> None:
    some = rows(40)
    same = moved("bleu", [(row, row) for row in some])
    assert same
    assert (same.low, same.high) == flips_interval(0, 0, 40)
    few = moved("bleu", [(row, {**row, "reply": "none" if i < 3 else row["reply"]}) for i, row in enumerate(some)])
    assert few
    assert few.low < few.after - few.before < 0 < few.high


def answered(counts: list[tuple[int, int]]) -> list[dict[str, Any]]:
    return [{"subset": f"s{i}", "score": float(j < k)} for i, (k, n) in enumerate(counts) for j in range(n)]


def test_subjects_of_one_size_are_averaged_as_their_questions_are() -> None:
    before, after = answered([(9, 20), (12, 20)]), answered([(4, 20), (15, 20)])
    found = moved("macro", list(zip(before, after, strict=True)))
    assert found
    assert (found.n, found.before, found.after) == pytest.approx((40, 21 / 40, 19 / 40))
    assert (found.low, found.high) == pytest.approx(flips_interval(3, 5, 40))


def test_the_difference_of_an_average_of_subjects_covers_the_truth() -> None:
    """Subjects of all sizes, whose small ones weigh as much as the large."""
    rng = np.random.default_rng(0)
    sizes = [4, 6, 10, 20, 40]
    old, lost = rng.uniform(0.5, 1.0, 5), rng.uniform(0.0, 0.3, 5)
    truth, covered = float(-(old * lost).mean()), 0
    for _ in range(400):
        before = [rng.random(n) < p for n, p in zip(sizes, old, strict=True)]
        after = [right & (rng.random(len(right)) >= p) for right, p in zip(before, lost, strict=True)]
        sides = [[{"subset": i, "score": float(r)} for i, s in enumerate(side) for r in s] for side in (before, after)]
        found = moved("macro", list(zip(*sides, strict=True)))
        assert found
        covered += found.low <= truth <= found.high
    assert 0.93 < covered / 400 < 0.99


@given(st.lists(st.tuples(st.integers(1, 40), st.floats(0, 1)), min_size=1, max_size=12))
def test_an_average_of_subjects_is_surer_than_each(subjects: list[tuple[int, float]]) -> None:
    counts = [(round(n * share), n) for n, share in subjects]
    found = average_interval(counts)
    assert 0 <= found.low <= math.fsum(k / n for k, n in counts) / len(counts) + 1e-9
    assert math.fsum(k / n for k, n in counts) / len(counts) - 1e-9 <= found.high <= 1
    assert found.low < found.high


@pytest.mark.parametrize(("subjects", "questions", "least"), [(12, 5, 0.6), (12, 5, 0.97), (4, 28, 0.8), (1, 40, 0.9)])
def test_an_average_of_subjects_covers_the_truth(subjects: int, questions: int, least: float) -> None:
    """Also where most subjects have all of their few questions right, which resampling would call certain."""
    rng = np.random.default_rng(0)
    truth = rng.uniform(least, 1.0, subjects)
    found = [average_interval([(int(k), questions) for k in rng.binomial(questions, truth)]) for _ in range(1000)]
    covered = np.mean([ends.low <= truth.mean() <= ends.high for ends in found])
    assert 0.94 <= covered <= 0.99
    assert average_interval([(3, 4)]) == pytest.approx(wilson(3, 4), abs=0.06)


def test_figures_of_another_program_have_intervals() -> None:
    lines = [
        {
            "id": f"{i}", "subset": "x", "score": float(i % 2), "error": "" if i else "HTTP 500", "finish": "stop", "parsed": "A",
            "metrics": {"f1": i / 20}, "second": "A", "second_score": 1.0,
        }
        for i in range(20)
    ]  # fmt: skip
    total = figures(Found(lines, "acc", None), lines)["total"]
    assert set(total["intervals"]) == {"metrics.f1", "second.acc"}
    ends = total["intervals"]["metrics.f1"]
    assert ends["low"] < total["metrics"]["f1"] < ends["high"]
    found = {
        "kind": "external",
        "headline": "score",
        "total": total,
        "subsets": {},
        "problems": [],
        "title": "",
        "digest": "",
    }
    (row,) = report.figures({"s": found}).rows
    assert f"F1 {total['metrics']['f1']:.3f} [{ends['low']:.3f}, {ends['high']:.3f}]" in row[-1]
    assert "by our reading 95.0 % [" in row[-1]


def test_intervals_are_printed_beside_each_figure() -> None:
    found = half_right("summaries")
    about = {"kind": "qa", "headline": "rougeL", "subsets": {}, "problems": [], "title": "", "digest": ""}
    (row,) = report.figures({"s": {**about, "total": found.total}}).rows
    for figure, called in (("rouge1", "ROUGE-1"), ("rouge2", "ROUGE-2"), ("bleu", "BLEU")):
        ends = found.total["intervals"][figure]
        assert f"{called} {found.total[figure]:.3f} [{ends['low']:.3f}, {ends['high']:.3f}]" in row[-1]


def test_what_questions_do_not_add_up_to_has_none() -> None:
    assert interval("reported", [{"score": 1.0}]) is None
    assert interval("refused", [{"score": 1.0, "expected": "answers"}]) is None
    assert interval("checks", [{"kept": [True, True]}] * 8) == pytest.approx(wilson(8, 8))
    assert isinstance(interval("checks", [{"kept": [True, False]}, {"kept": [True]}] * 8), Interval)


def test_a_few_values_of_no_known_scale_have_no_interval() -> None:
    values = [7.0, 7.5, 9.0, 8.0, 7.0, 6.5]
    found = [{"error": "", "metrics": {"bits": value, "share": value / 10}} for value in values]
    assert interval("metrics.bits", found[:5]) is None
    assert interval("metrics.bits", found)
    assert interval("metrics.share", found[:5])
