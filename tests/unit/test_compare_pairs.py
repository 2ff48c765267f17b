"""Two evaluations beside each other: what is paired, what may be said of it, and what is said where nothing may be."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from evalsets.compare import Difference, Report, compare, corrected, differences
from evalsets.statistics import paired
from suite.cli import main
from suite.errors import SuiteError
from tests.unit import evaluations

RIGHT = [1.0] * 90 + [0.0] * 10
FORGETFUL = [0.0] * 12 + [1.0] * 78 + [1.0] + [0.0] * 9
"""12 of what RIGHT knows are lost, one is learnt."""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUITE_HOME", str(tmp_path / "home"))


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["compare", *arguments, "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_many_tests_together_are_harder_to_pass() -> None:
    """20 times no change at all, each at p = 5 % alone: together nothing may be called real."""
    change = [0.0] * 6 + [1.0] * 94
    found = [_pair(change, [1.0] * 100) for _ in range(20)]
    assert {one.verdict for one in found} == {"better"}
    together = corrected(found)
    assert {one.verdict for one in together} == {"cannot tell"}
    assert all(one.change and one.change.needed and one.change.needed > 100 for one in together)
    plain = corrected([*found[:1], _pair([0.0] * 50, [1.0] * 50)])
    assert [one.verdict for one in plain] == ["better", "better"]
    assert corrected([]) == []


def _pair(before: Sequence[float], after: Sequence[float]) -> Any:
    pairs = list(zip(evaluations.rows(before), evaluations.rows(after), strict=True))
    return Difference("choice", pairs, 0, paired(before, after))


def test_other_tokenizers_are_compared_by_their_bytes(tmp_path: Path) -> None:
    nll = [30.0 + i for i in range(20)]
    evaluations.write(tmp_path / "a", "m", RIGHT, nll)
    evaluations.write(tmp_path / "b", "m", RIGHT, [x - 1 - i % 3 for i, x in enumerate(nll)])
    path = tmp_path / "b/answers/texts.jsonl"
    path.write_text(path.read_text("utf-8").replace('"tokens": 10', '"tokens": 25'), "utf-8")
    found = compare(tmp_path / "a", tmp_path / "b")
    assert found["texts"]["verdict"] == "better"
    assert found["texts"]["before"] == pytest.approx(sum(nll) / 0.6931 / 600, rel=1e-3)
    assert differences(tmp_path / "a", tmp_path / "a")["quiz"].subjects()["art"] == {"n": 50, "gained": 0, "lost": 0}
    with pytest.raises(SuiteError, match="no evaluation report"):
        Report.read(tmp_path)


def test_what_was_not_graded_is_left_out_and_counted(tmp_path: Path) -> None:
    for name in ("a", "b"):
        evaluations.write(tmp_path / name, "m", RIGHT)
    path = tmp_path / "b/answers/quiz.jsonl"
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    lines[0]["score"], lines[1]["error"] = None, "HTTP 500"
    path.write_text("\n".join(map(json.dumps, lines[:-1])), "utf-8")
    found = compare(tmp_path / "a", tmp_path / "b")["quiz"]
    assert (found["n"], found["left_out"], found["verdict"]) == (97, 3, "cannot tell")


def edited(report: Path, **changes: Any) -> None:
    """Change what report.json says of the set quiz."""
    whole = json.loads((report / "report.json").read_text("utf-8"))
    whole["sets"]["quiz"] |= changes
    (report / "report.json").write_text(json.dumps(whole), "utf-8")


def test_sets_that_are_not_the_same_are_not_compared_as_if_they_were(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, scores in (("a", RIGHT), ("b", FORGETFUL), ("few", RIGHT[:40])):
        evaluations.write(tmp_path / name, "m", scores)
    a, b, few = (str(tmp_path / name) for name in ("a", "b", "few"))
    assert main(["compare", a, few]) == 0
    shown = capsys.readouterr().out
    assert " of 100" in shown
    assert " of 40" in shown
    edited(tmp_path / "b", digest="e")
    found = said(capsys, a, b)["comparisons"][0]["sets"]["quiz"]
    assert found["remarks"] == ["two versions of the set (d, e): 100 of 100 questions are in both"]
    assert (found["verdict"], found["n"]) == ("worse", 100)
    edited(tmp_path / "b", headline="exact")
    assert main(["compare", a, b]) == 0
    assert "quiz of b beside a: acc and exact are different scores" in capsys.readouterr().out
    path = tmp_path / "b/answers/quiz.jsonl"
    path.write_text(path.read_text("utf-8").replace('"digest": "', '"digest": "other '), "utf-8")
    edited(tmp_path / "b", headline="acc")
    found = said(capsys, a, b)["comparisons"][0]["sets"]["quiz"]
    assert (found["verdict"], found["n"]) == ("cannot tell", 0)
    assert found["remarks"][0] == "no question was answered on both sides"


def test_sets_that_only_one_was_asked_are_said_to_be_no_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        evaluations.write(tmp_path / name, "m", RIGHT)
    path = tmp_path / "b/report.json"
    path.write_text(path.read_text("utf-8").replace('"quiz"', '"other"'), "utf-8")
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    shown = capsys.readouterr().out
    assert "b and a were asked no set that is the same" in shown
    assert "Differences" not in shown


def test_averages_that_are_no_mean_over_questions_stand_beside_with_an_interval(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, scores in (("a", RIGHT), ("b", FORGETFUL)):
        evaluations.write(tmp_path / name, "m", scores)
        edited(tmp_path / name, total=Report.read(tmp_path / name).sets["quiz"]["total"] | {"macro": 0.9, "bleu": 0.1})
    found = said(capsys, str(tmp_path / "a"), str(tmp_path / "b"))["comparisons"][0]["sets"]["quiz"]
    macro, bleu = found["averages"]["macro"], found["averages"]["bleu"]
    assert (macro["n"], macro["before"], macro["after"]) == pytest.approx((100, 0.9, 0.79))
    assert macro["low"] < -0.11 < macro["high"] < 0
    assert bleu["before"] == bleu["after"] == 0  # of one-letter references
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    shown = capsys.readouterr().out
    assert "Other averages" in shown
    assert "subject average" in shown
    edited(tmp_path / "a", total={"acc": 0.9, "low": 0.8, "high": 1.0, "n": 100})
    assert said(capsys, str(tmp_path / "a"), str(tmp_path / "b"))["comparisons"][0]["sets"]["quiz"]["averages"] == {}


def test_what_is_corrected_for_many_tests_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, scores in (("a", RIGHT), ("b", FORGETFUL), ("c", RIGHT)):
        evaluations.write(tmp_path / name, "m", scores)
    assert main(["compare", *(str(tmp_path / name) for name in "abc")]) == 0
    assert "Each interval is of its own difference alone" in " ".join(capsys.readouterr().out.split())
    assert main(["compare", *(str(tmp_path / name) for name in "ab")]) == 0
    assert "Each interval" not in capsys.readouterr().out


def test_replies_do_not_command_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, scores in (("a", RIGHT), ("b", FORGETFUL)):
        evaluations.write(tmp_path / name, "m", scores)
        path = tmp_path / name / "answers/quiz.jsonl"
        path.write_text(path.read_text("utf-8").replace("<b>", "\\u001b]0;owned\\u0007 \\u009b2J"), "utf-8")
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--diff"]) == 0
    shown = capsys.readouterr().out
    assert "␛]0;owned" in shown
    assert not {"\x1b", "\x9b"} & set(shown)


def test_a_perfect_reply_is_known_whatever_its_rounding(tmp_path: Path) -> None:
    """rouge-chinese calls it 0.999999995."""
    evaluations.write(tmp_path / "a", "m", [0.999999995] * 20)
    evaluations.write(tmp_path / "b", "m", [0.999999995] * 18 + [0.5, 1.0])
    (found,) = differences(tmp_path / "a", tmp_path / "b").values()
    assert (len(found.forgotten), len(found.learnt)) == (1, 0)


def test_a_perplexity_without_all_texts_is_not_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        evaluations.write(tmp_path / name, "m", RIGHT, [30.0 + i for i in range(20)])
    path = tmp_path / "b/answers/texts.jsonl"
    path.write_text(path.read_text("utf-8").replace('"error": ""', '"error": "HTTP 500"', 2), "utf-8")
    whole = json.loads((tmp_path / "b/report.json").read_text("utf-8"))
    whole["sets"]["texts"]["total"] = {"not_available": "2 of 20 texts were not measured", "n": 20, "failed": 2}
    (tmp_path / "b/report.json").write_text(json.dumps(whole), "utf-8")
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    shown = capsys.readouterr().out
    assert "texts of b beside a: not available: 2 of 20 texts were not measured" in shown
    assert "not available" in shown
    found = said(capsys, str(tmp_path / "a"), str(tmp_path / "b"))
    assert found["comparisons"][0]["sets"]["texts"]["verdict"] == "cannot tell"
    assert found["tests"] == 1
