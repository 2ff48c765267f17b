"""From replies to figures, for each kind: what the replies imply, to the digit."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evalsets import report, sets
from evalsets.ask import Reply
from evalsets.report import TOO_FEW
from evalsets.score import Scores, headline, requests, score
from evalsets.sets import EvalSet, Question
from evalsets.statistics import mean_interval, wilson
from suite.errors import SuiteError
from suite.reports.comparison import _score


def answered(asked: EvalSet, say: Callable[[int, Question], str]) -> Scores:
    questions = asked.questions()
    return score(asked, questions, {q.id: Reply(q.id, "", say(i, q), "stop") for i, q in enumerate(questions)})


def rows(folder: Path, *found: Any, name: str = "x.jsonl") -> EvalSet:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), "utf-8")
    return sets.load(str(folder))


RIGHT: dict[str, Callable[[Question], str]] = {
    "choice": lambda q: str(q.expected), "numeric": lambda q: f"so it is {q.expected}.", "qa": lambda q: str(q.expected),
    "refusals": lambda q: "I can't help with that." if q.expected == "refuses" else "Sure.",
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in sets.names() if sets.load(name).kind in RIGHT])
def test_what_is_expected_scores_all_and_silence_nothing(name: str) -> None:
    asked = sets.load(name)
    found = answered(asked, lambda _, q: RIGHT[asked.kind](q))
    assert found.total[headline(asked)] == pytest.approx(1)
    assert found.total["high"] == pytest.approx(1)
    assert not found.remarks
    assert answered(asked, lambda *_: "").total[headline(asked)] == 0


def test_numbers_are_compared_by_value(tmp_path: Path) -> None:
    asked = rows(tmp_path, *({"question": "?", "answer": f"#### {n}"} for n in ("1.10", "1,200", "3/4", "7", "8")))
    texts = ["#### 1.1", "it is 1200 dollars", "0.75", "no idea", "9"]
    found = answered(asked, lambda i, _: texts[i])
    assert [r["score"] for r in found.rows] == [1, 1, 1, 0, 0]
    assert [r["parsed"] for r in found.rows] == ["1.1", "1200", "0.75", None, "9"]
    low, high = wilson(3, 5)
    assert found.total == {"acc": 0.6, "low": low, "high": high, "n": 5, "failed": 0, "truncated": 0, "unparsed": 1}


def test_several_letters_must_all_be_named(tmp_path: Path) -> None:
    row = {"question": "?", "A": "1", "B": "2", "C": "3", "D": "4"}
    asked = rows(tmp_path, *({**row, "answer": list(right)} for right in ("AC", "AC", "AC", "B", "ABD")))
    texts = ["A, C", "A", "A, B, C", "B", "none of them"]
    found = answered(asked, lambda i, _: texts[i])
    assert [r["score"] for r in found.rows] == [1, 0, 0, 1, 0]
    assert [r["partial"] for r in found.rows] == [1, 0.5, 0, 1, 0]
    assert (found.total["acc"], found.total["partial"], found.total["unparsed"]) == (0.4, 0.5, 1)


def test_words_of_several_options_are_read_whole(tmp_path: Path) -> None:
    row = {"question": "?", "A": "Paris", "B": "Bonn", "C": "Rome"}
    asked = rows(tmp_path, *({**row, "answer": list(right)} for right in ("AC", "AC", "C", "C")))
    texts = ["Paris and Rome", "Paris, not Bonn, and Rome", "Paris or Rome", "Rome"]
    assert [r["parsed"] for r in answered(asked, lambda i, _: texts[i]).rows] == ["AC", "AC", None, "C"]


def test_a_set_may_say_where_the_answer_is(tmp_path: Path) -> None:
    about = 'title = "t"\nlanguages = ["en"]\nlicense = "MIT"\nsource = "a test"\n'
    (tmp_path / "set.toml").write_text(f"kind = 'numeric'\n{about}extract = 'RESULT<(.*?)>'\n", "utf-8")
    asked = rows(tmp_path, *({"question": "?", "answer": "3"} for _ in range(5)))
    texts = [
        "7, no: RESULT<3.0>, not RESULT<4>",
        "3",
        "RESULT<three>",
        "<think>RESULT<4></think>RESULT<3>",
        "RESULT<4>",
    ]
    found = answered(asked, lambda i, _: texts[i])
    assert [r["parsed"] for r in found.rows] == ["3.0", None, None, "3", "4"]
    assert (found.total["acc"], found.total["unparsed"]) == (0.4, 2)


def test_letters_too_are_read_where_the_set_says(tmp_path: Path) -> None:
    about = 'title = "t"\nlanguages = ["en"]\nlicense = "MIT"\nsource = "a test"\n'
    (tmp_path / "set.toml").write_text(f"kind = 'choice'\n{about}extract = 'verdict = (\\w*)'\n", "utf-8")
    asked = rows(tmp_path, *({"question": "?", "A": "w", "B": "x", "answer": "B"} for _ in range(4)))
    texts = ["A, so verdict = b", "B", "verdict = ", "verdict = x"]
    assert [r["parsed"] for r in answered(asked, lambda i, _: texts[i]).rows] == ["B", None, None, "B"]


ABOUT = 'kind = "choice"\ntitle = "t"\nlanguages = ["en"]\nlicense = "MIT"\nsource = "a test"\n'


def test_the_share_of_letters_may_decide(tmp_path: Path) -> None:
    (tmp_path / "set.toml").write_text(f"{ABOUT}multiple = true\nmetric = 'partial'\n", "utf-8")
    row = {"question": "?", "A": "1", "B": "2", "C": "3", "D": "4"}
    asked = rows(tmp_path, *({**row, "answer": list(right)} for right in ("AC", "AC", "AC", "B")))
    texts = ["A, C", "A", "A, B", "B"]
    found = answered(asked, lambda i, _: texts[i])
    assert headline(asked) == "partial"
    assert [r["score"] for r in found.rows] == [1, 0.5, 0, 1]
    assert (found.total["partial"], found.total["acc"], found.total["macro"]) == (0.625, 0.5, 0.5)
    assert (found.total["low"], found.total["high"]) == mean_interval([1, 0.5, 0, 1])


def test_the_likeliest_option_may_decide(tmp_path: Path) -> None:
    (tmp_path / "set.toml").write_text(f"{ABOUT}likelihood = true\nmetric = 'likelihood'\n", "utf-8")
    asked = rows(tmp_path, *({"question": f"{i}?", "A": "1", "B": "2", "answer": "B"} for i in range(3)))
    questions = asked.questions()
    replies = {q.id: Reply(q.id, "", "B", "stop") for q in questions}
    for i, question in enumerate(questions):
        for option in "AB":
            name = f"{question.id}#{option}"
            replies[name] = Reply(name, "", logprobs=(-0.5 if option == "ABB"[i] else -2.0,))
    found = score(asked, questions, replies)
    low, high = wilson(2, 3)
    assert [r["score"] for r in found.rows] == [0, 1, 1]
    assert [found.total[name] for name in ("acc", "low", "high", "macro", "generated")] == [2 / 3, low, high, 2 / 3, 1]
    for question in questions:
        for option in "AB":
            replies[f"{question.id}#{option}"] = Reply("", "", error="HTTP 400: no logprobs", refused=True)
    total = score(asked, questions, replies).total
    assert (total["not_available"], total["n"], "acc" in total) == ("HTTP 400: no logprobs", 3, False)


def test_a_perplexity_without_all_texts_is_none(tmp_path: Path) -> None:
    asked = rows(tmp_path, *({"text": f"text {i}"} for i in range(3)))
    questions = asked.questions()
    replies = {q.id: Reply(q.id, "", logprobs=(-1.0, -2.0)) for q in questions}
    assert score(asked, questions, replies).total["ppl"] == pytest.approx(math.exp(1.5))
    replies[questions[1].id] = Reply("", "", error="HTTP 400: too long")
    total = score(asked, questions, replies).total
    assert (total["not_available"], total["failed"]) == ("1 of 3 texts were not measured", 1)
    assert "ppl" not in total


def test_so_few_texts_that_they_tell_nothing_of_others_have_no_interval(tmp_path: Path) -> None:
    shown = {}
    for n in (5, 6):
        asked = rows(tmp_path / str(n), *({"text": f"text {i}"} for i in range(n)))
        replies = {q.id: Reply(q.id, "", logprobs=(-1.0, -2.0 - i)) for i, q in enumerate(asked.questions())}
        total = score(asked, asked.questions(), replies).total
        found = {"title": "", "digest": "", "headline": "ppl", "total": total, "subsets": {}, "problems": []}
        ((_, _, interval, *_),) = report.figures({"texts": found}).rows
        (case,) = report.cases("model", {"texts": found})
        shown[n] = ("low" in total, *(TOO_FEW in text for text in (interval, case.said, _score(found, counted=False))))
    assert shown == {5: (False, True, True, True), 6: (True, False, False, False)}


def choices(folder: Path, *answers: str) -> tuple[EvalSet, list[Question]]:
    path = folder / "val" / "law_val.csv"
    path.parent.mkdir(parents=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        columns = ["id", "question", "A", "B", "C", "D", "answer"]
        csv.writer(file).writerows([columns, *([i, f"Q{i}?", "w", "x", "y", "z", a] for i, a in enumerate(answers))])
    asked = sets.load(str(folder))
    return asked, asked.questions()


def test_options_are_asked_by_likelihood_too(tmp_path: Path) -> None:
    asked, (question, *_) = choices(tmp_path, "A")
    chat, *options = requests(asked, question, "m")
    assert (chat.id, chat.path, [o.id for o in options]) == (
        "law/0",
        "chat/completions",
        [f"law/0#{x}" for x in "ABCD"],
    )
    assert {o.path for o in options} == {"completions"}
    assert options[1].body == {
        "model": "m", "prompt": "Q0?\nA. w\nB. x\nC. y\nD. z\n答案：B", "max_tokens": 0, "echo": True, "logprobs": 0, "temperature": 0,
    }  # fmt: skip
    without = sets.load("arithmetic")
    assert [r.id for r in requests(without, without.questions(1)[0], "m")] == ["problems/00001"]


def test_examples_precede_an_option_as_text(tmp_path: Path) -> None:
    choices(tmp_path, "A")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/law_dev.csv").write_text("id,question,A,B,C,D,answer\n0,Easy?,1,2,3,4,C\n", "utf-8")
    asked = sets.load(str(tmp_path), 1)
    _, option, *_ = requests(asked, asked.questions()[0], "m")
    assert option.body["prompt"] == "Easy?\nA. 1\nB. 2\nC. 3\nD. 4\n答案：C\n\nQ0?\nA. w\nB. x\nC. y\nD. z\n答案：A"


def test_the_likeliest_option_is_scored_beside_the_one_that_is_said(tmp_path: Path) -> None:
    asked, questions = choices(tmp_path, "A", "B", "C", "D")
    replies = {q.id: Reply(q.id, "", "A") for q in questions}
    for i, question in enumerate(questions):
        for letter in "ABCD":
            likely = letter == "ABDD"[i]
            name = f"{question.id}#{letter}"
            replies[name] = Reply(name, "", logprobs=(-3.0, -0.5 if likely else -2.0))
    replies[f"{questions[3].id}#B"] = Reply("", "", error="HTTP 500")
    found = score(asked, questions, replies)
    assert [(r["parsed"], r["likely"], r["likely_score"]) for r in found.rows] == [
        ("A", "A", 1), ("A", "B", 1), ("A", "D", 0), ("A", None, 0),
    ]  # fmt: skip
    low, high = wilson(2, 4)
    assert found.total["likelihood"] == {"acc": 0.5, "low": low, "high": high, "failed": 1}
    assert (found.total["acc"], found.total["failed"]) == (0.25, 1)


def test_an_endpoint_without_log_probabilities_says_why(tmp_path: Path) -> None:
    asked, questions = choices(tmp_path, "A", "B")
    replies = {q.id: Reply(q.id, "", "A") for q in questions}
    replies[f"{questions[0].id}#A"] = Reply("", "", error="HTTP 400: no echo", refused=True)
    found = score(asked, questions, replies)
    assert found.total["likelihood"] == {"not_available": "HTTP 400: no echo"}
    assert found.total["acc"] == 0.5


def test_subjects_come_with_their_categories(tmp_path: Path) -> None:
    asked, _ = choices(tmp_path, *"ABCD")
    found = answered(asked, lambda *_: "B").total
    low, high = wilson(1, 4)
    assert found["categories"] == {"humanities": {"acc": 0.25, "low": low, "high": high, "n": 4}}


def test_a_question_with_two_keys_is_a_remark(tmp_path: Path) -> None:
    asked = rows(
        tmp_path,
        *({"question": "Which?", "A": "1", "B": "2", "answer": a, "id": n} for a, n in (("A", "5"), ("B", "54"))),
    )
    found = answered(asked, lambda *_: "A")
    assert [r["score"] for r in found.rows] == [1, 0]
    assert found.remarks == [
        {"id": "x/54", "what": "contradiction", "text": "asks what x/5 asks, and has another answer"}
    ]


def test_checks_and_refusals_are_counted_apart(tmp_path: Path) -> None:
    checks = [{"rule": "words", "most": 2}, {"rule": "ends", "text": "."}]
    asked = rows(tmp_path / "i", *({"query": "?", "checks": checks} for _ in range(2)))
    total = answered(asked, lambda i, _: ("Two words.", "Two words")[i]).total
    assert (total["acc"], total["checks"]) == (0.5, 0.75)
    asked = rows(tmp_path / "r", *({"query": "?", "refuse": refuse} for refuse in (True, True, False, False)))
    texts = ["I can't help.", "Sure", "I can't help with it.", ""]
    total = answered(asked, lambda i, _: texts[i]).total
    assert (total["acc"], total["refused"], total["answered"], total["unparsed"]) == (0.25, 0.5, 0, 1)


def test_steps_of_toolbench_are_averaged_where_they_have_a_figure(tmp_path: Path) -> None:
    call = 'Action: add\nAction Input: {"a": 1}'
    answer = 'Action: Finish\nAction Input: {"return_type": "give_answer", "final_answer": "it is three"}'
    row = {"messages": [{"role": "user", "content": "q"}], "tools": [{"name": "add"}]}
    asked = rows(tmp_path, {**row, "target": call}, {**row, "target": call}, {**row, "target": answer})
    texts = [call, "Action: fly", answer]
    total = answered(asked, lambda i, _: texts[i]).total
    assert (total["act_em"], total["f1"], total["rougeL"], total["hallu_rate"]) == (0.5, 0.5, 1, pytest.approx(1 / 3))
    assert (total["step"], total["easy_f1"], headline(asked)) == (pytest.approx(2 / 3), 0, "step")


def test_each_metric_of_a_text_has_its_mean(tmp_path: Path) -> None:
    about = 'kind = "qa"\ntitle = "t"\nlanguages = ["en"]\nlicense = "CC0-1.0"\nsource = "a test"\n'
    (tmp_path / "set.toml").write_text(
        about + 'metrics = ["f1", "exact", "chrf", "jaccard", "regex", "bleu"]\n', "utf-8"
    )
    asked = rows(tmp_path, {"query": "?", "response": "red fox"}, {"query": "?", "response": "blue|green"})
    found = answered(asked, lambda i, _: ("the red fox", "dark green")[i])
    assert (found.total["f1"], found.total["exact"], found.total["jaccard"], found.total["regex"]) == (0.5, 0, 0.5, 1)
    assert headline(asked) == "f1"
    assert 0 < found.total["chrf"] < 1
    failed = score(asked, asked.questions(), {})
    assert {failed.total[m] for m in ("f1", "exact", "chrf", "jaccard", "regex", "bleu")} == {0}
    assert failed.total["failed"] == 2


def test_a_response_that_is_no_pattern_has_its_line(tmp_path: Path) -> None:
    about = (
        'kind = "qa"\ntitle = "t"\nlanguages = ["en"]\nlicense = "CC0-1.0"\nsource = "a test"\nmetrics = ["regex"]\n'
    )
    (tmp_path / "set.toml").write_text(about, "utf-8")
    with pytest.raises(SuiteError, match=r"x.jsonl:1: the response is no regular expression"):
        rows(tmp_path, {"query": "?", "response": "(("}).questions()
