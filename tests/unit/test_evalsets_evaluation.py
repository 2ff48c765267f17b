"""Whole evaluations of an endpoint whose right answers are known: the scores are what its rule implies, to the digit."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from known_answers import ABOUT, OVERFLOW, TEXTS, good, make_sets, number, right, run, scored
from openai_fake import Say, serve

from evalsets import named
from evalsets.ask import Client
from evalsets.compare import compare
from evalsets.evaluation import Judge, evaluate
from evalsets.report import table
from evalsets.statistics import wilson
from suite.errors import SuiteError
from suite.evaluate import evaluate_url


def test_a_right_model_scores_all(tmp_path: Path) -> None:
    wanted = make_sets(tmp_path)
    found = run(good, wanted, tmp_path / "out").metrics
    found["choice"].pop("intervals")
    assert found["choice"] == {
        "acc": 1.0, "low": wilson(40, 40).low, "high": 1.0, "n": 40, "failed": 0, "truncated": 0, "unparsed": 0, "macro": 1.0,
    }  # fmt: skip
    assert found["short"]["exact"] == 0.5
    assert found["short"]["rouge1"] == pytest.approx((1 + 2 / 3 + 1 + 1 / 3) / 4, abs=0.2)
    assert found["short"]["low"] <= found["short"]["rougeL"] <= found["short"]["high"]
    assert found["texts"]["ppl"] == pytest.approx(math.exp(2))
    assert found["texts"]["truncated"] == 0
    assert found["texts"]["tokens"] == sum(len(t) - 1 for t in TEXTS)
    assert found["speed"]["questions"] == 44
    assert found["speed"]["latency_p50"] > 0


def test_requests_carry_the_settings_of_the_set(tmp_path: Path) -> None:
    wanted = make_sets(tmp_path)
    with serve(good) as fake:
        evaluate(Client(fake.url), "m", named.load(wanted), tmp_path / "out", tmp_path / "j")
    choice, qa = (next(b for b in fake.asked if str(b.get("messages")).find(what) > 0) for what in ("Item", "one"))
    assert {k: v for k, v in choice.items() if k != "messages"} == {
        "model": "m", "max_tokens": 5, "temperature": 0, "seed": 3, "stop": ["#"],
    }  # fmt: skip
    assert {k: v for k, v in qa.items() if k != "messages"} == {
        "model": "m",
        "max_tokens": 256,
        "temperature": 0,
        "seed": 0,
    }
    text = next(b for b in fake.asked if "prompt" in b)
    assert (text["max_tokens"], text["echo"], text["temperature"]) == (0, True, 0)


def test_faults_are_counted_and_nothing_leaves_the_denominator(tmp_path: Path) -> None:
    """Of 40: 4 fail for good, 4 are unreadable, 4 undecided, 4 wrong and cut off, 4 right but run on, 20 right."""

    def rule(body: dict[str, Any]) -> Say:
        i, key = number(body), right(body)
        wrong = "ABCD"[("ABCD".index(key) + 1) % 4]
        table = {
            0: Say(status=500), 1: Say(body=b"garbage"), 2: Say("no idea"), 3: Say(f"{wrong}, becau", finish="length"),
            4: Say(f"Answer: {key}\n\nNext question\nAnswer: {wrong}", finish="length"),
        }  # fmt: skip
        return table.get(i % 10, Say(f"答案：{key.lower()}"))

    choice = make_sets(tmp_path)[:1]
    found = run(rule, choice, tmp_path / "out")
    total = found.metrics["choice"]
    low, high = wilson(24, 40)
    total.pop("intervals")
    assert total == {
        "acc": 0.6, "low": low, "high": high, "n": 40, "failed": 8, "truncated": 8, "unparsed": 4, "macro": pytest.approx(0.6),
    }  # fmt: skip
    assert found.failed == 8
    rows = [json.loads(x) for x in (tmp_path / "out/answers/choice.jsonl").read_text("utf-8").splitlines()]
    assert [r["id"] for r in rows] == sorted(r["id"] for r in rows)
    assert sum(r["score"] for r in rows) == 24
    assert {r["error"] for r in rows} == {"", "HTTP 500: (empty)", "not an OpenAI reply: garbage"}
    shown = (tmp_path / "out/report.md").read_text("utf-8")
    for text in ("60.0 %", "HTTP 500", "no idea", "art", "law"):
        assert text in shown


def test_answers_and_report_are_the_same_bytes_again(tmp_path: Path) -> None:
    wanted = make_sets(tmp_path)
    for out in ("one", "two"):
        run(good, wanted, tmp_path / out)
    assert all(
        not s["problems"] for s in json.loads((tmp_path / "one/report.json").read_text("utf-8"))["sets"].values()
    )
    for name in ("report.json", "report.md", "answers/choice.jsonl", "answers/short.jsonl", "answers/texts.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_an_endpoint_without_echo_has_no_perplexity_and_says_so(tmp_path: Path) -> None:
    def rule(body: dict[str, Any]) -> Say | dict[str, Any]:
        return (
            Say(status=400, body=b'{"error": {"message": "echo is not supported"}}') if "prompt" in body else good(body)
        )

    wanted = make_sets(tmp_path)
    found = run(rule, wanted, tmp_path / "out")
    assert found.metrics["texts"] == {"not_available": "HTTP 400: echo is not supported"}
    assert found.failed == 0
    assert "not available" in (tmp_path / "out/report.md").read_text("utf-8")
    run(good, wanted, tmp_path / "other")
    assert compare(tmp_path / "other", tmp_path / "out")["texts"]["verdict"] == "cannot tell"


def test_without_one_of_the_texts_there_is_no_perplexity_and_the_text_has_failed(tmp_path: Path) -> None:
    wanted = make_sets(tmp_path)[2:]
    found = run(lambda b: Say(status=500) if b["prompt"] == TEXTS[0] else scored(b), wanted, tmp_path / "out")
    assert (found.metrics["texts"]["failed"], found.metrics["texts"]["n"], found.failed) == (1, 3, 1)
    assert found.metrics["texts"]["not_available"] == "1 of 3 texts were not measured"
    assert found.sets["texts"]["problems"] == [{"id": "default/00001", "what": "failed", "text": "HTTP 500: (empty)"}]


def test_progress_counts_each_set(tmp_path: Path) -> None:
    seen: list[tuple[float, float, str, float]] = []

    def progress(step: float, total: float, what: str = "", **values: float) -> None:
        seen.append((step, total, what, values["failed"]))

    run(good, make_sets(tmp_path), tmp_path / "out", progress=progress)
    assert [s[0] for s in seen if s[2] == "choice"] == list(range(1, 41))
    assert seen[-1] == (3, 3, "texts", 0)


def test_a_comparison_is_paired_by_question(tmp_path: Path) -> None:
    wanted = make_sets(tmp_path)

    def worse(body: dict[str, Any]) -> Say | dict[str, Any]:
        if "prompt" in body:
            return scored(body, 2.5)
        if "Item" in str(body["messages"]) and number(body) < 8:
            return Say("none of them")
        return Say(status=500) if "Item 39 " in str(body["messages"]) else good(body)

    run(good, wanted, tmp_path / "a")
    run(worse, wanted, tmp_path / "b")
    found = compare(tmp_path / "a", tmp_path / "b")
    assert found["choice"]["verdict"] == "worse"
    assert found["choice"]["lost"] == [f"art/{i}" for i in range(8)]
    assert (found["choice"]["gained"], found["choice"]["n"], found["choice"]["left_out"]) == ([], 39, 1)
    assert found["choice"]["difference"] == pytest.approx(-8 / 39)
    assert found["short"]["verdict"] == "cannot tell"
    assert found["texts"]["difference"] > 0
    assert len(found["texts"]["lost"]) == 3
    back = compare(tmp_path / "b", tmp_path / "a")
    assert back["choice"]["verdict"] == "better"
    assert compare(tmp_path / "a", tmp_path / "a")["choice"]["verdict"] == "cannot tell"
    with pytest.raises(SuiteError, match="no evaluation report"):
        compare(tmp_path / "a", tmp_path)


def test_a_changed_question_is_not_compared(tmp_path: Path) -> None:
    wanted = make_sets(tmp_path)[:1]
    run(good, wanted, tmp_path / "a")
    path = tmp_path / "choice/val/art_val.csv"
    path.write_text(path.read_text("utf-8").replace("Item 3 ", "Item 3 now "), "utf-8")
    run(good, wanted, tmp_path / "b")
    found = compare(tmp_path / "a", tmp_path / "b")["choice"]
    assert (found["n"], found["left_out"]) == (39, 2)


def test_a_url_is_evaluated_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = make_sets(tmp_path)
    with serve(good) as fake:
        found = evaluate_url(fake.url, "m", wanted, tmp_path / "out", show=True)
        with pytest.raises(SuiteError, match="no model 'x'"):
            evaluate_url(fake.url, "x", wanted)
    assert found["choice"]["acc"] == 1
    shown = capsys.readouterr().out
    assert "100.0 %" in shown
    assert (tmp_path / "out/report.json").is_file()


def test_what_is_written_as_answers_come_says_what_they_are_worth(tmp_path: Path) -> None:
    wanted = make_sets(tmp_path)
    run(good, wanted, tmp_path / "out")
    lines = {
        name: [json.loads(line) for line in (tmp_path / f"out/journal/{name}.jsonl").read_text("utf-8").splitlines()]
        for name in ("choice", "short", "texts")
    }
    answers = {line["id"]: line for line in lines["choice"] if "prompt" in line}
    worth = {line["id"]: line for line in lines["choice"] if "score" in line}
    assert (len(lines["choice"]), len(answers)) == (80, 40)
    for name, line in answers.items():
        assert line["prompt"][0]["content"].startswith("Item")
        said = worth[name]["expected"]
        assert (worth[name]["parsed"], worth[name]["score"], worth[name]["digest"]) == (said, 1.0, line["digest"])
        assert (line["text"], line["finish"], line["tokens"], line["latency"] > 0) == (said, "stop", 1, True)
    assert sum(line.get("score", 0) for line in lines["short"]) > 2
    assert {line["prompt"] for line in lines["texts"] if "prompt" in line} == {*TEXTS}
    assert sorted(line["nll"] for line in lines["texts"] if "nll" in line) == sorted(2.0 * (len(t) - 1) for t in TEXTS)


def test_leakage_is_looked_for_where_the_training_data_is_named(tmp_path: Path) -> None:
    wanted, data = make_sets(tmp_path)[1:2], tmp_path / "train.jsonl"
    with (tmp_path / "short/default.jsonl").open("a", encoding="utf-8") as file:
        text = "Where did the old grey goose lay its very first golden egg?"
        file.write("\n" + json.dumps({"query": text, "response": "there"}))
    data.write_text(json.dumps({"text": text}), "utf-8")
    with serve(lambda body: Say("there")) as fake:
        found = evaluate_url(fake.url, "m", wanted, tmp_path / "out", learnt=[data])
        unknown = evaluate_url(fake.url, "m", wanted, tmp_path / "other")
    assert found["short"]["leakage"]["n"] == 1
    assert "--leakage" in unknown["short"]["leakage"]["not_available"]
    assert "1 questions (20.0 %) overlap" in (tmp_path / "out/report.md").read_text("utf-8")
    assert "Leakage is not known" in (tmp_path / "other/report.md").read_text("utf-8")


def with_likelihoods(folder: str) -> None:
    file = Path(folder) / "set.toml"
    file.write_text("likelihood = true\n" + file.read_text("utf-8"), "utf-8")


def test_an_option_that_was_not_measured_is_a_failed_question(tmp_path: Path) -> None:
    wanted, out = make_sets(tmp_path)[:1], tmp_path / "out"
    with_likelihoods(wanted[0])

    def rule(body: dict[str, Any]) -> Say | dict[str, Any]:
        if "prompt" not in body:
            return good(body)
        found = re.search(r"Item (\d+) \(key (.)\)", body["prompt"])
        assert found
        if int(found[1]) % 4 == 0 and body["prompt"].endswith("B"):
            return Say(status=400, body=OVERFLOW) if found[1] == "0" else Say(status=500)
        return scored(body, 1.0 if body["prompt"].endswith(found[2]) else 1.1)

    with serve(rule) as fake:
        found = evaluate_url(fake.url, "m", wanted, out)["choice"]
        asked = len(fake.asked)
        port = int(fake.url.rpartition(":")[2])
    assert (found["acc"], found["failed"], found["likelihood"]["acc"]) == (1.0, 10, 0.75)
    assert found["likelihood"]["failed"] == 10
    shown = (out / "report.md").read_text("utf-8")
    assert re.search(r"by likelihood 75.0 %.* \(10 failed\)", shown)
    assert "options: HTTP 500" in shown
    assert "options: HTTP 400: maximum context" in shown
    with serve(lambda b: scored(b) if "prompt" in b else good(b), port=port) as fake:
        assert evaluate_url(fake.url, "m", wanted, out)["choice"]["failed"] == 0
        assert (len(fake.asked), asked > 200) == (10, True)


def test_likelihoods_of_options_stand_beside_what_was_generated(tmp_path: Path) -> None:
    (choice,) = make_sets(tmp_path)[:1]
    with_likelihoods(choice)

    def rule(body: dict[str, Any]) -> Say | dict[str, Any]:
        if "prompt" not in body:
            return Say("A")
        key = body["prompt"].split("(key ")[1][0]
        return scored(body, 1.0 if body["prompt"].endswith(key) else 1.1)

    total = run(rule, [choice], tmp_path / "out").metrics["choice"]
    assert (total["acc"], total["likelihood"]["acc"], total["likelihood"]["failed"]) == (0.25, 1.0, 0)
    with serve(lambda b: Say(status=400, body=b'{"error": "no echo"}') if "prompt" in b else good(b)) as fake:
        found = evaluate(Client(fake.url), "m", named.load([choice]), tmp_path / "two", tmp_path / "two/journal")
    assert found.metrics["choice"]["likelihood"] == {"not_available": "HTTP 400: no echo"}
    assert sum("prompt" in body for body in fake.asked) == 1  # one was enough to know


def test_a_judge_grades_what_was_answered(tmp_path: Path) -> None:
    folder = tmp_path / "essays"
    folder.mkdir()
    (folder / "set.toml").write_text(f'kind = "qa"\n{ABOUT}metrics = ["judge", "exact"]\n', "utf-8")
    rows = [{"query": f"question {i}", "response": f"reference {i}"} for i in range(4)]
    (folder / "default.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    verdicts = {0: "Grade: [[10]]", 1: "Grade: [[1]]", 2: "I like it."}

    def answering(body: dict[str, Any]) -> Say:
        return Say(status=500) if number(body) == 3 else Say(f"reply {number(body)}")

    def judging(body: dict[str, Any]) -> Say:
        text = body["messages"][0]["content"]
        (i,) = (i for i in verdicts if f"reply {i}" in text and f"reference {i}" in text)
        return Say(verdicts[i])

    with serve(answering) as fake, serve(judging, models=["j"]) as court:
        client = Client(fake.url, pause=0.001, attempts=2)
        sets, out = named.load([str(folder)]), tmp_path / "out"
        judge = Judge(Client(court.url), "j", out / "grades")
        for kept in (0, 6):  # what was graded is not graded again
            found = evaluate(client, "m", sets, out, out / "journal", judge=judge)
            assert (len(court.asked), found.kept) == (3, kept)
        total = found.metrics["essays"]
        with pytest.raises(SuiteError, match="no model 'k'"):
            evaluate(client, "m", sets, out, out / "journal", judge=replace(judge, model="k"))
    assert (total["n"], total["failed"], total["exact"]) == (4, 2, 0.0)
    with pytest.raises(SuiteError, match="a judge grades the replies to 'essays', and there is none"):
        evaluate_url(court.url, "j", [str(folder)])


def test_the_table_has_a_line_for_each_set(tmp_path: Path) -> None:
    found = run(good, make_sets(tmp_path), tmp_path / "out")
    assert table("m", found.sets).row_count == 3
