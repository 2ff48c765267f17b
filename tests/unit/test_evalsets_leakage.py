"""Leakage: what stands in the training data is found in whatever form, what does not is not, and data is streamed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evalsets import leakage
from evalsets.leakage import CHUNK, Runs, annotate, overlapping, rows, tokens

LONG = "In which year did the ship leave the harbour of Lisbon with forty seven sailors, nine goats and a clock?"
SHORT = "Name the largest moon of the planet Saturn."
TINY = "Who wrote Emma?!"
CHINESE = "下列关于细胞呼吸的叙述中，正确的是哪一项？请说明理由。"


def data(folder: Path, *texts: str, name: str = "data.jsonl") -> list[Path]:
    path = folder / name
    path.write_text(
        "".join(json.dumps({"instruction": t, "output": "x"}, ensure_ascii=False) + "\n" for t in texts), "utf-8"
    )
    return [path]


def found(texts: dict[str, str], files: list[Path]) -> set[str]:
    return {name for _, name in overlapping(Runs([texts]), files)}


def test_tokens_are_words_and_chinese_characters_without_marks() -> None:
    assert tokens("What's 2+2？ 你好,WORLD ＡＢ—_x_") == ["what", "s", "2", "+", "2", "你", "好", "world", "ab", "x"]
    assert tokens("1939-1945, 9 - 4 × 3 ÷ y, well-known") == [
        "1939",
        "1945",
        "9",
        "-",
        "4",
        "×",
        "3",
        "y",
        "well",
        "known",
    ]


@pytest.mark.parametrize(
    ("text", "leaks"),
    [
        (LONG, {"long"}),
        (f"Quiz: {LONG.upper()} In 1534.", {"long"}),
        (LONG.replace(", ", " -- ").replace(" ", "\n"), {"long"}),
        ("which year did the ship leave the harbour of Lisbon with forty seven", {"long"}),  # 13 of its 21 tokens
        ("which year did the ship leave the harbour of Lisbon with forty", set()),
        ("what is the largest moon of the planet Saturn", set()),  # 7 of its 8 tokens
        (f"He said: name the largest moon of the planet Saturn, and {TINY}", {"short"}),
        (f"——{CHINESE}——", {"chinese"}),
        ("关于细胞呼吸的叙述中，正确的", {"chinese"}),
        ("细胞呼吸的叙述", set()),
        ("nothing of all this", set()),
    ],
)
def test_a_run_of_a_question_is_found(text: str, leaks: set[str], tmp_path: Path) -> None:
    texts = {"long": LONG, "short": SHORT, "tiny": TINY, "chinese": CHINESE}
    assert found(texts, data(tmp_path, "unrelated words", text)) == leaks


def test_what_all_questions_share_is_no_evidence(tmp_path: Path) -> None:
    frame = "Read the following question carefully and then choose the one right answer: {} Answer with a single letter, please."
    texts = {
        str(i): frame.format(f"which of these {i} stones weighs {i * 7} grams or more, says keeper {i}")
        for i in range(9)
    }
    assert found(texts, data(tmp_path, frame.format("something else"), frame)) == set()
    assert found(texts, data(tmp_path, texts["4"])) == {"4"}
    twice = {"a": LONG, "b": LONG}
    assert found(twice, data(tmp_path, LONG)) == {"a", "b"}
    few = {"a": f"Look at this: {SHORT}", "b": f"Look at this: {LONG}", "c": f"Look at this: {TINY}"}
    runs = Runs([few])
    assert runs.too_short == [1]
    assert found(few, data(tmp_path, SHORT)) == {"a"}


SUM = "A baker sells 17 loaves each morning and then 26 more of the same kind in every long afternoon of the week."
KITTEN = "小明有三只小猫，后来邻居又送给他五只小猫，请问小明现在一共有多少只小猫？"


@pytest.mark.parametrize(
    ("text", "leaks"),
    [
        (SUM, {"sum"}), (SUM.replace("17", "71").replace("26", "25"), set()), (SUM.replace("17", "71"), set()),
        (f"First. {SUM} 43.", {"sum"}), ("What is 37 + 45?", {"add"}), ("What is 37 - 45?", set()), ("What is 37 + 46?", set()),
        (KITTEN, {"kitten"}), (KITTEN.replace("三", "四").replace("五", "六"), set()),
    ],
)  # fmt: skip
def test_a_question_with_other_numbers_is_another_question(text: str, leaks: set[str], tmp_path: Path) -> None:
    asked = {"sum": SUM, "add": "What is 37 + 45?", "kitten": KITTEN}
    rows_of = [
        {"id": name, "language": "en", "prompt": text, "score": 1.0, "error": ""} for name, text in asked.items()
    ]
    for kind, found in (("numeric", leaks), ("qa", None)):
        sets: dict[str, dict[str, Any]] = {"s": {"kind": kind, "total": {}}}
        annotate(sets, {"s": rows_of}, data(tmp_path, text), [])
        if found is not None:
            assert set(sets["s"]["leakage"]["ids"]) == found
        elif text == SUM.replace("17", "71"):
            assert sets["s"]["leakage"]["ids"] == ["sum"]  # a run of 13 words stands there, as of any other text


def test_all_turns_of_a_conversation_are_asked_but_no_examples_and_no_system_text(tmp_path: Path) -> None:
    turns = [("system", LONG), ("user", CHINESE), ("assistant", SHORT), ("user", "And why is that so?")]
    prompt = [{"role": role, "content": content} for role, content in turns]
    asked = [{"id": "q", "language": "zh", "prompt": prompt, "score": 1.0, "error": ""}]
    chat = {
        "messages": [{"role": "system", "content": [{"type": "text", "text": "{}"}]}, {"role": "user", "content": "x"}]
    }
    for text, kind, leaks in (
        (CHINESE, "qa", True), (LONG, "qa", False), (SHORT, "qa", False), (CHINESE, "choice", False),
    ):  # fmt: skip
        path = tmp_path / "chat.jsonl"
        path.write_text(json.dumps(chat).replace("{}", text), "utf-8")
        sets: dict[str, dict[str, Any]] = {"s": {"kind": kind, "total": {}}}
        annotate(sets, {"s": asked}, [path], [])
        assert bool(sets["s"]["leakage"]["ids"]) == leaks


def test_a_report_without_it_says_so() -> None:
    assert "not known" in leakage.said({"total": {}}, "accuracy")


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from("abcdefgh"), min_size=4, max_size=40), st.lists(st.sampled_from("abcdefgh"), max_size=60)
)
def test_runs_are_those_that_a_plain_search_finds(question: list[str], text: list[str]) -> None:
    length = 13 if len(question) >= 13 else 8 if len(question) >= 8 else len(question)
    plain = any(
        question[i : i + length] == text[j : j + length]
        for i in range(len(question) - length + 1) for j in range(len(text) - length + 1)
    )  # fmt: skip
    runs = Runs([{"q": " ".join(question)}])
    assert bool(list(runs.found_in(tokens(" ".join(text))))) == plain


@pytest.mark.parametrize("layout", ["lines", "list", "pretty"])
def test_rows_are_streamed_from_lines_and_lists(layout: str, tmp_path: Path) -> None:
    rng = random.Random(1)
    whole = [
        {"messages": [{"role": "user", "content": '\\"[{é你' + "x" * rng.randrange(4000)}], "n": i} for i in range(900)
    ]
    assert sum(len(json.dumps(row)) for row in whole) > 1.5 * CHUNK
    path = tmp_path / "data.json"
    if layout == "lines":
        path.write_text("\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in whole), "utf-8")
    else:
        path.write_text(json.dumps(whole, indent=2 if layout == "pretty" else None), "utf-8")
    read = list(rows(path))
    assert [row for _, row in read] == whole
    positions = [position for position, _ in read]
    assert positions == sorted(positions)
    assert positions[-1] == path.stat().st_size


def row(name: str, text: str, score: float, language: str = "en") -> dict[str, Any]:
    prompt = [
        {"role": "user", "content": "an example"},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": text},
    ]
    return {"id": name, "language": language, "prompt": prompt, "score": score, "error": ""}


def test_the_score_of_the_rest_is_beside_the_score(tmp_path: Path) -> None:
    ask = "{}\nA. one thing\nB. another\nAnswer:"
    quiz = [row("a", ask.format(LONG), 1.0), row("b", ask.format(SHORT), 0.0), row("c", CHINESE, 1.0, "zh")]
    texts = [
        {"id": "t/1", "language": "en", "prompt": LONG, "error": "", "nll": 30.0, "tokens": 10},
        {"id": "t/2", "language": "en", "prompt": SHORT + " " + SHORT, "error": "", "nll": 0.0, "tokens": 10},
    ]
    sets: dict[str, dict[str, Any]] = {
        "quiz": {"kind": "choice", "total": {"acc": 2 / 3}},
        "texts": {"kind": "perplexity", "total": {}},
        "away": {"kind": "choice", "total": {"not_available": "x"}},
    }
    answers = {"quiz": quiz, "texts": texts, "away": []}
    files = data(tmp_path, LONG) + data(tmp_path, "examples", CHINESE, name="more.jsonl")
    seen: list[tuple[float, float]] = []
    annotate(sets, answers, files, ["base was not made here"], lambda done, total, what: seen.append((done, total)))
    assert sets["quiz"]["total"]["leakage"] == {"n": 2, "share": pytest.approx(2 / 3), "clean": 0.0}
    assert sets["quiz"]["leakage"] == {
        "ids": ["a", "c"],
        "too_short": 0,
        "files": 2,
        "unknown": ["base was not made here"],
    }
    assert sets["texts"]["total"]["leakage"] == {"n": 1, "share": 0.5, "clean": 1.0}
    assert "leakage" not in sets["away"]["total"]
    assert seen[-1][0] == seen[-1][1] > 0
    said = leakage.said(sets["quiz"], "accuracy")
    assert "2 questions (66.7 %) overlap with the training data, accuracy on the others 0" in said
    assert "unknown: base was not made here" in said
    annotate(sets, answers, [], ["x is gone"])
    assert leakage.said(sets["quiz"], "accuracy") == "Leakage is not known: no training data is at hand; x is gone."
    assert set(sets["quiz"]["total"]["leakage"]) == {"not_available"}  # so that no gate passes on it
