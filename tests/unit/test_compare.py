"""`suite compare` and the report of a run: what is said of many artifacts, to people, machines and CI."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from evalsets.compare import Report
from suite import pipeline
from suite.cli import main
from suite.errors import StageFailed
from suite.evaluate import find_leaks
from suite.evidence import evidence
from suite.gate import Verdict
from suite.lineage import parents, training_data
from suite.reports import comparison
from suite.reports import run as report
from suite.reports.subjects import of_artifact, of_evaluation, together, unique
from suite.runner import Outcome
from suite.runs import link_artifacts, new_run
from suite.stages import Artifact
from suite.store import Store
from tests.unit import evaluations
from tests.unit.evaluations import evaluated, stored

RIGHT = [1.0] * 90 + [0.0] * 10
FORGETFUL = [0.0] * 12 + [1.0] * 78 + [1.0] + [0.0] * 9
"""12 of what RIGHT knows are lost, one is learnt."""
PARITY = {"kl": 0.01, "top1": 0.97, "ppl_parent": 5.0, "ppl_child": 5.5}


@dataclass
class Made:
    """Base, an adapter of it, what they merge to, that quantized, and a package that was not evaluated."""

    store: Store
    artifacts: dict[str, Artifact]
    reports: dict[str, Artifact]
    run_dir: Path


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Made:
    store = Store(tmp_path_factory.mktemp("store"))
    base = stored(store, "a1", "base", "model")
    tuned = stored(store, "a2", "tuned", "adapter", {"base": base})
    merged = stored(store, "a3", "merged", "model", {"adapter": tuned}, parity=PARITY)
    small = stored(store, "a4", "small", "quantized", {"model": merged}, parity=PARITY | {"kl": 0.2})
    file = stored(store, "a5", "file", "package", {"model": merged}, llamacpp={"parity": PARITY})
    artifacts = {a.name: a for a in (base, tuned, merged, small, file)}
    nll = [20.0 + i % 7 for i in range(30)]
    reports = {
        "base": evaluated(store, "r1", base, RIGHT, nll),
        "tuned": evaluated(store, "r2", tuned, FORGETFUL, [x + 3 + x % 2 for x in nll]),
        "merged": evaluated(store, "r3", merged, FORGETFUL, [x + 3 + x % 2 for x in nll]),
        "small": evaluated(store, "r4", small, [0.0, 1.0] * 50, [x + 9 for x in nll]),
    }
    run_dir = new_run(store, "job", "", [])
    everything = [*artifacts.items(), *((f"score[{name}]", made) for name, made in reports.items())]
    link_artifacts(run_dir, everything)
    stages = [{"name": name} for name, _ in everything]
    (run_dir / "report.json").write_text(json.dumps({"stages": stages}), "utf-8")
    return Made(store, artifacts, reports, run_dir)


@pytest.fixture
def made(once: Made, monkeypatch: pytest.MonkeyPatch) -> Made:
    """The same store for every test; what a test adds to it, it adds to artifacts of its own."""
    monkeypatch.setenv("SUITE_HOME", str(once.store.root))
    return once


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["compare", *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def verdicts(found: dict[str, Any]) -> dict[tuple[str, str], dict[str, str]]:
    return {
        (c["subject"], c["against"]): {name: one["verdict"] for name, one in c["sets"].items()}
        for c in found["comparisons"]
    }


def test_all_of_a_run_against_the_first(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    found = said(capsys, "job")
    assert [s["name"] for s in found["subjects"]] == ["base", "tuned", "merged", "small", "file"]
    assert verdicts(found) == {
        ("tuned", "base"): {"quiz": "worse", "texts": "worse"}, ("merged", "base"): {"quiz": "worse", "texts": "worse"},
        ("small", "base"): {"quiz": "worse", "texts": "worse"}, ("file", "base"): {},
    }  # fmt: skip
    assert found["tests"] == 6
    small = found["subjects"][3]
    assert (small["bytes"], small["parity"]["kl"], small["speed"]["latency_p50"]) == (1000, 0.2, 0.1)
    assert found["subjects"][4]["parity"] == PARITY
    lost = found["comparisons"][0]["sets"]["quiz"]
    assert (len(lost["forgotten"]), lost["learnt"]) == (12, ["art/090"])
    assert lost["subjects"] == {"law": {"n": 50, "gained": 0, "lost": 6}, "art": {"n": 50, "gained": 1, "lost": 6}}
    assert lost["p_corrected"] > lost["p"]


def test_each_against_what_it_came_from(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    """The merge changes nothing and cannot be told from its adapter; the bad quantization is caught."""
    assert verdicts(said(capsys, str(made.run_dir), "--against", "parent")) == {
        ("tuned", "base"): {"quiz": "worse", "texts": "worse"},
        ("merged", "tuned"): {"quiz": "cannot tell", "texts": "cannot tell"},
        ("small", "merged"): {"quiz": "worse", "texts": "worse"},
        ("file", "merged"): {},
    }


def test_artifacts_are_named_in_every_way(made: Made, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """By stage, key, folder, report and a copy of an endpoint's report; the newest evaluation behind each backend."""
    twice = stored(made.store, "d1", "twice", "model")
    for key, backend in (("r5", "torch"), ("r6", "vllm")):
        evaluated(made.store, key, twice, RIGHT, backend=backend)
    evaluations.write(tmp_path / "remote", "gpt", RIGHT)
    found = said(capsys, "@merged", "d1", str(made.artifacts["base"].path), "@score[tuned]", str(tmp_path / "remote"))
    names = [s["name"] for s in found["subjects"]]
    assert names == ["merged", "twice (torch)", "twice (vllm)", "base", "tuned", "remote"]
    assert [c["against"] for c in found["comparisons"]] == ["merged"] * 5
    assert verdicts(found)["twice (vllm)", "merged"] == {"quiz": "better"}
    found = said(capsys, "@merged", "@base", "--against", "base")
    assert list(verdicts(found)) == [("merged", "base")]
    other = stored(made.store, "b7", "merged", "model")
    found = said(capsys, "a3", str(other.path))
    assert [s["name"] for s in found["subjects"]] == ["merged (torch)", "merged"]
    evaluations.write(tmp_path / "x" / "remote", "gpt", RIGHT)
    found = said(capsys, str(tmp_path / "remote"), str(tmp_path / "x" / "remote"))
    assert [s["name"] for s in found["subjects"]] == ["remote #1", "remote #2"]


