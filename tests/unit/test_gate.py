"""Gate expressions: what they read, what they refuse, how sure they are, and that nothing passes unmeasured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from suite import gate
from suite.cli import main
from suite.errors import SuiteError
from suite.evidence import Evidence, evidence
from suite.gate import Verdict
from suite.stages import Artifact
from tests.unit.kinds import pipeline_file


class Known(Evidence):
    """Evidence of these metrics, without an artifact."""

    def __init__(self, metrics: Mapping[str, Any]) -> None:
        super().__init__(Artifact(Path("nowhere"), "model"))
        object.__setattr__(self, "known", metrics)

    @cached_property
    def metrics(self) -> Mapping[str, Any]:
        return self.known  # type: ignore[attr-defined, no-any-return]


OWN = Known({"ceval-mini": {"acc": 0.8, "n": 50}, "ok": True, "parity": {"kl": 1e-3}, "lmeval:arc": {"acc": 0.5}})
OTHERS = {"before": Known({"ceval-mini": {"acc": 0.81}}), "small[gptq,4]": Known({"bytes": 2})}


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("ceval-mini.acc >= 0.8", True),
        ("ceval-mini.acc > 0.8", False),
        ("ceval-mini.acc >= @before.ceval-mini.acc - 0.02", True),
        ("ceval-mini.acc >= @before.ceval-mini.acc", False),
        ("parity.kl < 1e-2", True),
        ("lmeval:arc.acc == 0.5", True),
        ("ceval-mini.acc / ceval-mini.n * 2 == (0.8 / 50) * 2", True),
        ("@small[gptq,4].bytes <= 2 + -0", True),
        ("1 - 0.5 - 0.25 == 0.25", True),
    ],
)
def test_judged(text: str, held: bool) -> None:
    assert gate.parse(text).judge(OWN, OTHERS).held is held


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("score.ceval-mini.acc >= 0.8", True), ("score.ceval-mini.acc > 0.8", False), ("ceval-mini.acc >= 0.8", True),
        ("score.parity.kl < 1e-2", True), ("score.ceval-mini.acc >= @before.ceval-mini.acc - 0.02", True),
        ("scores.ceval-mini.acc >= 0", False), ("@before.score.ceval-mini.acc >= 0", False),
    ],
)  # fmt: skip
def test_values_may_begin_with_the_name_of_their_stage(text: str, held: bool) -> None:
    assert gate.parse(text, "score").judge(OWN, OTHERS).held is held


def test_a_metric_goes_before_a_stage_of_its_name_and_what_is_not_there_is_said() -> None:
    own = Known({"quiz": {"acc": 0.5, "quiz": {"acc": 0.7}}})
    assert gate.parse("quiz.acc == 0.5", "quiz").judge(own, {}).held
    without = Known({"quiz": {"leakage": {"not_available": "no training data"}}})
    assert "is not available: no training data" in gate.parse("quiz.leakage.share < 1").judge(without, {}).reason
    assert "begins with @" in gate.parse("quizz.acc == 0.5", "quiz").judge(own, {}).reason


@pytest.mark.parametrize(
    "path",
    ["nothing", "ceval-mini.nothing", "ceval-mini", "ok", "@before.nothing", "@gone.acc", "forgotten(@before)", "learnt(@gone.x)"],
)  # fmt: skip
def test_what_was_not_measured_does_not_pass(path: str) -> None:
    for text in (f"{path} >= 0", f"{path} < 1", f"0 <= {path}"):
        verdict = gate.parse(text).judge(OWN, OTHERS)
        assert not verdict.held
        assert any(said in verdict.reason for said in ("not measured", "no number", "made nothing", "only evaluations"))


def test_division_by_zero_does_not_pass() -> None:
    assert not gate.parse("1 / 0 >= 0").judge(OWN, OTHERS).held


NUMBERED = Known({"2wiki": {"acc": 0.6, "f1": {"2x": 0.7}}, "2024": {"acc": 0.8}, "1.5b": {"acc": 0.9}})


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("2wiki.acc == 0.6", True), ("score.2wiki.acc == 0.6", True), ("2wiki.f1.2x == 0.7", True),
        ("2 * 2wiki.acc - @before.2wiki.acc == 0.6", True), ("@before.2024.acc > 2wiki.acc", True),
        ("2wiki.acc >= @before.2wiki.acc at 95 %", False), ('"1.5b".acc > 2e-1', True),
    ],
)  # fmt: skip
def test_names_that_begin_with_a_digit(text: str, held: bool) -> None:
    assert gate.parse(text, "score").judge(NUMBERED, {"before": NUMBERED}).held is held


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("2024.acc > 0", 'write "2024".acc if'),
        ("score.acc > 1.5b.acc", 'write "1.5b".acc if'),
        ("score.2024 > 0", 'write ."2024" if'),
        ("2e5.acc > 0", 'write "2e5".acc if'),
        ("bytes < 4_000_000", 'write "4_000_000" if'),
        ("s < 10min", 'write "10min" if'),
        ("acc > .5", "write 0.5 if"),
        (".5 < acc", "write 0.5 if"),
        ("acc-0.5e3 > 0", "spaces around -"),
        ("2024 exam.acc > 0", "after '2024', found 'exam.acc'"),
    ],
)
def test_what_could_be_a_number_is_quoted(text: str, said: str) -> None:
    with pytest.raises(SuiteError) as error:
        gate.parse(text, "score")
    assert said in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "a", "a >=", ">= 1", "a >= 1 2", "a => 1", "(a >= 1", "a >= 1 and b >= 2", "@a >= 1", "a-0.5 > 0", "a.acc-0.02 > 0",
             "2024.acc > 0", "'a.acc > 0", "\"\".acc > 0",
             "forgotten(a) > 1", "forgotten() > 1", "a > 1 at 95", "a > 1 at 40 %", "a > 1 at 100 %", "1 > 0 at 95 %",
             "a > b at 95 %", "a > @x.b at 95 %", "a + a > 1 at 95 %", "a > @x.a + @y.a at 95 %",
             "forgotten(@x) < 2 at 95 %", "other.a > @x.a at 95 %"]
)  # fmt: skip
def test_refused(text: str) -> None:
    with pytest.raises(SuiteError, match="gate"):
        gate.parse(text, "score")


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        parsed = gate.parse(text)
    except SuiteError:
        return
    parsed.judge(OWN, OTHERS)


@given(st.integers(0, 99), st.integers(1, 99), st.integers(0, 99))
def test_sums_and_products_as_in_arithmetic(a: int, b: int, c: int) -> None:
    assert gate.parse(f"{a} + {b} * {c} - {a} / {b} == {a + b * c - a / b!r}").judge(Known({}), {}).held


def evaluation(folder: Path, scores: list[float], nll: float = 2.0) -> Evidence:
    """The report of a choice set with these scores, and of 20 texts of 10 tokens that cost `nll` each."""
    (folder / "answers").mkdir(parents=True)
    rows = [
        {"id": f"q/{i}", "digest": f"{i}", "subset": "qr"[i % 2], "error": "", "score": s, "partial": (s + i % 2) / 2}
        for i, s in enumerate(scores)
    ]
    texts = [
        {"id": f"t/{i}", "digest": f"{i}", "subset": "t", "error": "", "nll": nll * (9 + i % 3), "tokens": 10, "bytes": 30}
        for i in range(20)
    ]  # fmt: skip
    acc = sum(scores) / len(scores)
    sets = {
        "quiz": {
            "kind": "choice",
            "headline": "acc",
            "digest": "q",
            "total": {"acc": acc, "n": len(scores), "partial": acc, "intervals": {"partial": {}, "macro": {}}},
        },
        "texts": {"kind": "perplexity", "headline": "ppl", "digest": "t", "total": {"ppl": 7.0}},
        "none": {"kind": "choice", "headline": "acc", "digest": "n", "total": {"not_available": "no logprobs"}},
    }
    for name, found in (("quiz", rows), ("texts", texts)):
        (folder / "answers" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, found)), "utf-8")
    (folder / "report.json").write_text(json.dumps({"model": "m", "sets": sets}), "utf-8")
    metrics = {name: found["total"] for name, found in sets.items()}
    (folder / "artifact.json").write_text(json.dumps({"metrics": metrics, "bytes": 1}), "utf-8")
    return evidence(Artifact(folder, "report"))


def judged(text: str, own: Evidence, before: Evidence) -> Verdict:
    return gate.parse(text, "score").judge(own, {"before": before})


def test_a_score_is_compared_by_the_end_of_its_interval(tmp_path: Path) -> None:
    own = evaluation(tmp_path / "a", [1.0] * 90 + [0.0] * 10)  # Wilson: 0.826 to 0.945
    assert judged("quiz.acc >= 0.82 at 95 %", own, own).held
    unsure = judged("quiz.acc >= 0.85 at 95 %", own, own)
    assert not unsure.held
    assert "0.8256 to 0.9448 at 95 % on 100 questions" in unsure.reason
    assert "more questions could tell" in unsure.reason
    assert judged("quiz.acc >= 0.85 at 80 %", own, own).held
    assert judged("quiz.acc <= 0.95 at 95 %", own, own).held
    assert judged("score.quiz.acc >= 0.82 at 95 %", own, own).held
    hopeless = judged("quiz.acc >= 0.99 at 95%", own, own)
    assert not hopeless.held
    assert "more questions" not in hopeless.reason


def test_a_score_beside_another_is_compared_on_the_same_questions(tmp_path: Path) -> None:
    before = evaluation(tmp_path / "a", [1.0, 0.0] * 200)
    same = evaluation(tmp_path / "b", [1.0, 0.0] * 200)
    worse = evaluation(tmp_path / "c", [0.0] * 40 + [1.0, 0.0] * 180)  # 20 of 400 lost
    assert judged("quiz.acc >= @before.quiz.acc - 0.02 at 95 %", same, before).held
    assert not judged("quiz.acc >= @before.quiz.acc - 0.002 at 95 %", same, before).held
    assert not judged("quiz.acc >= @before.quiz.acc - 0.06 at 95 %", worse, before).held
    assert judged("quiz.acc >= @before.quiz.acc - 0.06", worse, before).held
    assert judged("quiz.acc >= @before.quiz.acc - 0.08 at 95 %", worse, before).held
    assert judged("quiz.acc >= 0.8 * @before.quiz.acc at 95 %", worse, before).held
    assert judged("score.quiz.acc >= @before.quiz.acc - 0.08 at 95 %", worse, before).held
    assert not judged("score.quiz.acc >= @before.quiz.acc - 0.06 at 95 %", worse, before).held
    assert judged("@before.quiz.acc > quiz.acc at 95 %", worse, before).held


def test_two_versions_of_a_set_are_not_compared_in_silence(tmp_path: Path) -> None:
    before, after = evaluation(tmp_path / "a", [1.0] * 300), evaluation(tmp_path / "b", [1.0] * 200)
    path = tmp_path / "b/report.json"
    path.write_text(path.read_text("utf-8").replace('"digest": "q"', '"digest": "r"'), "utf-8")
    verdict = judged("quiz.acc >= @before.quiz.acc - 0.05 at 95 %", after, before)
    assert verdict.held
    assert "on 200 questions (two versions of the set (q, r): 200 of 300 questions are in both)" in verdict.reason


def test_nobody_passes_by_not_answering(tmp_path: Path) -> None:
    before = evaluation(tmp_path / "a", [1.0] * 300)
    after = evaluation(tmp_path / "b", [0.0] * 30 + [1.0] * 270)
    path = tmp_path / "b/answers/quiz.jsonl"
    path.write_text(
        path.read_text("utf-8").replace('"error": "", "score": 0.0', '"error": "HTTP 500", "score": 0.0'), "utf-8"
    )
    for text in (
        "quiz.acc >= @before.quiz.acc - 0.05 at 95 %",
        "quiz.acc >= 0.95 at 95 %",
        "forgotten(@before.quiz) < 30",
    ):
        assert not judged(text, after, before).held
    assert judged("quiz.acc >= @before.quiz.acc - 0.15 at 95 %", after, before).held


def test_few_questions_prove_little(tmp_path: Path) -> None:
    few = evaluation(tmp_path / "a", [1.0] * 8)
    assert judged("quiz.acc >= @before.quiz.acc - 0.02", few, few).held
    verdict = judged("quiz.acc >= @before.quiz.acc - 0.02 at 95 %", few, few)
    assert not verdict.held
    assert "to 1 beside 1 at 95 % on 8 questions" in verdict.reason


@pytest.mark.parametrize("count", [1, 5])
def test_few_questions_prove_little_whatever_their_scores(tmp_path: Path, count: int) -> None:
    """Resampling one question, or five that are equal, gives a point."""
    few = evaluation(tmp_path / "a", [0.9] * count)
    assert judged("quiz.acc >= 0.8", few, few).held
    for text in (
        "quiz.acc >= 0.8 at 95 %", "quiz.partial >= 0.4 at 95 %", "quiz.acc >= @before.quiz.acc - 0.1 at 95 %",
        "quiz.partial >= @before.quiz.partial - 0.1 at 95 %",
    ):  # fmt: skip
        assert not judged(text, few, few).held, text
    better = evaluation(tmp_path / "b", [1.0] * count)
    assert not judged("quiz.acc >= @before.quiz.acc at 95 %", better, few).held


def test_few_values_of_no_known_scale_have_no_interval(tmp_path: Path) -> None:
    own = evaluation(tmp_path / "a", [30.0] * 5)
    for text in ("quiz.acc >= 1 at 95 %", "quiz.acc >= @before.quiz.acc - 1 at 95 %"):
        assert judged(text.replace("quiz.acc", "texts.ppl"), own, own).held
    (tmp_path / "a/answers/texts.jsonl").write_text(
        "\n".join((tmp_path / "a/answers/texts.jsonl").read_text("utf-8").splitlines()[:5]), "utf-8"
    )
    report = tmp_path / "a/report.json"
    report.write_text(report.read_text("utf-8").replace('"choice"', '"external"', 1), "utf-8")
    few = evidence(own.artifact)
    for figure in ("quiz.acc", "texts.ppl"):
        for text in (f"{figure} >= 1 at 95 %", f"{figure} >= @before.{figure} - 1 at 95 %"):
            verdict = judged(text, few, few)
            assert not verdict.held
            assert "5 are too few for one at 95 %" in verdict.reason
            assert judged(text.replace("95", "90"), few, few).held


def test_perplexity_moves_by_a_factor(tmp_path: Path) -> None:
    before, after = evaluation(tmp_path / "a", [1.0], 2.0), evaluation(tmp_path / "b", [1.0], 2.01)
    assert judged("texts.ppl <= @before.texts.ppl * 1.03 at 95 %", after, before).held
    assert not judged("texts.ppl <= @before.texts.ppl * 1.01 at 95 %", after, before).held
    assert judged("texts.ppl < 9 at 95 %", after, before).held


def test_texts_that_failed_leave_no_perplexity(tmp_path: Path) -> None:
    """Which texts are measured decides it: one that failed would make it better or worse."""
    before, after = evaluation(tmp_path / "a", [1.0]), evaluation(tmp_path / "b", [1.0])
    path = tmp_path / "b/answers/texts.jsonl"
    path.write_text(path.read_text("utf-8").replace('"error": ""', '"error": "HTTP 500"', 2), "utf-8")
    for text in ("texts.ppl < 90 at 95 %", "texts.ppl <= @before.texts.ppl * 9 at 95 %"):
        assert judged(text, before, before).held
        verdict = judged(text, after, before)
        assert not verdict.held
        assert "not measured: 2 texts failed" in verdict.reason


def test_figures_beside_the_deciding_one_are_more_or_less_sure_too(tmp_path: Path) -> None:
    own = evaluation(tmp_path / "a", [1.0] * 90 + [0.0] * 10)  # partial: 0.5, 1 and so on, at the end 0, 0.5
    before = evaluation(tmp_path / "b", [1.0] * 100)
    assert judged("quiz.partial >= 0.63 at 95 %", own, own).held
    assert not judged("quiz.partial >= 0.68 at 95 %", own, own).held
    assert judged("quiz.partial >= @before.quiz.partial - 0.09 at 95 %", own, before).held
    assert not judged("quiz.partial >= @before.quiz.partial - 0.06 at 95 %", own, before).held
    assert judged("quiz.macro >= 0.8 at 95 %", own, before).held
    assert judged("quiz.macro >= @before.quiz.macro - 0.2 at 95 %", own, before).held
    assert not judged("quiz.macro >= @before.quiz.macro - 0.12 at 95 %", own, before).held


def test_only_scores_of_questions_are_more_or_less_sure(tmp_path: Path) -> None:
    own = evaluation(tmp_path / "a", [1.0])
    for text, said in (
        ("quiz.n > 0 at 95 %", "of 'quiz' one have: acc, partial, macro"), ("texts.tokens > 0 at 95 %", "one have: ppl"),
        ("speed.tokens_per_s > 0 at 95 %", "with one are: quiz.acc, texts.ppl"),
        ("none.acc > 0 at 95 %", "not available: no logprobs"), ("none.acc > @before.none.acc at 95 %", "not available: no"),
    ):  # fmt: skip
        assert said in judged(text, own, own).reason
        assert not judged(text, own, own).held
    assert "no interval" in gate.parse("parity.kl < 1 at 95 %").judge(OWN, {}).reason
    assert "is no evaluation" in judged("quiz.acc > @before.quiz.acc at 95 %", own, OWN).reason


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("成语", "成语"), ("arc-1.5", "arc-1.5"), ("quiz.v2", "quiz.v2"), ("2024-exam", '"2024-exam"'), ("my set", "'my set'"),
        ("bob's", '"bob\'s"'), ("v2.", '"v2."'), ("acc,none", '"acc,none"'), ("été_2", "été_2"), ("a.b", 'a."b"'),
    ],
)  # fmt: skip
def test_every_set_can_be_named(tmp_path: Path, name: str, written: str) -> None:
    """As it is measured, with an interval, beside another and in what was forgotten, all by one way of reading."""
    for folder in "ab":
        evaluation(tmp_path / folder, [1.0] * 90 + [0.0] * 10)
        (tmp_path / folder / "answers/quiz.jsonl").rename(tmp_path / folder / f"answers/{name}.jsonl")
        for file in ("report.json", "artifact.json"):
            path = tmp_path / folder / file
            path.write_text(path.read_text("utf-8").replace('"quiz"', json.dumps(name)), "utf-8")
    own, before = (evidence(Artifact(tmp_path / folder, "report")) for folder in "ab")
    for text in (
        f"{written}.acc >= 0.9", f"score.{written}.acc == @before.{written}.acc", f"{written}.acc >= 0.82 at 95 %",
        f"{written}.acc >= @before.{written}.acc - 0.05 at 95 %", f"forgotten(@before.{written}) == 0",
    ):  # fmt: skip
        verdict = judged(text, own, before)
        assert verdict.held, verdict.reason
    assert not judged(f"{written}.acc >= 0.95", own, before).held


def test_a_stage_of_the_first_part_of_a_sets_name_does_not_hide_it() -> None:
    own = Known({"quiz.v2": {"acc": 0.5}, "quiz": {"acc": 0.1}})
    assert gate.parse("quiz.v2.acc == 0.5", "quiz").judge(own, {}).held
    assert gate.parse("quiz.quiz.v2.acc == 0.5", "quiz").judge(Known({"quiz.v2": {"acc": 0.5}}), {}).held
    assert gate.parse("quiz.v2.acc == 0.5", "quiz").judge(Known({"quiz.v2": {"acc": 0.5}}), {}).held


def test_what_was_forgotten_and_learnt_is_counted(tmp_path: Path) -> None:
    before = evaluation(tmp_path / "a", [1.0, 1.0, 0.0, 0.5, 1.0])
    after = evaluation(tmp_path / "b", [0.0, 0.5, 1.0, 0.0, 1.0])
    assert judged("forgotten(@before.quiz) == 2", after, before).held
    assert "'none' cannot be compared: not available" in judged("forgotten(@before) == 2", after, before).reason
    assert judged("learnt( @before.quiz ) == 1", after, before).held
    assert "was not asked 'quz'; it was: quiz" in judged("forgotten(@before.quz) == 0", after, before).reason


def test_size_and_parity_are_those_of_what_was_evaluated(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "artifact.json").write_text('{"bytes": 1000, "metrics": {"parity": {"kl": 0.01}}}', "utf-8")
    evaluation(tmp_path / "report", [1.0])
    record = json.loads((tmp_path / "report/artifact.json").read_text("utf-8"))
    record["inputs"] = {"model": [{"path": str(model), "type": "model", "digest": ""}]}
    (tmp_path / "report/artifact.json").write_text(json.dumps(record), "utf-8")
    own = evidence(Artifact(tmp_path / "report", "report"))
    assert gate.parse("bytes == 1000").judge(own, {}).held
    assert gate.parse("parity.kl < 0.05").judge(own, {}).held


def test_a_stage_names_itself_in_its_gates(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """By its table's name, which the stages of a matrix share, or after an @, which waits for nobody."""
    text = """
    [stage.a]
    use = "make"
    matrix.score = [0.5, 0.6]
    gate = ["a.quality.score >= @a[0.5].quality.score", "a.quality.score < 0.55"]
    """
    file = pipeline_file(tmp_path, text)
    assert main(["run", str(file), "--json"]) == 3
    gates = [json.loads(line) for line in capfd.readouterr().out.splitlines() if '"gate"' in line]
    assert [(one["stage"], one["held"]) for one in gates] == [
        ("a[0.5]", True), ("a[0.5]", True), ("a[0.6]", True), ("a[0.6]", False)
    ]  # fmt: skip
