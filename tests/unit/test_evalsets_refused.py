"""Data that cannot be asked is refused before anything is, with its place and the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evalsets import sets
from suite.errors import SuiteError
from tests.unit.evalset_files import ceval, lines


def test_more_examples_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match=r"shots = 6, but dev/law_dev.csv has 5 rows"):
        sets.load(str(ceval(tmp_path / "ceval")), 6).questions()
    (tmp_path / "ceval/dev/law_dev.csv").unlink()
    with pytest.raises(SuiteError, match="shots = 1, but 'law' has no dev file"):
        sets.load(str(tmp_path / "ceval"), 1).questions()
    assert sets.load("summaries", 3).file.shots == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"answer": 3}, "answer is '3'\n  hint: write one of A, B, C, 0, 1, 2"), ({"answer": -1}, "often withheld"), ({"answer": None}, "often withheld"),
        ({"choices": ["w"]}, "at least two options"), ({"choices": list("abcdefghijk")}, "has 11 options, and at most 10"), ({"choices": [1, None]}, "'choices' must hold texts"),
        ({"choices": {"text": ["w", "x"], "label": ["A"]}}, "a label of one letter or digit for each text"), ({"choices": {"text": ["w", "x"], "label": ["A", "A"]}}, "a label of one letter"),
        ({"choices": {"label": ["A"]}}, "'choices' must hold texts"), ({"choices": 5}, "'choices' must be a list"), ({"choices": "w, x"}, "'choices' is not valid JSON"),
    ],
)  # fmt: skip
def test_lists_of_options_that_are_none(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    lines(tmp_path / "x.jsonl", {"question": "Why?", "choices": ["w", "x", "y"], "answer": 1} | changed)
    with pytest.raises(SuiteError, match=message) as caught:
        sets.load(str(tmp_path)).questions()
    assert str(tmp_path / "x.jsonl:1") in str(caught.value)


def test_withheld_answers_are_no_score(tmp_path: Path) -> None:
    folder = ceval(tmp_path / "ceval")
    for path in folder.glob("val/*"):
        path.unlink()
    with pytest.raises(SuiteError, match=r"law_test.csv:2: answer is ''") as caught:
        sets.load(str(folder)).questions()
    assert "withheld" in caught.value.hint


def test_a_folder_that_is_nothing_says_what_was_found_and_what_was_expected(tmp_path: Path) -> None:
    for i in range(12):
        (tmp_path / f"notes{i:02}.txt").write_text("x", "utf-8")
    with pytest.raises(SuiteError, match=r"the set has no data to ask: found notes00\.txt, .* and 4 more") as caught:
        sets.load(str(tmp_path))
    assert "expected {val,test}/SUBJECT" in caught.value.hint
    lines(tmp_path / "mcq/x_val.jsonl", {"a": 1})
    with pytest.raises(SuiteError, match="no data") as caught:
        sets.load(str(tmp_path))
    assert caught.value.hint == f"give the folder inside that has the data: {tmp_path / 'mcq'}"
    with pytest.raises(SuiteError, match=r"x_val.jsonl:1: rows have a: no kind of question"):
        sets.load(str(tmp_path / "mcq"))


@pytest.mark.parametrize(
    ("one", "other"), [("x.csv", "x.jsonl"), ("x_val.csv", "x_val.tsv"), ("x.jsonl", "x_test.jsonl")]
)
def test_two_files_of_one_subset_are_refused(tmp_path: Path, one: str, other: str) -> None:
    for name in (one, other):
        (tmp_path / name).touch()
    with pytest.raises(SuiteError, match=f"{one} and {other} are the same subset"):
        sets.load(str(tmp_path))


def test_solved_examples_alone_are_nothing_to_ask(tmp_path: Path) -> None:
    lines(tmp_path / "train.jsonl", {"question": "q", "answer": "#### 1"})
    with pytest.raises(SuiteError, match=r"no data to ask: found train\.jsonl") as caught:
        sets.load(str(tmp_path))
    assert "dev and train files hold solved examples" in caught.value.hint


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "q", "tools": [], "calls": 3}, "'calls' must be a list"),
        ({"query": "q", "tools": "[", "calls": []}, "'tools' is not valid JSON"),
        ({"query": "q", "tools": [{"x": 1}], "calls": []}, "a tool has no name"),
        ({"query": "q", "tools": [{"name": "f"}], "calls": [{"name": "g"}]}, "the call of 'g' is of no offered tool"),
        ({"query": "q", "tools": [{"name": "f"}], "calls": [{"name": "f", "arguments": [1]}]}, "an object of arguments"),
        ({"query": "q", "checks": []}, "no 'checks'"),
        ({"query": "q", "checks": [{"rule": "wrods"}]}, "unknown rule 'wrods'\n  hint: did you mean 'words'"),
        ({"query": "q", "checks": [{"rule": "words", "max": 3}]}, "unknown key 'max'"),
        ({"query": "q", "checks": [{"rule": "json", "keys": "a"}]}, "keys: input should be a valid list"),
        ({"query": "q", "refuse": "yes"}, "no 'refuse' that is true or false"),
        ({"question": "q", "answer": "#### many"}, "no number in the answer"),
        ({"question": "q", "A": "1", "B": {"x": 1}, "answer": "A"}, "'B' must be a text"),
        ({"question": "q", "A": "1", "B": "2", "answer": {"x": 1}}, "answer is"),
        ({"query": "q", "response": "r", "history": [["a"]]}, "'history' must be pairs"),
        ({"messages": [3], "response": "r"}, "'messages' must be a list of messages"),
        ({"messages": [{"role": "user", "content": "q"}]}, "no 'response'"),
        ({"text": ""}, "'text' must be a text that is not empty"),
    ],
)  # fmt: skip
def test_a_wrong_row_has_its_place(tmp_path: Path, row: Any, message: str) -> None:
    lines(tmp_path / "x.jsonl", row)
    with pytest.raises(SuiteError, match=message) as caught:
        sets.load(str(tmp_path)).questions()
    assert caught.value.where == f"{tmp_path / 'x.jsonl'}:1"


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for name, content, message in (
        ("x_val.csv", b"\xff\xfe,a", "not UTF-8"), ("x_val.jsonl", b"\xff", "not UTF-8"), ("x_val.csv", b'question,A,B,answer\n"x', "not valid CSV"),
        ("x_val.csv", b"question,A,A,B,answer\nq,1,2,3,A", "two columns have one name"), ("x.jsonl", b"[" * 100_000, "nested too deeply|not valid JSON"),
        ("x_val.parquet", b"PAR0", "not a parquet file"), ("x_val.jsonl", b"", "the file has no rows"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SuiteError, match=message) as caught:
            sets.load(str(tmp_path)).questions()
        assert name in caught.value.where
        (tmp_path / name).unlink()
