"""Which answers, grades and evaluations are used again, and which are asked for, or made, anew."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from known_answers import ABOUT, good, make_sets, number, run
from openai_fake import Say, serve

from evalsets import identity, named
from evalsets.ask import Client
from evalsets.compare import compare
from evalsets.evaluation import evaluate
from serve.engines.vllm import Vllm
from suite.cli import main
from suite.errors import SuiteError
from suite.evaluate import Evaluate, Judge, evaluate_url


def test_an_unfinished_evaluation_continues_and_a_finished_one_starts_anew(tmp_path: Path) -> None:
    wanted, out = make_sets(tmp_path)[:1], tmp_path / "out"
    with serve(lambda b: Say(status=400) if number(b) % 2 else good(b)) as fake:
        assert evaluate_url(fake.url, "m", wanted, out)["choice"]["failed"] == 20
        port = int(fake.url.rpartition(":")[2])
    for expected in (20, 40):
        with serve(good, port=port) as fake:
            assert evaluate_url(fake.url, "m", wanted, out)["choice"]["acc"] == 1
            assert len(fake.asked) == expected


@pytest.mark.parametrize(
    ("other", "asked"),
    [
        ({}, 20), ({"created": 7, "root": "a"}, 40), ({"created": 9, "root": "b"}, 40),
        ({"created": 9, "root": "a", "owned_by": "x"}, 40),
    ],
)  # fmt: skip
def test_answers_of_an_unfinished_run_are_used_while_the_endpoint_says_the_same_of_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], other: dict[str, Any], asked: int
) -> None:
    wanted, out = make_sets(tmp_path)[:1], tmp_path / "out"
    card = {"created": 9, "root": "a", "permission": [{"id": "another each time"}]} if other else {}
    with serve(lambda b: Say(status=400) if number(b) % 2 else good(b), card=card) as fake:
        port = int(fake.url.rpartition(":")[2])
        assert evaluate_url(fake.url, "m", wanted, out)["choice"]["failed"] == 20
    with serve(good, card=other, port=port) as fake:
        assert evaluate_url(fake.url, "m", wanted, out)["choice"]["acc"] == 1
        assert len(fake.asked) == asked
    assert ("20 answers of 2" in capsys.readouterr().err) == (asked == 20)
    assert (out / "unfinished").exists() == (asked == 40)  # the other one's


def test_a_clock_in_a_card_tells_nothing(tmp_path: Path) -> None:
    """vLLM and others say the time of the request where others say when the model was made."""
    wanted, out = make_sets(tmp_path)[:1], tmp_path / "out"
    with serve(lambda b: Say(status=400) if number(b) % 2 else good(b), card={"created": int(time.time())}) as fake:
        port = int(fake.url.rpartition(":")[2])
        evaluate_url(fake.url, "m", wanted, out)
    with serve(good, card={"created": int(time.time()) + 1}, port=port) as fake:
        evaluate_url(fake.url, "m", wanted, out)
        assert len(fake.asked) == 20


def test_another_endpoint_is_another_model(tmp_path: Path) -> None:
    wanted, out = make_sets(tmp_path)[:1], tmp_path / "out"
    with serve(lambda b: Say(status=400)) as first, serve(good) as second:
        for fake in (first, second):
            evaluate_url(fake.url, "m", wanted, out)
            assert len(fake.asked) == 40


def test_answers_of_a_server_that_says_what_it_serves_are_used_while_it_serves_that(tmp_path: Path) -> None:
    wanted, out = make_sets(tmp_path)[:1], tmp_path / "out"
    for fingerprint, asked in (("one", 40), ("one", 0), ("two", 40), ("one", 0), ("../../two", 40)):
        with serve(good, card={"fingerprint": fingerprint}) as fake:
            assert evaluate_url(fake.url, "m", wanted, out)["choice"]["acc"] == 1
            assert len(fake.asked) == asked
    assert len([*(out / "asked").iterdir()]) == 3


def test_a_stage_knows_its_mistakes_before_anything_runs() -> None:
    for settings, message in (
        ({"sets": ["ceval-mnii"]}, "sets: no question set 'ceval-mnii'"),
        ({"backend": "trch"}, "backend: unknown backend 'trch'"),
        ({"engine": {"memory": 0.5}}, "engine.memory: this is for engines of other programs"),
        ({"engine": {"probe": False}, "backend": "llamacpp"}, "engine.probe: this is for engines of other programs"),
    ):
        with pytest.raises(SuiteError, match=message):
            Evaluate(model="x", **{"sets": ["perplexity"]} | settings).check({"model": [None]})


PLANNED = """
[env.vllm]
python = "{python}"
[stage.score]
use = "eval"
model = "nano"
sets = ["perplexity"]
backend = "vllm"
engine = {{ {engine} }}
"""


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ("extra = { max-num-seqs = 4 }", ""),
        ("extra = { max-num-sequences = 4 }", "9: engine.extra: vllm refuses --max-num-sequences 4"),
        ("quantization = 'odd', extra = { max-num-seqs = 'many' }", "refuses --max-num-seqs many: argument --max-num-seqs: invalid"),
    ],
)  # fmt: skip
def test_a_plan_asks_the_engines_own_parser(
    engine: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = "import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument('--max-num-seqs', type=int)"
    monkeypatch.setattr(Vllm, "parser", own)
    file = tmp_path / "pipeline.toml"
    file.write_text(PLANNED.format(python=sys.executable, engine=engine), "utf-8")
    assert main(["run", str(file), "--plan"]) == (2 if said else 0)
    assert said in capsys.readouterr().err


def test_what_the_engine_is_told_decides_the_key(tmp_path: Path) -> None:
    sets = make_sets(tmp_path)[:1]
    tables = ({}, {"max_length": 512}, {"tensor_parallel": 2}, {"probe": False}, {"extra": {"max-num-seqs": 4}})
    stages = [Evaluate(model="x", sets=sets, backend="vllm", engine=table) for table in tables]  # type: ignore[arg-type]
    for stage in stages:
        stage.check({"model": [None]})
    recipes = [stage.recipe() for stage in stages]
    assert len({json.dumps(recipe) for recipe in recipes}) == len(tables)
    assert "engine" not in recipes[0]  # or whatever is in stores would be asked again


def test_the_recipe_holds_what_the_sets_contain(tmp_path: Path) -> None:
    wanted = make_sets(tmp_path)[:1]
    stage = Evaluate(model="x", sets=wanted)
    before = stage.recipe()
    assert str(tmp_path) not in json.dumps(before)
    path = tmp_path / "choice/val/art_val.csv"
    path.write_text(path.read_text("utf-8").replace("Item 3 ", "Item 3 now "), "utf-8")
    assert stage.recipe() != before
    assert Evaluate(model="x", sets=wanted, concurrency=2).recipe() == stage.recipe()


def test_grades_of_another_judge_are_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever is asked: a server of ours keeps its answers, a judge whose weights changed grades them anew."""
    folder, out = tmp_path / "essays", tmp_path / "out"
    folder.mkdir()
    (folder / "set.toml").write_text(f'kind = "qa"\n{ABOUT}metrics = ["judge"]\n', "utf-8")
    (folder / "default.jsonl").write_text(json.dumps({"query": "question", "response": "reference"}), "utf-8")
    with serve(lambda body: Say("reply"), card={"fingerprint": "ours"}) as fake:
        for card, grade, asked in (
            ({"fingerprint": "one"}, 10, 1), ({"fingerprint": "one"}, 10, 0), ({"fingerprint": "two"}, 1, 1),
            ({"created": 7}, 4, 1), ({"created": 7}, 7, 1), ({"fingerprint": "one"}, 10, 0),
        ):  # fmt: skip
            verdict = Say(f"Grade: [[{grade}]]")
            with serve(lambda body, said=verdict: said, models=["j"], card=card) as court:  # type: ignore[misc]
                judge = Judge(url=court.url, model="j")
                found = evaluate_url(fake.url, "m", [str(folder)], out, judge=judge)
                assert (len(court.asked), found["essays"]["judge"]) == (asked, pytest.approx((grade - 1) / 9))
        assert len(fake.asked) == 1
    assert "2 answers of" in capsys.readouterr().err  # the reply, and its grade
    assert not (out / "unfinished").exists()


