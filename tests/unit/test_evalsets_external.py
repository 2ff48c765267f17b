"""Sets of other programs: what they leave becomes rows, and what they hide is counted. Their files are as they write."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from evalsets import named
from evalsets.ask import Client
from evalsets.external import evalscope, harness, lmeval
from evalsets.external.harness import External, Found, Run, Settings
from evalsets.external.kept import Kept
from evalsets.statistics import wilson
from suite import pipeline, processes
from suite.errors import SuiteError
from suite.evaluate import Evaluate
from suite.references import nano

PROMPT = "问题：一加一？\n选项：\nA) 1\nB) 2\nC) 3\nD) 4\n"


def work(folder: Path, name: str = "evalscope:general_mcq", data: Path | None = None, **settings: Any) -> Run:
    harness_name, _, task = name.partition(":")
    client = Client("http://127.0.0.1:1", concurrency=3, attempts=2)
    return Run(External(harness_name, task, data), client, "m", Settings(**settings), None, folder)


def write(path: Path, *lines: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")


def reviewed(index: int, reply: str, read: str, score: float, stop: str = "stop", time: float | None = 0.1) -> Any:
    """A question as EvalScope 1.14.1 writes it: its line in predictions, and in reviews."""
    output = {"choices": [{"stop_reason": stop}], "usage": {"output_tokens": 3} if time else None, "time": time}
    value = {
        "value": {"accuracy": score}, "status": "success", "extracted_prediction": read, "prediction": reply,
        "metadata": {}, "main_score_name": "accuracy",
    }  # fmt: skip
    messages = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": reply}]
    review = {"index": index, "target": ["B"], "messages": messages, "sample_score": {"score": value}}
    return {"index": index, "model_output": output}, review


def left(folder: Path, *questions: Any, reported: float) -> None:
    """What a run of EvalScope leaves, with one question more that it lost."""
    write(folder / "run/predictions/m/general_mcq_x.jsonl", *(q[0] for q in questions))
    write(folder / "run/reviews/m/general_mcq_x.jsonl", *(q[1] for q in questions))
    lost = {"subset": "x", "index": len(questions), "prompt": [], "target": "B", "error": "Error code: 500 - oops"}
    write(folder / "run/failures.jsonl", lost)
    identity = {"name": "accuracy", "aggregation": "mean", "dimensions": {}}
    report = {"primary_metric_identity": identity, "metrics": [{"identity": identity, "score": reported}]}
    write(folder / "run/reports/m/general_mcq.json", report)
    (folder / "run/reports/report.html").write_text("<script src=https://cdn.example></script>", "utf-8")


def figures(found: Found) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    rows = [harness._row(row) for row in found.rows]
    return harness.figures(found, rows)["total"], rows


def test_what_evalscope_leaves_out_counts_as_wrong(tmp_path: Path) -> None:
    questions = [
        reviewed(0, "答案：B", "B", 1.0),
        reviewed(1, "答案：B\n\n问题：又一\n答案：C", "C", 0.0, "max_tokens"),  # right, and ran on
        reviewed(2, "不知道", "", 0.0),
        reviewed(3, "maximum context length exceeded", "", 1.0, "model_length", None),  # an error taken for an answer
    ]
    left(tmp_path, *questions, reported=0.5)
    found = evalscope.found(work(tmp_path))
    total, rows = figures(found)
    low, high = wilson(1, 5)
    total.pop("intervals")
    assert total == {
        "score": 0.2, "low": low, "high": high, "n": 5, "failed": 2, "truncated": 1, "unparsed": 1,
        "metrics": {"accuracy": 0.2}, "second": {"acc": 0.4, "differ": 1}, "metric": "accuracy", "reported": 0.5,
    }  # fmt: skip
    assert [row["error"] for row in rows] == [
        "", "", "", "refused: maximum context length exceeded", "Error code: 500 - oops",
    ]  # fmt: skip
    assert (rows[1]["parsed"], rows[1]["second"], rows[1]["finish"]) == ("C", "B", "length")
    assert not (tmp_path / "run/reports/report.html").exists()


@pytest.mark.parametrize(
    ("reply", "parsed", "expected", "second"),
    [
        ("so 72\n#### 72\n\nQuestion: next?\n#### 5", "5", "72", ("72", 1)),  # right, and ran on
        ("She has 72.00 dollars.", "72.00", "#### 72", ("72.00", 1)), ("$1,200", "1,200", "9 + 3 = 12\n#### 1,200", ("1,200", 1)),
        ("no idea", None, "72", (None, 0)), ("it is 70", "70", "72", ("70", 0)),
    ],
)  # fmt: skip
def test_numbers_of_other_programs_are_read_again(
    reply: str, parsed: str | None, expected: str, second: tuple[str | None, float]
) -> None:
    row = {"prompt": "How many?", "expected": expected, "reply": reply, "parsed": parsed, "error": ""}
    found = harness._row(row)
    assert (found["second"], found["second_score"]) == second


def test_what_is_no_number_is_not_read_as_one() -> None:
    row = {"prompt": "Why?", "reply": "because of 3", "parsed": "x", "error": ""}
    for expected in ("in 1912", "3 apples", "Paris", 3, ["3"], ""):
        assert "second" not in harness._row({**row, "expected": expected})
    assert "second" not in harness._row(
        {**row, "expected": "2", "reply": "", "parsed": 1}
    )  # the index of the likeliest


def test_a_metric_that_could_not_be_computed_is_not_zero(tmp_path: Path) -> None:
    prediction, review = reviewed(0, "a b", "a b", 0.0)
    score = review["sample_score"]["score"]
    score |= {"value": {"bleu-1": 0.0, "bleu-2": 0.0, "Rouge-L-R": 0.5}, "main_score_name": "Rouge-L-R"}
    score["metadata"] = {"metric_errors": {"BLEU": "LookupError: \n***\n  Resource punkt_tab not found."}}
    left(tmp_path, (prediction, review), reported=0.5)
    found = evalscope.found(work(tmp_path))
    total, _ = figures(found)
    assert total["metrics"] == {"Rouge-L-R": 0.25}
    assert set(total["unavailable"]) == {"bleu-1", "bleu-2"}
    assert "punkt_tab" in total["unavailable"]["bleu-1"]
    found.metric = "bleu-1"
    assert "punkt_tab" in figures(found)[0]["not_available"]


def test_failures_are_not_counted_into_what_is_no_mean(tmp_path: Path) -> None:
    left(tmp_path, reviewed(0, "答案：B", "B", 1.0), reported=0.7)  # some figure of the whole
    total, _ = figures(evalscope.found(work(tmp_path)))
    assert "no mean over the questions" in total["not_available"]
    assert (total["n"], total["failed"]) == (2, 1)
    assert "no question" in figures(Found([], "acc", None))[0]["not_available"]


def test_evalscope_is_told_all_that_it_leaves_to_the_endpoint(tmp_path: Path) -> None:
    (tmp_path / "art_val.csv").write_text("", "utf-8")
    args = {"evalscope:general_mcq": {"few_shot_num": 2}}
    told = evalscope.job(work(tmp_path / "run", data=tmp_path, max_tokens=7, seed=5, stop=["#"], args=args))
    assert told["generation_config"] == {
        "max_tokens": 7, "temperature": 0.0, "seed": 5, "timeout": 120.0, "retries": 1, "stop_seqs": ["#"],
    }  # fmt: skip
    assert told["dataset_args"] == {
        "general_mcq": {"local_path": str(tmp_path), "subset_list": ["art"], "few_shot_num": 2}
    }
    assert (told["ignore_errors"], "use_cache" in told, told["no_timestamp"]) == (True, False, True)


def test_values_of_a_local_table_stay_texts(tmp_path: Path) -> None:
    source = tmp_path / "ceval"
    (source / "val").mkdir(parents=True)
    (source / "val/law_val.csv").write_text("id,question,A,B,C,D,answer\n7,q,1.10,NA,3,4,B\n", "utf-8")
    run = work(tmp_path / "work", "evalscope:ceval", source)
    evalscope.prepare(run)
    staged = Path(evalscope.job(run)["dataset_args"]["ceval"]["local_path"])
    row = json.loads((staged / "val/law.jsonl").read_text("utf-8"))
    assert (row["A"], row["B"]) == ("1.10", "NA")
    assert "config_name: law" in (staged / "README.md").read_text("utf-8")


def sampled(doc: int, reply: str, read: str, score: float) -> dict[str, Any]:
    """A question as lm-evaluation-harness 0.4.13 has it among its samples."""
    prompt = json.dumps([{"role": "user", "content": "1 + 1?\nA. 1\nB. 2\n答案："}])
    return {
        "doc_id": doc, "target": "B", "arguments": [[prompt, {}]], "resps": [[reply]], "filtered_resps": [read],
        "filter": "letter", "metrics": ["exact_match"], "exact_match": score,
    }  # fmt: skip


def test_a_task_becomes_rows(tmp_path: Path) -> None:
    samples = [
        sampled(0, "答案：B", "B", 1.0),
        sampled(1, "no idea", "[invalid]", 0.0),
        sampled(2, "", "[invalid]", 0.0),
    ]
    replies = {
        "t/0": {"finish": "stop", "tokens": 2},
        "t/1": {"finish": "length"},
        "t/2": {"error": "HTTP 400: too long"},
    }
    content = {
        "samples": {"t": samples + [{**s, "filter": "other", "exact_match": 1.0} for s in samples]},
        "results": {"t": {"alias": "t", "exact_match,letter": 1 / 3, "exact_match,other": 1.0}}, "replies": replies,
    }  # fmt: skip
    write(tmp_path / "result.json", content)
    total, rows = figures(lmeval.found(work(tmp_path, "lmeval:t")))
    assert (total["score"], total["n"], total["failed"], total["truncated"], total["unparsed"]) == (1 / 3, 3, 1, 1, 1)
    assert total["reported"] == 1 / 3
    assert [row["parsed"] for row in rows] == ["B", None, None]
    assert rows[0]["prompt"][0]["content"].startswith("1 + 1?")


def test_a_task_of_likelihoods_says_which_option_was_likeliest(tmp_path: Path) -> None:
    sample = {
        "doc_id": 0, "target": 1, "arguments": [["1 + 1?", " 1"], ["1 + 1?", " 2"]], "resps": [[[-3.0, False]], [[-1.0, True]]],
        "filtered_resps": [[-3.0, False], [-1.0, True]], "filter": "none", "metrics": ["acc"], "acc": 1.0,
    }  # fmt: skip
    write(tmp_path / "result.json", {"samples": {"t": [sample]}, "results": {"t": {"acc,none": 1.0}}, "replies": {}})
    total, rows = figures(lmeval.found(work(tmp_path, "lmeval:t")))
    assert (total["score"], rows[0]["parsed"], rows[0]["expected"]) == (1.0, 1, 1)


def test_names_of_sets(tmp_path: Path) -> None:
    assert harness.parse("ceval-mini") is None
    assert harness.parse("evalscope:gsm8k") == External("evalscope", "gsm8k")
    assert harness.parse("lmeval:mine=a=b/c") == External("lmeval", "mine", Path("a=b/c"))
    for wrong in ("evalscope:", "lmeval:x="):
        with pytest.raises(SuiteError, match="names no set"):
            harness.parse(wrong)
    assert [asked.name for asked in named.load(["ceval-mini", "lmeval:x"])] == ["ceval-mini", "lmeval:x"]
    with pytest.raises(SuiteError, match="two sets would be reported as 'lmeval:x'"):
        named.load(["lmeval:x", f"lmeval:x={tmp_path}"])
    with pytest.raises(SuiteError, match="no question sets"):
        named.load([])


def test_mistakes_are_found_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUITE_HOME", str(tmp_path))
    args = {"evalscope:x": {"few_shot_nmu": 1}}
    for settings, message in (
        ({"sets": ["evalscope:x=nowhere"]}, "sets: evalscope:x: no folder nowhere"),
        ({"sets": ["evalscope:x"], "external": {"args": args}}, "evalscope:x takes no option 'few_shot_nmu'"),
    ):  # fmt: skip
        with pytest.raises(SuiteError, match=message):
            Evaluate(model="x", **settings).check({"model": [None]})
    with pytest.raises(SuiteError, match="the environment 'evalscope' is not installed"):
        pipeline.one_stage("score", Evaluate(model=str(nano()), sets=["evalscope:x"]), tmp_path)


def test_a_pipeline_may_name_the_interpreter_of_another_program(tmp_path: Path) -> None:
    file = tmp_path / "p.toml"
    stage = '[stage.score]\nuse = "eval"\nmodel = "nano"\nsets = ["evalscope:x", "lmeval:y"]\n'
    own = "".join(f'[env.{name}]\npython = "{sys.executable}"\n' for name in ("evalscope", "lmeval"))
    file.write_text(stage + own)
    (node,) = pipeline.read(file).nodes.values()
    assert {name: str(found.python) for name, found in node.environments.items()} == dict.fromkeys(
        ("evalscope", "lmeval"), sys.executable
    )
    file.write_text(stage)
    with pytest.raises(SuiteError, match=r"p.toml:1: the environment 'evalscope' is not installed"):
        pipeline.read(file)


def test_the_identity_of_a_set_is_that_of_its_data(tmp_path: Path) -> None:
    (tmp_path / "a_val.csv").write_text("one", "utf-8")
    stage = Evaluate(model="x", sets=[f"evalscope:general_mcq={tmp_path}", "ceval-mini"])
    before = stage.recipe()
    assert "external" in before
    assert str(tmp_path) not in json.dumps(before)
    (tmp_path / "a_val.csv").write_text("two", "utf-8")
    assert stage.recipe()["sets"]["evalscope:general_mcq"] != before["sets"]["evalscope:general_mcq"]
    assert "external" not in Evaluate(model="x", sets=["ceval-mini"]).recipe()


def test_folders_are_those_beside_the_pipeline_file(tmp_path: Path) -> None:
    names = pipeline._absolute("evalscope:x=mcq", tmp_path), pipeline._absolute("lmeval:y=a=b/c", tmp_path)
    assert names == (f"evalscope:x={tmp_path}/mcq", f"lmeval:y={tmp_path}/a=b/c")
    assert pipeline._absolute("./own", tmp_path) == f"{tmp_path}/own"
    assert pipeline._absolute("ceval-mini", tmp_path) == "ceval-mini"


def test_answers_that_a_killed_script_was_given_are_used_once_each(tmp_path: Path) -> None:
    file, asked = tmp_path / "answers.jsonl", {"prompt": "1 + 1?", "seed": 0}
    with Kept(file) as kept:
        assert kept.take(asked) is None
        for answer in ("2", "two", "\ud83d"):
            kept.add(asked, {"text": answer})
    with file.open("ab") as torn:
        torn.write(b'{"asked": "x", "ans')
    with Kept(file) as kept:
        kept.add("later", 3)
        assert [kept.take({"seed": 0, "prompt": "1 + 1?"}) for _ in range(4)] == [
            {"text": "2"}, {"text": "two"}, {"text": "?"}, None,
        ]  # fmt: skip
    with Kept(file) as kept:
        assert (kept.take("later"), kept.take({**asked, "seed": 1})) == (3, None)


def test_only_answers_to_the_same_outlive_a_run(tmp_path: Path) -> None:
    for key, left in (("one", False), ("one", True), ("two", False)):
        harness._clear(tmp_path / "run", key)
        assert (tmp_path / "run" / harness.ANSWERS).exists() == left
        (tmp_path / "run" / harness.ANSWERS).write_text("{}", "utf-8")
        (tmp_path / "run" / "old").mkdir()
        (tmp_path / "run" / "done").write_text("", "utf-8")
    harness._clear(tmp_path / "run", "two")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [harness.ANSWERS, "key"]


def test_a_key_reaches_a_script_and_no_file(tmp_path: Path) -> None:
    script, out, log = tmp_path / "script.py", tmp_path / "out", tmp_path / "log"
    script.write_text(f"import os\nopen({str(out)!r}, 'w').write(os.environ['OPENAI_API_KEY'])\n", "utf-8")
    processes.run_script(Path(sys.executable), script, [], log, variables={"OPENAI_API_KEY": "secret-1"})
    assert out.read_text("utf-8") == "secret-1"
    assert "secret-1" not in log.read_text("utf-8")
    assert 1e6 < processes.peak_memory([os.getpid()]) < 1e11
    assert processes.peak_memory([2**22 + 1]) == 0
