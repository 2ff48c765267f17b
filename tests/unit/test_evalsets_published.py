"""Published layouts at an endpoint that follows a rule: the scores are what the rule implies, and nothing is lost.

The rule knows the right answer of question i and gives it in some form, but for i % 10 of 0 (500 for good), 1 (garbage), 2
(no answer in the reply), 3 (wrong, and cut off) and 4 (right, and runs on). So 6 of 10 are right.
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from openai_fake import Say, serve

from evalsets import named
from evalsets.ask import Client
from evalsets.evaluation import evaluate
from evalsets.statistics import wilson

N = 40
LETTERS = "ABCD"


def letter(i: int) -> str:
    return LETTERS[i * 7 % 4]


def pair(i: int) -> str:
    return LETTERS[i % 3] + LETTERS[3]


def table(path: Path, rows: list[list[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def choices(columns: bool) -> list[list[Any]]:
    rows = [[f"Item {i} ?", "1.10", "NA", "w, x", "z", letter(i)] for i in range(N)]
    return (
        [["id", "question", *LETTERS, "answer", "explanation"], *([i, *row, ""] for i, row in enumerate(rows))]
        if columns
        else rows
    )


def publish(folder: Path) -> None:
    """Forty questions in each layout."""
    table(folder / "ceval/val/law_val.csv", choices(columns=True))
    table(folder / "ceval/test/law_test.csv", [["id", "question", *LETTERS]])
    cmmlu = [["", "Question", *LETTERS, "Answer"], *([i, *row] for i, row in enumerate(choices(columns=False)))]
    table(folder / "cmmlu/test/agronomy.csv", cmmlu)
    table(folder / "mmlu/test/anatomy_test.csv", choices(columns=False))
    row = dict(zip(LETTERS, "wxyz", strict=True))
    lines(folder / "mcq/mine_val.jsonl", [{"question": f"Item {i} ?", **row, "answer": letter(i)} for i in range(N)])
    lines(
        folder / "several/mine_val.jsonl",
        [{"question": f"Item {i} ?", **row, "answer": list(pair(i))} for i in range(N)],
    )
    lines(
        folder / "gsm8k/test.jsonl", [{"question": f"Item {i} ?", "answer": f"so #### {1000 + i:,}"} for i in range(N)]
    )
    lines(folder / "qa/mine.jsonl", [{"query": f"Item {i} ?", "response": f"thing {i}"} for i in range(N)])


RIGHT = {"several": pair, "gsm8k": lambda i: f"${1000 + i:,}.00", "qa": lambda i: f"thing {i}"}
WRONG = {"several": lambda i: pair(i)[0], "gsm8k": lambda i: "7", "qa": lambda i: "nothing"}


def answer(name: str, body: dict[str, Any]) -> Say | dict[str, Any]:
    prompt = body.get("prompt") or body["messages"][-1]["content"]
    found = re.search(r"Item (\d+) \?", prompt)
    assert found
    i = int(found[1])
    if "prompt" in body:  # the right letter is likeliest, but for every fourth question
        nat = -1.0 if prompt[-1] == letter(i + (i % 4 == 0)) else -2.0
        choice = {"text": prompt, "logprobs": {"token_logprobs": [None, -5.0, nat]}, "finish_reason": "length"}
        return {"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 0}}
    right = RIGHT.get(name, letter)(i)
    wrong = WRONG.get(name, lambda i: letter(i + 1))(i)
    runs_on = right if name == "qa" else f"Answer: {right}\n\nQuestion: another\nAnswer: {wrong}"
    faults = {
        0: Say(status=500), 1: Say(body=b"garbage"), 2: Say("no idea"), 3: Say(wrong, finish="length"),
        4: Say(runs_on, finish="length"),
    }  # fmt: skip
    plain = (
        right if name == "qa" else f"The answer is {right.lower()}." if name in ("ceval", "mmlu") else f"答案：{right}"
    )
    return faults.get(i % 10, Say(plain))


@pytest.mark.parametrize("name", ["ceval", "cmmlu", "mmlu", "mcq", "several", "gsm8k", "qa"])
def test_a_published_layout_is_scored_by_the_rule(tmp_path: Path, name: str) -> None:
    publish(tmp_path)
    with serve(lambda body: answer(name, body)) as fake:
        client = Client(fake.url, pause=0.001, attempts=2, timeout=10)
        found = evaluate(client, "m", named.load([str(tmp_path / name)]), tmp_path / "out", tmp_path / "journal")
    total = found.metrics[name]
    low, high = wilson(24, N)
    if name == "qa":
        assert (total["exact"], total["rouge1"] >= 0.6) == (0.6, True)
    else:
        assert (total["acc"], total["low"], total["high"], total["unparsed"]) == (0.6, low, high, 4)
    assert (total["n"], total["failed"], total["truncated"]) == (N, 8, 8)
    if name in ("ceval", "cmmlu", "mmlu", "mcq"):
        low, high = wilson(30, N)
        assert total["likelihood"] == {"acc": 0.75, "low": low, "high": high, "failed": 0}
    rows = [json.loads(line) for line in (tmp_path / f"out/answers/{name}.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == N
    assert sum(row["error"] != "" for row in rows) == 8
    if name in ("ceval", "cmmlu", "mmlu"):
        assert {row["prompt"][0]["content"].split("\n")[1] for row in rows} == {"A. 1.10"}
    assert sorted(p["what"] for p in found.sets[name]["problems"]) == sorted(
        ["failed"] * 8 + ["truncated"] * 8 + ["unparsed"] * (0 if name == "qa" else 4)
    )
