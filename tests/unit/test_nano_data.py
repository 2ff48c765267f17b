from __future__ import annotations

import csv
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NANO = ROOT / "examples" / "nano"
SHIPPED = (
    *(f"evalsets/shipped/{n}" for n in ("ceval-mini", "summaries", "perplexity", "arithmetic", "tool-calls", "instructions")),
    "examples/data",
)  # fmt: skip


@pytest.fixture(scope="module")
def modules() -> Any:
    sys.path.insert(0, str(NANO))
    try:
        import make_data
        import world

        yield make_data, world
    finally:
        sys.path.remove(str(NANO))
        for name in ("make_data", "world"):
            sys.modules.pop(name, None)


def made(folder: Path, seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    command = [sys.executable, str(NANO / "make_data.py"), str(folder), "--rows", "600", "--seed", str(seed)]
    subprocess.run(command, check=True, timeout=60)
    names = ("chat", "world", "lists", "held_out")
    return {n: [json.loads(line) for line in (folder / f"{n}.jsonl").read_text("utf-8").splitlines()] for n in names}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return made(tmp_path_factory.mktemp("nano"))


def asked(rows: list[dict[str, Any]]) -> set[str]:
    """All user turns of conversations without tools, where one question has one answer."""
    dialogues = (row["messages"] for row in rows if "messages" in row and "tools" not in row)
    return {message["content"] for messages in dialogues for message in messages if message["role"] == "user"}


def test_no_held_out_question_is_trained_on(data: dict[str, list[dict[str, Any]]]) -> None:
    assert not asked(data["chat"] + data["world"]) & asked(data["held_out"])


def test_every_skill_has_held_out_questions_in_both_languages(data: dict[str, list[dict[str, Any]]]) -> None:
    chinese = Counter(
        (row["skill"], any("一" <= letter <= "鿿" for letter in row["messages"][0]["content"]))
        for row in data["held_out"]
    )
    for skill in ("choice", "arithmetic", "facts", "copying", "summaries", "tools"):
        assert chinese[skill, False], skill
        assert chinese[skill, True] or skill == "arithmetic", skill


def test_same_seed_gives_the_same_rows(data: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    assert made(tmp_path) == data
    assert made(tmp_path, seed=5)["chat"] != data["chat"]


def test_shipped_files_are_what_the_script_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(NANO / "make_sets.py"), str(tmp_path)], check=True, timeout=60)
    for folder in SHIPPED:
        for file in (tmp_path / folder).rglob("*.*"):
            shipped = ROOT / file.relative_to(tmp_path)
            assert shipped.read_bytes() == file.read_bytes(), shipped


def test_choice_set_is_balanced_and_no_question_has_two_right_answers() -> None:
    letters: Counter[str] = Counter()
    files = sorted((ROOT / "evalsets" / "shipped" / "ceval-mini" / "val").glob("*.csv"))
    for file in files:
        for row in csv.DictReader(file.read_text("utf-8").splitlines()):
            assert len({row[letter] for letter in "ABCD"}) == 4, row
            letters[row["answer"]] += 1
    assert len(files) >= 6
    assert len(set(letters.values())) == 1, letters


def test_choice_set_shares_no_question_with_training(data: dict[str, list[dict[str, Any]]]) -> None:
    trained = asked(data["chat"] + data["world"])
    for file in (ROOT / "evalsets" / "shipped" / "ceval-mini" / "val").glob("*.csv"):
        for row in csv.DictReader(file.read_text("utf-8").splitlines()):
            options = sorted(row[letter] for letter in "ABCD")
            seen = (q for q in trained if f"{row['question']}\n" in q)
            assert all(sorted(line[3:] for line in q.split("\n") if line[1:3] == ". ") != options for q in seen)


def test_sums_are_right(modules: Any) -> None:
    make_data, _ = modules
    rng = random.Random(3)
    for _ in range(500):
        a, operator, b, result = make_data.operation(rng)
        assert result == {"+": a + b, "-": a - b, "×": a * b}[operator]
        assert result >= 0


def test_facts_do_not_contradict_each_other(modules: Any) -> None:
    _, world = modules
    for relation in world.RELATIONS:
        for lang in (0, 1):
            answers: dict[str, str] = {}
            for x, y in relation.pairs:
                assert answers.setdefault(x[lang], y[lang]) == y[lang], (relation.name, x)
        assert len({y[0] for _, y in relation.pairs} | {option[0] for option in relation.options}) >= 4