def test_a_later_look_at_ten_questions_hides_no_evaluation(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nll = [20.0 + i % 7 for i in range(30)]
    looked = stored(made.store, "h0", "looked", "model")
    full = evaluated(made.store, "h1", looked, RIGHT, nll)
    evaluated(made.store, "h2", looked, [0.0] * 10)
    found = said(capsys, "@base", "h0")
    subject = found["subjects"][1]
    assert {name: one["n"] for name, one in subject["sets"].items()} == {"quiz": 100, "texts": 30}
    assert subject["elsewhere"] == {"quiz": str(full.path), "texts": str(full.path)}
    by_set = found["comparisons"][0]["sets"]
    assert {name: one["n"] for name, one in by_set.items()} == {"quiz": 100, "texts": 30}
    assert by_set["quiz"]["gained"] == by_set["quiz"]["lost"] == []
    assert main(["compare", "@base", "h0"]) == 0
    assert "looked: quiz, texts as an earlier evaluation found" in capsys.readouterr().out


def test_the_newest_version_of_a_set_counts_however_few_it_asks(tmp_path: Path) -> None:
    subjects = []
    for name, digest, count in (("a", "old", 100), ("b", "new", 40), ("c", "new", 40), ("d", "new", 10)):
        evaluations.write(tmp_path / name, "m", [1.0] * count)
        path = tmp_path / name / "report.json"
        path.write_text(path.read_text("utf-8").replace('"digest": "d"', f'"digest": "{digest}"'), "utf-8")
        subjects.append(of_evaluation(Artifact(tmp_path / name, "report")))
    found = together(subjects).report
    assert found
    assert (found.folder.name, found.elsewhere["quiz"].name, len(found.rows("quiz"))) == ("d", "c", 40)


def test_unevaluated_artifacts_show_what_is_known(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "@file"]) == 0
    shown = capsys.readouterr().out
    assert "97.00%" in shown
    assert "Differences" not in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "no run, artifact or report 'nothing'"),
        (["@nothing"], "no run has an artifact of a stage 'nothing'"),
        (["job", "--against", "bse"], "did you mean 'base'"),
        (["job", "--diff", "qiz"], "none was asked 'qiz'"),
        (["a"], "begins the keys of 5 artifacts"),
        ([], "required"),
    ],
)
def test_mistakes_are_said(made: Made, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_run_that_was_interrupted_is_no_traceback(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    stopped = new_run(made.store, "stopped", "", [])
    assert main(["compare", "stopped"]) == 2
    assert "interrupted" in capsys.readouterr().err
    (stopped / "report.json").write_text('{"stages": []}', "utf-8")
    assert main(["compare", "stopped"]) == 2
    assert "nothing was evaluated" in capsys.readouterr().err
    stopped.rename(stopped.parent.parent.parent / "gone")


def test_changed_questions_stand_side_by_side(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "@base", "@tuned", "@merged", "--against", "parent", "--diff", "quiz"]) == 0
    shown = capsys.readouterr().out
    assert "quiz: 13 changed" in shown
    for text in ("law/001: worse", "art/090: better", "Question 1?", "expected: A", "said right <b>", "said wrong <b>"):
        assert text in shown
    assert "no score of merged differs from tuned's" in shown


def test_a_folder_gets_every_form(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["compare", "job", "--out", str(out)]) == 0
    assert {p.name for p in out.iterdir()} == {
        "comparison.json", "comparison.md", "comparison.html", "scores.png", "quality.png", "latency.png",
    }  # fmt: skip
    page = (out / "comparison.html").read_text("utf-8")
    assert page.count("data:image/png;base64,") == 3
    assert "said wrong &lt;b&gt;" in page
    assert "<b>" not in page
    assert "http://" not in page.replace("http-equiv", "")
    assert "https://" not in page
    assert (out / "scores.png").read_bytes()[:4] == b"\x89PNG"
    assert "Holm" in (out / "comparison.md").read_text("utf-8")
    assert json.loads((out / "comparison.json").read_text("utf-8"))["tests"] == 6
    assert main(["compare", "job", "--out", str(out)]) == 2  # nothing is overwritten
    assert "exists already" in capsys.readouterr().err


def test_a_package_stands_once_with_its_quality_and_its_cost(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    file = stored(made.store, "g1", "gguf", "package", {"model": made.artifacts["merged"]}, llamacpp={"parity": PARITY})
    scored = evaluated(made.store, "g2", file, FORGETFUL, backend="llamacpp")
    run_dir = new_run(made.store, "packed", "", [])
    link_artifacts(run_dir, [("gguf", file), ("score[gguf]", scored)])
    stages = [{"name": name} for name in ("gguf", "score[gguf]")]
    (run_dir / "report.json").write_text(json.dumps({"stages": stages}), "utf-8")
    (subject,) = said(capsys, "packed")["subjects"]
    assert (subject["name"], subject["backend"], subject["bytes"]) == ("gguf", "llamacpp", 1000)
    assert (subject["parity"], subject["speed"]["tokens_per_s"]) == (PARITY, 100.0)
    assert subject["sets"]["quiz"]["acc"] == 0.79
    assert evidence(scored).metrics["parity"] == PARITY
    assert main(["compare", "packed", "@merged"]) == 0
    assert "llamacpp is asked one question at a time" in capsys.readouterr().out


def test_lineage_leads_to_the_training_data(made: Made, tmp_path: Path) -> None:
    assert list(parents(made.artifacts["small"])) == [
        made.artifacts[name].digest for name in ("merged", "tuned", "base")
    ]  # fmt: skip
    data = tmp_path / "data.jsonl"
    data.write_text("{}", "utf-8")
    digest = made.store.digest(data)
    learnt = stored(
        made.store,
        "c1",
        "learnt",
        "adapter",
        {"data": Artifact(data, "dataset", digest), "base": made.artifacts["base"]},
    )
    merged = stored(made.store, "c2", "folded", "model", {"adapter": learnt})
    assert training_data(merged).files == [data]
    assert training_data(merged).unknown == []
    data.write_text("{} ", "utf-8")
    assert training_data(merged).unknown == ["data.jsonl has changed"]
    data.unlink()
    assert training_data(merged).unknown == ["data.jsonl is gone"]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    assert training_data(Artifact(foreign, "model")).unknown == ["foreign was not made here"]


def test_an_evaluation_says_what_leaked_from_its_lineage(made: Made, tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    data.write_text(
        json.dumps(
            [{"conversations": [{"from": "human", "value": "Dear Sir, 7 stones lie before the gate of keeper 7."}]}]
        ),
        "utf-8",
    )
    digest = made.store.digest(data)
    inputs = {"data": Artifact(data, "dataset", digest), "base": made.artifacts["base"]}
    learnt = stored(made.store, "f1", "pupil", "adapter", inputs)
    merged = stored(made.store, "f2", "graduate", "model", {"adapter": learnt})
    evaluations.write(tmp_path / "out", "m", [1.0] * 10)
    path = tmp_path / "out/answers/quiz.jsonl"
    asked = re.sub(r"Question (\d+)", r"\1 stones lie before the gate of keeper \1", path.read_text("utf-8"))
    path.write_text(asked, "utf-8")
    sets = Report.read(tmp_path / "out").sets
    known = training_data(merged)
    find_leaks(tmp_path / "out", "m", sets, known.files, known.unknown)
    assert sets["quiz"]["total"]["leakage"] == {"n": 1, "share": 0.1, "clean": 1.0}
    assert Report.read(tmp_path / "out").sets["quiz"]["leakage"]["ids"] == ["law/007"]
    assert "1 questions (10.0 %) overlap" in (tmp_path / "out/report.md").read_text("utf-8")


PIPELINE = """
name = "job"
[stage.base]
use = "tests.unit.kinds:Make"
[stage.tuned]
use = "tests.unit.kinds:Tune"
base = "@base"
[stage.merged]
use = "tests.unit.kinds:Fold"
adapter = "@tuned"
[stage.score]
use = "eval"
matrix.model = ["@base", "@tuned", "@merged"]
[stage.again]
use = "eval"
model = "@merged"
gate = ["quiz.acc >= 0.9"]
[stage.late]
use = "tests.unit.kinds:Pack"
models = ["@merged"]
needs = ["@again"]
"""


def ended(made: Made, folder: Path) -> tuple[report.Ending, Path]:
    """The ending of a run of PIPELINE that made these artifacts; its second evaluation of `merged` missed its gate."""
    file = folder / "job.toml"
    file.write_text(PIPELINE, "utf-8")
    plan = pipeline.read(file)
    artifacts = {
        **made.artifacts,
        **{f"score[{n}]": a for n, a in made.reports.items()},
        "again": made.reports["merged"],
    }
    outcomes = {}
    for name, node in plan.nodes.items():
        kind = "eval" if name.startswith(("score", "again")) else "make"
        outcomes[name] = Outcome(name, kind, node.stage.makes(), "done", "key", artifacts.get(name), 1.5)
    outcomes["again"].verdicts = [Verdict("quiz.acc >= 0.9", False, "0.79 >= 0.9 is false")]
    outcomes["late"].state, outcomes["late"].artifact = "blocked", None
    outcomes["tuned"].warnings = ["2 rows left out"]
    run_dir = folder / "run"
    run_dir.mkdir()
    return report.ending(plan, outcomes, run_dir), run_dir


def test_the_report_of_a_run(made: Made, tmp_path: Path) -> None:
    found, run_dir = ended(made, tmp_path)
    rows = {row.artifact: row for row in found.rows}
    assert {name: (row.parent, row.base, row.verdict) for name, row in rows.items()} == {
        "base": (None, None, "measured"), "tuned": ("base", "base", "worse"), "merged": ("tuned", "base", "gate failed"),
    }  # fmt: skip
    assert len(rows["merged"].forgotten["quiz"]) == 12
    assert rows["merged"].learnt["quiz"] == ["art/090"]
    assert rows["merged"].changes == {"acc": 0, "ppl": 0}
    report.write(run_dir, found)
    assert {p.name for p in run_dir.iterdir()} == {"report.json", "report.md", "report.html", "junit.xml"}
    shown = (run_dir / "report.md").read_text("utf-8")
    for text in (
        "## Forgotten and learnt",
        "12 of 90",
        "`quiz.acc >= 0.9` | failed",
        "- tuned: 2 rows left out",
        "Holm",
    ):
        assert text in shown
    page = (run_dir / "report.html").read_text("utf-8")
    assert "Questions whose score changed" in page
    assert json.loads((run_dir / "report.json").read_text("utf-8"))["artifacts"][2]["verdict"] == "gate failed"


def test_the_table_of_a_run_speaks_of_one_set_in_all_its_columns() -> None:
    figures = [{"acc": acc, "low": 0.0, "high": 1.0} for acc in (0.9, 0.1, 0.8, 0.5)]
    scores, before = dict(zip("ab", figures, strict=False)), dict(zip("ab", figures[2:], strict=False))
    row = report.Row("x", "torch", "y", 1000, scores, {}, changes=report.changes(scores, before))
    assert row.cells()[2] == "90.0 % [0.0 %, 100.0 %]"
    assert row.cells()[6] == "acc +0.100 (y)"
    assert report.changes(scores, {"b": figures[3]}) == {}  # the parent was not asked what is shown


def test_ci_sees_each_stage_gate_and_set(made: Made, tmp_path: Path) -> None:
    found, run_dir = ended(made, tmp_path)
    found.outcomes["tuned"].error = StageFailed("no luck")
    report.write(run_dir, found)
    root = ElementTree.parse(run_dir / "junit.xml").getroot()
    assert (root.attrib["failures"], root.attrib["errors"]) == ("1", "1")
    cases = {(c.attrib["classname"], c.attrib["name"]): [child.tag for child in c] for c in root.iter("testcase")}
    assert cases["job.again", "quiz.acc >= 0.9"] == ["failure", "system-out"]
    assert cases["job.again", "quiz"] == ["system-out"]
    assert cases["job.late", "make"] == ["skipped"]
    assert cases["job.tuned", "make"] == ["error"]
    failure = root.find(".//failure")
    assert failure is not None
    assert failure.attrib["message"] == "gate 'quiz.acc >= 0.9' does not hold: 0.79 >= 0.9 is false"


def test_backends_of_one_artifact_have_names_of_their_own(made: Made) -> None:
    base = stored(made.store, "e1", "root", "model")
    child = stored(made.store, "e2", "leaf", "adapter", {"base": base})
    both = [evaluated(made.store, key, base, RIGHT, backend=b) for key, b in (("r7", "torch"), ("r8", "vllm"))]
    subjects = unique([*map(of_evaluation, both), of_evaluation(both[1])])
    assert [s.name for s in subjects] == ["root (torch)", "root (vllm)"]
    parent = comparison.nearest(of_evaluation(evaluated(made.store, "r9", child, RIGHT, backend="vllm")), subjects)
    assert parent
    assert parent.name == "root (vllm)"
    assert [s.backend for s in of_artifact(base, made.store)] == ["torch", "vllm"]
