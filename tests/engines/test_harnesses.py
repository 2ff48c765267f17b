"""EvalScope and lm-evaluation-harness beside our own scoring: same questions, same prompts, same replies, same scores.

EvalScope writes options as `A) `, we as `A. `, and neither can be told otherwise. So that the prompts are equal all the
same, every question lists its options both ways.
"""

from __future__ import annotations

import csv
import itertools
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from evalsets import named, sets
from evalsets.ask import Client
from evalsets.evaluation import evaluate
from evalsets.external.harness import Settings
from evalsets.metrics import toolbench
from evalsets.sets import Question
from serve.backends import endpoint
from suite.envs import Environment
from suite.processes import foreign
from tests.unit.openai_fake import Say, serve

NANO = Path(__file__).parents[2] / "examples" / "nano" / "model"
MAX_TOKENS = 8
QUESTIONS = 60

ABOUT = f"""
kind = "choice"
title = "the questions of ceval-mini, their options listed twice"
languages = ["zh"]
license = "CC0-1.0"
source = "ceval-mini"
likelihood = true
generation = {{max_tokens = {MAX_TOKENS}}}
"""
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
validation_split: validation
doc_to_text: "{{{{prompt}}}}"
"""
GENERATED = """
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {until: [], max_gen_toks: 8}
filter_list: [{name: letter, filter: [{function: regex, regex_pattern: "([ABCD])"}, {function: take_first}]}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
NUMBERS = """
task: numbers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
output_type: generate_until
generation_kwargs: {{until: [], max_gen_toks: 512}}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    regexes_to_ignore: [",", "\\\\$", "(?s).*#### "]
filter_list: [{{name: strict, filter: [{{function: regex, regex_pattern: "#### (-?[0-9.,]+)"}}, {{function: take_first}}]}}]
"""
CHOSEN = """
output_type: multiple_choice
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def environments(installed: Callable[[str], Environment]) -> None:
    for name in ("evalscope", "lmeval"):
        installed(name)


@pytest.fixture(scope="module")
def asked(environments: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ceval-mini as a set of ours with likelihoods, and its prompts as data of the two programs."""
    folder = tmp_path_factory.mktemp("asked")
    for name in ("mini/val", "mcq", "tasks"):
        (folder / name).mkdir(parents=True)
    questions = sets.load("ceval-mini").questions(QUESTIONS)
    (folder / "mini" / "set.toml").write_text(ABOUT, "utf-8")
    header = ["id", "question", *"ABCD", "answer"]
    with (folder / "mini/val/all_val.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(header)
        table.writerows([i, listed(q, ") ") + q.stem, *q.options, q.expected] for i, q in enumerate(questions))
    own = sets.load(str(folder / "mini")).questions()
    data = folder / "mcq" / "all_val.jsonl"
    rows = (
        {
            "question": q.stem + "\n" + listed(q, ". ") + "答案：",
            "prompt": o.messages[-1]["content"],
            "answer": q.expected,
        }
        | dict(zip(q.letters, q.options, strict=True))
        for q, o in zip(questions, sorted(own, key=lambda o: int(o.id.rpartition("/")[2])), strict=True)
    )
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    for name, how in (("generated", GENERATED), ("chosen", CHOSEN)):
        (folder / "tasks" / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + how, "utf-8")
    return folder


def listed(question: Question, mark: str) -> str:
    pairs = zip(question.letters, question.options, strict=True)
    return "".join(f"{letter}{mark}{option}\n" for letter, option in pairs)


def run(url: str, model: str, folder: Path, wanted: list[str], out: Path, **client: Any) -> dict[str, Any]:
    """A report's sets, each with its rows by prompt."""
    args = {"evalscope:general_mcq": {"prompt_template": "{choices}\n{question}"}}
    found = evaluate(
        Client(url, concurrency=8, **client), model, named.load([w.format(folder) for w in wanted]), out, out / "journals",
        external=Settings(max_tokens=MAX_TOKENS, args=args),
    ).sets  # fmt: skip
    for name, one in found.items():
        lines = (out / "answers" / f"{name}.jsonl").read_text("utf-8").splitlines()
        one["rows"] = {prompt(row): row for row in map(json.loads, lines)}
    return found


def prompt(row: dict[str, Any]) -> str:
    asked = row["prompt"]
    return str(asked if isinstance(asked, str) else asked[-1]["content"])


ALL = ["{}/mini", "evalscope:general_mcq={}/mcq", "lmeval:generated={}/tasks", "lmeval:chosen={}/tasks"]


@pytest.fixture(scope="module")
def nano(asked: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    home = pytest.MonkeyPatch()
    out = tmp_path_factory.mktemp("out")
    from tests.engines.conftest import HOME

    home.setenv("SUITE_HOME", str(HOME))
    with endpoint(NANO) as served:
        yield run(served.url, "base", asked, ALL, out)
    home.undo()


@pytest.mark.parametrize("other", ["evalscope:general_mcq", "lmeval:generated"])
def test_same_prompts_get_the_same_replies_and_are_read_alike(nano: dict[str, Any], other: str) -> None:
    """nano answers in words, which the two programs do not read: their report has our reading beside theirs."""
    ours, theirs, total = nano["mini"]["rows"], nano[other]["rows"], nano[other]["total"]
    assert {text: row["reply"] for text, row in theirs.items()} == {text: row["reply"] for text, row in ours.items()}
    assert {text: row["second"] for text, row in theirs.items()} == {text: row["parsed"] for text, row in ours.items()}
    assert (total["n"], total["failed"], total["second"]["acc"]) == (QUESTIONS, 0, nano["mini"]["total"]["acc"])
    assert total["score"] == pytest.approx(total["reported"], abs=1e-3)
    assert total["unparsed"] == sum(row["parsed"] is None for row in theirs.values()) > 0


def test_likelihoods_choose_the_same_options(nano: dict[str, Any]) -> None:
    ours, theirs = nano["mini"]["rows"], nano["lmeval:chosen"]["rows"]
    assert {text: row["likely"] for text, row in ours.items()} == {
        t: "ABCD"[row["parsed"]] for t, row in theirs.items()
    }
    assert nano["lmeval:chosen"]["total"]["score"] == nano["mini"]["total"]["likelihood"]["acc"]


def test_what_fails_is_counted_by_all(asked: Path, tmp_path: Path) -> None:
    """Of every 10: one is too long, one fails for good, one is not read, one is right and runs on, the rest are right."""
    questions = sets.load(str(asked / "mini")).questions()
    number = {q.messages[-1]["content"]: i for i, q in enumerate(questions)}
    expected = {q.messages[-1]["content"]: q.expected for q in questions}

    def rule(body: dict[str, Any]) -> Say:
        if "prompt" in body:
            return Say(status=400)
        text = body["messages"][-1]["content"]
        assert (body["max_tokens"], body["temperature"], body["seed"]) == (MAX_TOKENS, 0, 0)
        return {
            0: Say(status=400, body=b'{"error": {"message": "maximum context length is 100 tokens"}}'), 1: Say(status=500),
            2: Say("？"), 3: Say(f"答案：{expected[text]}\n\n下一题 答案：E", finish="length"),
        }.get(number[text] % 10, Say(f"答案：{expected[text]}"))  # fmt: skip

    with serve(rule) as fake:
        found = run(fake.url, "m", asked, ALL[:3], tmp_path, attempts=2, pause=0.01)
    n = len(questions)
    of = [sum(i % 10 == rest for i in range(n)) for rest in range(10)]
    for name, one in found.items():
        total = one["total"]
        assert (total["n"], total["failed"], total["truncated"]) == (n, of[0] + of[1], of[3]), name
        errors = [row["error"] for row in one["rows"].values() if row["error"]]
        assert sum("maximum context length" in error for error in errors) == of[0]
        assert sum("500" in error for error in errors) == of[1]
        assert total["unparsed"] >= of[2]
    right = n - of[0] - of[1] - of[2]
    assert found["lmeval:generated"]["total"]["score"] == found["mini"]["total"]["acc"] == right / n
    ours, others = found["mini"]["rows"], found["lmeval:generated"]["rows"]
    assert {text: row["score"] for text, row in ours.items()} == {text: row["score"] for text, row in others.items()}
    theirs = found["evalscope:general_mcq"]["total"]
    assert theirs["score"] == pytest.approx((right - of[3]) / n)  # it takes the last answer of a reply that ran on
    assert (theirs["second"]["acc"], theirs["second"]["differ"]) == (right / n, of[3])
    assert theirs["reported"] == pytest.approx(theirs["score"] * n / (n - of[1]), abs=1e-3)  # lost ones left out


def test_numbers_get_the_same_score(environments: None, tmp_path: Path) -> None:
    """GSM8K's form and lm-evaluation-harness' own way to read it; of every 6 one fails, one is wrong and one no number."""
    data, n = tmp_path / "numbers" / "test.jsonl", 36
    (tmp_path / "tasks").mkdir()
    data.parent.mkdir()
    rows = [{"question": f"How much is {i} times 250?", "answer": f"They are #### {i * 250:,}"} for i in range(n)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (tmp_path / "tasks" / "numbers.yaml").write_text(NUMBERS.format(data=data), "utf-8")

    def rule(body: dict[str, Any]) -> Say:
        i = int(body["messages"][-1]["content"].split()[3])
        says = {
            0: Say(status=500), 1: Say(f"First 3, then 4. #### {i * 250 + 1}"), 2: Say("Who knows?"),
            3: Say(f"First 3, then 4.\n#### {i * 250:,}"), 4: Say(f"#### {i * 250}", finish="length"),
        }  # fmt: skip
        return says.get(i % 6, Say(f"Thus\n#### {i * 250}"))

    with serve(rule) as fake:
        found = run(
            fake.url, "m", tmp_path, ["{}/numbers", "lmeval:numbers={}/tasks"], tmp_path, attempts=2, pause=0.01
        )
    ours, theirs = found["numbers"], found["lmeval:numbers"]
    for name in ("n", "failed", "truncated", "unparsed"):
        assert ours["total"][name] == theirs["total"][name] == (n if name == "n" else n / 6), name
    scores = {text: row["score"] for text, row in ours["rows"].items()}
    assert scores == {text: row["score"] for text, row in theirs["rows"].items()}
    assert ours["total"]["acc"] == theirs["total"]["score"] == theirs["total"]["second"]["acc"] == 0.5


def test_what_failed_is_all_that_a_second_run_asks(asked: Path, tmp_path: Path) -> None:
    """As after a kill, for answers are written as they come."""
    wanted, seen = ["evalscope:general_mcq={}/mcq", "lmeval:generated={}/tasks"], list[str]()

    def half(body: dict[str, Any]) -> Say:
        seen.append(body["messages"][-1]["content"])
        return Say(status=500) if len(seen[-1]) % 2 else Say("答案：A")

    with serve(half) as fake:
        first = run(fake.url, "m", asked, wanted, tmp_path, attempts=1)
    failed = sorted(text for text in seen if len(text) % 2)
    assert {one["total"]["failed"] for one in first.values()} == {len(failed) / 2}
    assert 0 < len(failed) < len(seen)
    seen.clear()

    def well(body: dict[str, Any]) -> Say:
        seen.append(body["messages"][-1]["content"])
        return Say("答案：A")

    with serve(well) as fake:
        second = run(fake.url, "m", asked, wanted, tmp_path, attempts=1)
    assert sorted(seen) == failed
    assert {one["total"]["failed"] for one in second.values()} == {0}


def test_english_bleu_is_not_available_without_its_tokenizer(environments: None, tmp_path: Path) -> None:
    """NLTK's punkt_tab is on no machine by itself; EvalScope says 0 then."""
    data = tmp_path / "qa" / "default.jsonl"
    data.parent.mkdir()
    rows = [{"query": f"Say number {i}.", "response": f"number {i} it is"} for i in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    with serve(lambda body: Say(f"number {body['messages'][-1]['content'].split()[-1][0]} it is")) as fake:
        found = run(fake.url, "m", tmp_path, ["evalscope:general_qa={}/qa"], tmp_path)["evalscope:general_qa"]
    total = found["total"]
    assert {f"bleu-{i}" for i in range(1, 5)} <= set(total["unavailable"])
    assert "punkt_tab" in total["unavailable"]["bleu-4"]
    assert not any(name.startswith("bleu") for name in total["metrics"])
    assert (total["score"], total["n"], total["metrics"]["Rouge-L-R"]) == (pytest.approx(1), 4, pytest.approx(1))


TARGETS = (
    "Action: ring\nAction Input: {}", 'Thought: so\nAction: ring\nAction Input: {"bell": "big", "times": 2}',
    "Action: ring\nAction Input: no object",
    'Action: Finish\nAction Input: {"return_type": "give_answer", "final_answer": "it rang twice today"}',
    'Action: Finish\nAction Input: {"return_type": "give_up_and_restart"}',
)  # fmt: skip
REPLIES = (
    *TARGETS, "", "I cannot.", "Action: fly\nAction Input: {}", 'Action: ring\nAction Input: {"bell": "small", "times": 2}',
    'Action: ring\nAction Input: {"times": 2, "bell": "big", "more": null}', "Action: ring", "Action: ring\nAction Input: [1]",
    'Action: Finish\nAction Input: {"return_type": "give_answer", "final_answer": "it rang once"}',
    'Action: Finish\nAction Input: {"return_type": "give_answer"}', "Action: Finish\nAction Input: {",
    "Action: fly\nAction Input: {}\nAction: ring\nAction Input: {}",
)  # fmt: skip
FIGURES = {
    "Act.EM": "act_em", "F1": "f1", "Easy_F1": "easy_f1", "Hard_F1": "hard_f1", "Rouge-L": "rougeL", "plan_em": "plan_em",
    "HalluRate": "hallu_rate",
}  # fmt: skip
ASK = """
import json, sys
from evalscope.benchmarks.tool_bench.utils import calculate_metrics
print(json.dumps([calculate_metrics(case) for case in json.load(sys.stdin)]))
"""


def test_figures_of_toolbench_are_evalscopes(installed: Callable[[str], Environment]) -> None:
    tools = [{"name": "ring"}, {"name": "Finish"}]
    cases = [{"target": t, "predictions": r, "tools": tools} for t, r in itertools.product(TARGETS, REPLIES)]
    command = [str(installed("evalscope").python), "-I", "-c", ASK]
    ran = subprocess.run(command, input=json.dumps(cases), env=foreign(), capture_output=True, text=True, check=True)
    gave_up = 0
    for case, theirs in zip(cases, json.loads(ran.stdout.splitlines()[-1]), strict=True):
        ours = toolbench.figures("en", str(case["predictions"]), str(case["target"]), [tool["name"] for tool in tools])
        gave_up += not theirs  # which it leaves out, and we count
        if theirs:
            assert {FIGURES[name]: value for name, value in theirs.items()} == pytest.approx(
                {name: value for name, value in ours.items() if value is not None}
            ), case
    assert gave_up == sum(case["target"] == TARGETS[-1] for case in cases) - 2  # but where the reply gives up too
