"""Where reports go besides their folder: files for CI, MLflow, Weights & Biases."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from openai_fake import Say, serve

from suite.cli import main
from suite.errors import SuiteError
from suite.reports import tracking
from suite.reports.subjects import of_evaluation
from suite.reports.tracking import flat
from suite.stages import Artifact
from tests.unit import evaluations

ABOUT = 'kind = "choice"\ntitle = "t"\nlanguages = ["en"]\nlicense = "CC0-1.0"\nsource = "a test"\n'


def missing(module: str) -> bool:
    """Whether a test of it cannot run here; in CI, which installs all of them, it would be a fault."""
    return not importlib.util.find_spec(module) and "CI" not in os.environ


@pytest.fixture
def quiz(tmp_path: Path) -> Path:
    """Ten questions whose right answer is A."""
    folder = tmp_path / "quiz"
    (folder / "val").mkdir(parents=True)
    (folder / "set.toml").write_text(ABOUT, "utf-8")
    lines = ["id,question,A,B,answer", *(f"{i},Item {i}?,x,y,A" for i in range(10))]
    (folder / "val" / "art_val.csv").write_text("\n".join(lines), "utf-8")
    return folder


def rule(body: dict[str, Any]) -> Say:
    return Say(status=400) if "Item 3?" in str(body["messages"]) else Say("A")


def test_the_report_of_an_endpoint_goes_where_it_is_wanted(quiz: Path, tmp_path: Path) -> None:
    junit, page, out = tmp_path / "junit.xml", tmp_path / "report.html", tmp_path / "out"
    with serve(rule) as fake:
        asked = ["eval", "--url", fake.url, "--model", "m", "--sets", str(quiz), "--json"]
        assert main([*asked, "--junit", str(junit), "--html", str(page), "--out", str(out)]) == 1
    failure = ElementTree.parse(junit).getroot().find("testsuite/testcase/failure")
    assert failure is not None
    assert failure.attrib["message"] == "1 of 10 questions failed"
    assert "art/3: HTTP 400" in str(failure.text)
    assert "90.0 %" in page.read_text("utf-8")
    subject = of_evaluation(Artifact(out, "report"))
    assert subject.speed["questions"] == 9
    assert subject.sets["quiz"]["total"]["acc"] == 0.9


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--junit", "no/such/folder/x.xml"], "no folder"), (["--html", "."], "is a folder"), (["--log", "tensorbord"], "invalid choice"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_said_before_anything_is_asked(
    flags: list[str], message: str, quiz: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve(rule) as fake:
        assert main(["eval", "--url", fake.url, "--model", "m", "--sets", str(quiz), *flags]) == 2
        assert not fake.asked
    assert message in capsys.readouterr().err


def test_a_run_leaves_junit_where_ci_looks(tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text('[stage.a]\nuse = "tests.unit.kinds:Make"\ngate = ["quality.score > 0.9"]\n', "utf-8")
    junit = tmp_path / "junit.xml"
    assert main(["run", str(file), "--junit", str(junit), "--json"]) == 3
    (case,) = (c for c in ElementTree.parse(junit).getroot().iter("testcase") if c.find("failure") is not None)
    assert case.attrib == {"classname": "job.a", "name": "quality.score > 0.9", "time": "0.000"}


def test_a_gate_that_failed_is_the_error_also_where_a_tracker_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise SuiteError("no room")

    monkeypatch.setattr(tracking, "check", lambda tracker: None)
    monkeypatch.setattr(tracking, "log", refuse)
    file = tmp_path / "job.toml"
    for limit, code in (("0.9", 3), ("0.1", 2)):
        file.write_text(f'[stage.a]\nuse = "tests.unit.kinds:Make"\ngate = ["quality.score > {limit}"]\n', "utf-8")
        assert main(["run", str(file), "--log", "mlflow", "--json"]) == code
        assert "no room" in capfd.readouterr().err


def test_a_tracker_that_is_not_there_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(SuiteError, match="wandb is not installed") as raised:
        tracking.check("wandb")
    assert raised.value.hint == "pip install wandb"
    with pytest.raises(SuiteError, match="unknown tracker 'mlfow'"):
        tracking.check("mlfow")


def test_numbers_have_their_path_and_nothing_else_has() -> None:
    metrics = {"a[1]": {"quiz": {"acc": 0.5, "n": 4, "ok": True, "why": "x", "none": None}, "ids": [1]}, "memory": 7}
    assert dict(flat(metrics)) == {"a[1].quiz.acc": 0.5, "a[1].quiz.n": 4.0, "memory": 7.0}


@pytest.fixture
def finished(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    return tmp_path / "done", {"score[base]": evaluations.write(tmp_path / "done", "m", [1.0, 0.0])}


@pytest.mark.skipif(missing("mlflow"), reason="needs mlflow-skinny")
def test_mlflow_keeps_numbers_and_reports(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    folder, metrics = finished
    tracking.log("mlflow", "job/1", metrics, folder)
    (run,) = mlflow.search_runs(experiment_names=["suite"], output_format="list")
    assert run.info.run_name == "job/1"
    assert run.data.metrics["score_base_.quiz.acc"] == 0.5
    kept = mlflow.MlflowClient().list_artifacts(run.info.run_id)
    assert {file.path for file in kept} == {"report.json", "report.md", "report.html", "junit.xml"}
    mlflow.set_tracking_uri("nowhere://x")
    with pytest.raises(SuiteError, match="--log mlflow: "):
        tracking.log("mlflow", "job/2", metrics, folder)


@pytest.mark.skipif(missing("wandb"), reason="needs wandb")
def test_wandb_keeps_numbers_and_reports(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    folder, metrics = finished
    tracking.log("wandb", "job/1", metrics, folder)
    wandb.teardown()  # as at the end of the command: then all of it is on the disk
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    written = next(run.glob("*.wandb")).read_bytes()
    for text in (b"score[base].quiz.acc", b"junit.xml", b"report.html"):
        assert text in written
