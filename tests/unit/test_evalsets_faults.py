"""Endpoints that fail in every way, over all our own sets and published layouts: scores are what the rule implies."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from openai_fake import Say, serve
from test_evalsets_published import lines, publish

from evalsets import sets
from evalsets.ask import Client
from evalsets.evaluation import Evaluation, evaluate
from evalsets.sets import EvalSet, Question

QUESTIONS = 39
TURNS = 13
OVERFLOW = b'{"error": {"message": "maximum context length is 16 tokens", "code": "context_length_exceeded"}}'
FAILED = {
    0: "HTTP 400: maximum context length", 1: "HTTP 500", 4: "not an OpenAI reply: <html>", 12: "no answer within 2 s",
}  # fmt: skip
RIGHT = (2, 3, 5, 7, 9, 10, 11)
ATTEMPTS = {1: 3, 2: 2, 3: 2, 5: 2}
"""Of a question that is asked more than once."""

TOOL = {"type": "function", "function": {"name": "ring", "parameters": {"type": "object", "properties": {}}}}
STEPS = (
    'Action: ring\nAction Input: {"bell": "big"}', "Action: ring\nAction Input: {}",
    'Action: Finish\nAction Input: {"return_type": "give_answer", "final_answer": "it rang twice"}',
    'Action: Finish\nAction Input: {"return_type": "give_up_and_restart"}',
)  # fmt: skip

ZH_LONG = "春天来了，花园里开满了花，孩子们在草地上奔跑，风很轻，天很蓝，鸟儿在树上唱歌。" * 3
KEPT = {
    "en-words": "Wide, blue and never still.", "zh-words": "大海又蓝又宽。", "en-one-word": "Honey", "zh-one-word": "蜂蜜",
    "en-long": "We walked below the old trees and heard the birds sing. " * 6, "zh-long": ZH_LONG,
    "en-sentences": "They hold chlorophyll. It reflects green light.",
    "zh-sentences": "蓝光散射得最多。所以天空是蓝色的。", "en-list": "- apple\n- pear\n- plum\n- fig", "zh-list": "-猫\n-狗\n-鱼",
    "en-json": '{"name": "Ann", "age": 3}', "zh-json": '{"title": "山", "pages": 9}', "en-json-list": "[1, 2, 3, 4, 5]",
    "zh-json-list": '["红", "绿", "蓝"]', "en-no-commas": "It is cold. Snow falls. We stay inside.",
    "zh-no-commas": "春天很暖和。", "en-no-letter": "cat dog pig", "zh-avoid": "它在夜里发光。",
    "en-starts": "Once upon a time there was a fox. It slept.", "zh-starts": "从前有一座山。",
    "en-ends": "Try chess. That is all.", "zh-ends": "游泳吧。祝你健康！", "en-upper": "GOOD MORNING", "en-lower": "the cat sleeps.",
    "en-chinese": "是东京。", "zh-english": "It is Paris.",
    "en-times": "Water meets water. The water is cold.", "zh-times": "花园里有一朵花。",
    "en-contains": "The moon was at the door, and there was tea.", "zh-contains": "朋友在山上看书。",
}  # fmt: skip
"""Replies to the shipped instructions that keep all their rules."""


def publish_all(folder: Path) -> None:
    """The layouts of the other test, and those of calls."""
    publish(folder)
    asked = [[{"role": "user", "content": f"Ring it {i} times."}] for i in range(QUESTIONS + 1)]
    steps = [{"messages": m, "tools": [{"name": "ring"}], "target": STEPS[i % 4]} for i, m in enumerate(asked)]
    lines(folder / "toolbench/in_domain.jsonl", steps)
    offers = [{"messages": m, "tools": [TOOL], "should_call_tool": i % 2 == 0} for i, m in enumerate(asked)]
    lines(folder / "fc/default.jsonl", offers)


PUBLISHED = ("ceval", "cmmlu", "mmlu", "mcq", "several", "gsm8k", "qa", "toolbench", "fc")
SHIPPED = tuple(name for name in sets.names() if name != "perplexity")


def right(kind: str, question: Question) -> Say:
    """What gets the full score."""
    expected = question.expected
    match kind:
        case "choice":
            return Say(f"答案：{expected}")
        case "numeric":
            return Say(f"So it is {expected}.")
        case "tools":
            calls = [{"name": "ring", "arguments": {}}] if expected is True else expected or []
            return Say("Certainly.", calls)
        case "toolbench":
            return Say(expected["target"])
        case "instructions":
            return Say(KEPT.get(question.id.partition("/")[2]) or str(expected[0]["text"]))
        case "refusals":
            return Say("I'm sorry, but I can't help with that." if expected == "refuses" else "Sure, like this.")
    return Say(expected)


def wrong(kind: str, question: Question) -> Say:
    """What gets none."""
    match kind:
        case "choice":
            return Say(f"答案：{next(x for x in question.letters if x != question.expected)}")
        case "numeric":
            return Say("It is 123456789.")
        case "tools":
            return Say("Certainly.", [] if question.expected else [{"name": "fly", "arguments": {}}])
        case "refusals":
            return right(kind, replace(question, expected="answers" if question.expected == "refuses" else "refuses"))
    return Say("ξ")


def key(messages: Any, tools: Any) -> str:
    return json.dumps([list(messages), list(tools or ())], sort_keys=True)


class Faulty:
    """Answers question number i as `i % TURNS` says; knows what its answers are worth."""

    def __init__(self, questions: list[Question], kind: str) -> None:
        self.numbers = {key(q.messages, q.tools): i for i, q in enumerate(questions)}
        self.questions, self.kind = questions, kind
        self.seen: Counter[int] = Counter()

    def __call__(self, body: dict[str, Any]) -> Say:
        if "prompt" in body:
            return Say(status=400, body=b'{"error": {"message": "echo is not supported"}}')
        i = self.numbers[key(body["messages"], body.get("tools"))]
        good, bad = right(self.kind, self.questions[i]), wrong(self.kind, self.questions[i])
        says = {6: Say(""), 7: replace(good, finish="length"), 8: bad}
        if self.kind in ("choice", "numeric", "refusals"):
            says[9] = Say(f"<think>{bad.text}? No.</think>{good.text}")
        return self.fault(i, good) or says.get(i % TURNS, good)

    def fault(self, i: int, good: Say) -> Say | None:
        """What happens in place of an answer, the first time or each time."""
        self.seen[i] += 1
        once = {2: Say(status=503), 3: Say(status=429, headers={"retry-after": "0"}), 5: replace(good, cut=True)}
        always = {
            0: Say(status=400, body=OVERFLOW), 1: Say(status=500), 4: Say(body=b"<html>a proxy</html>"),
            12: replace(good, delay=60),
        }  # fmt: skip
        return (once if self.seen[i] == 1 else {}).get(i % TURNS) or always.get(i % TURNS)

    def count(self, *rests: int) -> int:
        return sum(i % TURNS in rests for i in range(len(self.questions)))

    def score(self, i: int) -> float:
        """To say nothing is right where no tool is to be called."""
        silent = self.kind == "tools" and not self.questions[i].expected
        return float(i % TURNS in RIGHT or (i % TURNS == 6 and silent))


def run(rule: Any, asked: EvalSet, out: Path, limit: int = QUESTIONS) -> Evaluation:
    with serve(rule) as fake:
        client = Client(fake.url, concurrency=8, attempts=3, pause=0.001, timeout=2)
        return evaluate(client, "m", [asked], out, out / "journal", limit=limit)


def answers(out: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / f"answers/{name}.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("name", [*SHIPPED, *PUBLISHED])
def test_nothing_is_dropped_and_every_score_is_what_the_rule_implies(name: str, tmp_path: Path) -> None:
    publish_all(tmp_path / "published")
    asked = sets.load(str(tmp_path / "published" / name) if name in PUBLISHED else name)
    questions = asked.questions(QUESTIONS)
    rule = Faulty(questions, asked.kind)
    found = run(rule, asked, tmp_path / "out").sets[asked.name]
    total, n = found["total"], len(questions)
    assert n == QUESTIONS
    assert (total["n"], total["failed"], total["truncated"]) == (n, rule.count(*FAILED), rule.count(7))
    rows = answers(tmp_path / "out", asked.name)
    assert [row["id"] for row in rows] == [q.id for q in questions]
    for i, row in enumerate(rows):
        assert row["error"].startswith(FAILED.get(i % TURNS, "")), row
        assert bool(row["error"]) == (i % TURNS in FAILED)
        assert rule.seen[i] == ATTEMPTS.get(i % TURNS, 1)
    assert [row["score"] for row in rows] == pytest.approx([rule.score(i) for i in range(n)])
    assert total[found["headline"]] == pytest.approx(sum(map(rule.score, range(n))) / n)
    if asked.kind in ("choice", "numeric", "refusals"):
        assert total["unparsed"] == rule.count(6)
    if asked.file.likelihood:
        assert total["likelihood"] == {"not_available": "HTTP 400: echo is not supported"}


def echoed(prompt: str, nat: float = 2.0) -> Say:
    """Each character is a token, and takes so much."""
    logprobs = {"token_logprobs": [None, *[-nat] * (len(prompt) - 1)]}
    choice = {"text": prompt, "logprobs": logprobs, "finish_reason": "length"}
    usage = {"prompt_tokens": len(prompt), "completion_tokens": 0}
    return Say(body=json.dumps({"choices": [choice], "usage": usage}).encode())


def test_texts_that_fail_are_counted_and_there_is_no_perplexity_without_them(tmp_path: Path) -> None:
    asked = sets.load("perplexity")
    questions = asked.questions(TURNS)
    # the shortest is asked first, to see whether the endpoint gives log-probabilities at all
    shortest = questions.index(min(questions, key=lambda q: len(q.text.encode())))
    rule = Faulty([*questions[shortest:], *questions[:shortest]], asked.kind)
    turn = {q.text: (i + 10) % TURNS for i, q in enumerate(rule.questions)}

    def answer(body: dict[str, Any]) -> Say:
        prompt = body["prompt"]
        return rule.fault(turn[prompt], echoed(prompt)) or echoed(prompt)

    total = run(answer, asked, tmp_path, TURNS).metrics["perplexity"]
    assert (total["n"], total["failed"]) == (TURNS, len(FAILED))
    assert total["not_available"] == f"{len(FAILED)} of {TURNS} texts were not measured"
    rows = answers(tmp_path, "perplexity")
    assert len(rows) == TURNS
    for row in rows:
        assert row["error"].startswith(FAILED.get(turn[row["prompt"]], ""))
        assert bool(row["error"]) == (turn[row["prompt"]] in FAILED)
        assert row["error"] or row["nll"] == 2 * (len(row["prompt"]) - 1)
    again = run(lambda body: echoed(body["prompt"]), asked, tmp_path, TURNS).metrics["perplexity"]
    assert (again["failed"], again["ppl"]) == (0, pytest.approx(math.exp(2)))
    assert again["tokens"] == sum(len(q.text) - 1 for q in questions)


@pytest.mark.parametrize("name", ["arithmetic", "qa", "ceval", "tool-calls"])
def test_an_endpoint_that_dies_half_way_is_asked_for_the_rest_only(name: str, tmp_path: Path) -> None:
    publish_all(tmp_path / "published")
    asked = sets.load(str(tmp_path / "published" / name) if name in PUBLISHED else name)
    questions = asked.questions(QUESTIONS)
    by_text = {key(q.messages, q.tools): q for q in questions}
    answered: list[str] = []

    def well(body: Mapping[str, Any], to: list[str]) -> Say:
        if "prompt" in body:
            to.append(body["prompt"])
            return echoed(body["prompt"])
        to.append(key(body["messages"], body.get("tools")))
        return right(asked.kind, by_text[to[-1]])

    def dying(body: dict[str, Any]) -> Say:
        return Say("x", cut=True) if len(answered) >= len(questions) // 2 else well(body, answered)

    first = run(dying, asked, tmp_path / "one").metrics[asked.name]
    # of none of the options is the likelihood known
    assert first["failed"] == len(questions) - (0 if asked.file.likelihood else len(answered))
    again: list[str] = []
    last = run(lambda body: well(body, again), asked, tmp_path / "one")
    assert last.failed == 0
    assert not set(answered) & set(again)
    assert set(by_text) <= {*answered, *again}
    assert max(Counter(answered + again).values()) == 1
    run(lambda body: well(body, []), asked, tmp_path / "two")
    for file in ("report.json", f"answers/{asked.name}.jsonl"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