def test_a_metric_that_fails_on_an_answer_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (short,) = make_sets(tmp_path)[1:2]
    (tmp_path / "metric_of_this_test.py").write_text("def fails(reply, expected):\n    return 1 / 0\n", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    about = Path(short) / "set.toml"
    about.write_text(about.read_text("utf-8").replace('"rouge"', '"metric_of_this_test:fails"'), "utf-8")
    with serve(good) as fake:
        for _ in range(2):
            with pytest.raises(SuiteError, match="metric 'metric_of_this_test:fails' failed: ZeroDivisionError"):
                evaluate(Client(fake.url, concurrency=1), "m", named.load([short]), tmp_path / "out", tmp_path / "j")
        answered = len({body["messages"][0]["content"] for body in fake.asked})
        assert len(fake.asked) == answered  # none was asked twice


def test_how_replies_are_scored_is_in_the_key_and_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = make_sets(tmp_path)[:1]
    run(good, wanted, tmp_path / "a")
    before = Evaluate(model="x", sets=wanted)
    recipe, work = before.recipe(), before.work()
    package = tmp_path / "evalsets"
    shutil.copytree(Path(identity.__file__).parent, package, ignore=shutil.ignore_patterns("shipped"))
    monkeypatch.setattr(identity, "__file__", str(package / "identity.py"))
    for file in ("report.py", "extract/numbers.py"):  # the first decides nothing
        assert before.recipe() == recipe
        (package / file).write_text("# changed\n", "utf-8")
        identity.scoring.cache_clear()
    assert before.recipe() != recipe
    assert before.work() == work  # answers are good whoever reads them
    run(good, wanted, tmp_path / "b")
    identity.scoring.cache_clear()
    (remark,) = compare(tmp_path / "a", tmp_path / "b")["choice"]["remarks"]
    assert remark.startswith("scored by two versions of the suite")
    assert not compare(tmp_path / "a", tmp_path / "a")["choice"]["remarks"]


def test_all_that_scoring_imports_decides_the_key() -> None:
    package = Path(identity.__file__).parent
    code = "import sys, evalsets.external.harness, evalsets.score\n"
    code += "print(*(m.__file__ for name, m in sys.modules.items() if name.startswith('evalsets.')), sep='\\n')"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=package.parent)
    imported = {Path(line).relative_to(package) for line in shown.stdout.splitlines()}
    assert Path("kinds/choice.py") in imported
    assert imported <= {file.relative_to(package) for pattern in identity.SCORING for file in package.glob(pattern)}


def test_how_many_may_fail_is_in_the_key_and_answers_are_used_whatever_it_is(tmp_path: Path) -> None:
    wanted = make_sets(tmp_path)[:1]
    strict, lenient = Evaluate(model="x", sets=wanted), Evaluate(model="x", sets=wanted, max_failed=1)
    assert strict.recipe() != lenient.recipe()
    assert strict.work() == lenient.work() != Evaluate(model="x", sets=wanted, limit=1).work()


@pytest.mark.parametrize(("failing", "code"), [(1, 0), (2, 1)])
def test_a_command_fails_where_more_fail_than_may(tmp_path: Path, failing: int, code: int) -> None:
    (choice,) = make_sets(tmp_path)[:1]
    with serve(lambda body: Say(status=400) if number(body) < failing else good(body)) as fake:
        command = ["eval", "--url", fake.url, "--model", "m", "--sets", choice, "--max-failed", "1", "--json"]
        assert main(command) == code
