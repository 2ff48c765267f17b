"""Sets whose right answers an endpoint knows, and evaluations of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from openai_fake import Say, serve

from evalsets import named
from evalsets.ask import Client
from evalsets.evaluation import Evaluation, evaluate

ABOUT = 'title = "t"\nlanguages = ["en", "zh"]\nlicense = "CC0-1.0"\nsource = "a test"\n'
OVERFLOW = b'{"error": {"message": "maximum context length is 16 tokens"}}'
TEXTS = ["one two three", "四五六 seven", "eight"]


def make_sets(folder: Path) -> list[str]:
    """40 choices in two subjects, whose right letters are in the questions; 4 summaries; 3 texts."""
    for name, kind, more in (
        ("choice", "choice", "[generation]\nmax_tokens = 5\nstop = ['#']\nseed = 3\n"),
        ("short", "qa", 'metrics = ["rouge", "bleu", "exact"]\n'), ("texts", "perplexity", ""),
    ):  # fmt: skip
        (folder / name / "val").mkdir(parents=True)
        (folder / name / "set.toml").write_text(f'kind = "{kind}"\n{ABOUT}{more}', "utf-8")
    for subject, first, last in (("art", 0, 10), ("law", 10, 40)):
        rows = [f"{i},Item {i} (key {'ABCD'[i % 4]})?,w,x,y,z,{'ABCD'[i % 4]}" for i in range(first, last)]
        path = folder / "choice" / "val" / f"{subject}_val.csv"
        path.write_text("\n".join(["id,question,A,B,C,D,answer", *rows]), "utf-8")
    pairs = [("one", "the cat sat"), ("two", "on the mat"), ("三", "猫在垫子上"), ("四", "狗在门口")]
    qa = (json.dumps({"query": q, "response": r}, ensure_ascii=False) for q, r in pairs)
    (folder / "short" / "default.jsonl").write_text("\n".join(qa), "utf-8")
    (folder / "texts" / "default.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in TEXTS), "utf-8")
    return [str(folder / name) for name in ("choice", "short", "texts")]


def number(body: dict[str, Any]) -> int:
    return int(body["messages"][0]["content"].split()[1])


def right(body: dict[str, Any]) -> str:
    return str(body["messages"][0]["content"].split("(key ")[1][0])


def scored(body: dict[str, Any], nat: float = 2.0) -> dict[str, Any]:
    """An echo in which each character is a token and costs `nat`."""
    prompt = body["prompt"]
    logprobs = {"token_logprobs": [None, *[-nat] * (len(prompt) - 1)]}
    choice = {"text": prompt, "logprobs": logprobs, "finish_reason": "length"}
    return {"choices": [choice], "usage": {"prompt_tokens": len(prompt), "completion_tokens": 0}}


def good(body: dict[str, Any]) -> Say | dict[str, Any]:
    if "prompt" in body:
        return scored(body)
    question = body["messages"][0]["content"]
    said = {"one": "the cat sat", "two": "on a mat", "三": "猫在垫子上", "四": "猫在垫子上"}
    return Say(said[question]) if question in said else Say(right(body))


def run(rule: Any, wanted: list[str], out: Path, **settings: Any) -> Evaluation:
    with serve(rule) as fake:
        client = Client(fake.url, pause=0.001, attempts=2, timeout=10)
        return evaluate(client, "m", named.load(wanted), out, out / "journal", **settings)
