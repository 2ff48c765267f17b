"""Published data and the folders of other tools, read as they lie there, without a file of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evalsets import sets
from evalsets.sets import tables
from evalsets.sets.subjects import CATEGORIES, categories
from suite.errors import SuiteError
from suite.evaluate import Evaluate
from tests.unit.evalset_files import CEVAL, ceval, lines, parquet, table

CMMLU = ["", "Question", "A", "B", "C", "D", "Answer"]


def test_c_eval_asks_its_val_split(tmp_path: Path) -> None:
    found = sets.load(str(ceval(tmp_path / "ceval")))
    assert (found.kind, found.layout.name, found.file.languages, found.file.likelihood) == (
        "choice",
        "C-Eval",
        ["zh"],
        True,
    )
    questions = found.questions()
    assert [(q.id, q.subset, q.options, q.expected) for q in questions[:1]] == [
        ("law/0", "law", ("1.10", "NA", "c", "d"), "B")
    ]
    assert questions[0].messages[0]["content"].endswith("D. d\n答案：")
    assert found.category == {"law": "humanities", "logic": "humanities", "physician": "other"}


@pytest.mark.parametrize("shots", range(6))
def test_zero_to_five_solved_examples(tmp_path: Path, shots: int) -> None:
    (question, *_) = sets.load(str(ceval(tmp_path / "ceval")), shots).questions()
    assert [m["role"] for m in question.messages] == ["user", "assistant"] * shots + ["user"]
    assert [m["content"] for m in question.messages[1::2]] == list("ABCDA"[:shots])


def test_how_many_examples_is_a_part_of_what_a_stage_makes(tmp_path: Path) -> None:
    folder = str(ceval(tmp_path / "ceval"))
    none, zero, one = (Evaluate(model="m", sets=[folder], shots=shots).recipe() for shots in (None, 0, 1))
    assert none == zero != one


ARC = {"question": "Why?", "choices": {"text": ["w", "x", "y"], "label": ["A", "B", "C"]}, "answerKey": "C"}
COUNTED = {"question": "Why?", "choices": {"text": ["w", "x", "y"], "label": ["1", "2", "3"]}, "answerKey": "2"}


@pytest.mark.parametrize(
    ("row", "right"),
    [
        ({"question": "Why?", "choices": ["w", "x", "y"], "answer": 0}, "A"), ({"question": "Why?", "choices": ["w", "x", "y"], "answer": 2}, "C"),
        ({"question": "Why?", "choices": ["w", "x", "y"], "answer": "b"}, "B"), ({"question": "Why?", "choices": '["w", "x", "y"]', "answer": "1"}, "B"),
        ({"question": "Why?", "choices": ["w", "x", "y"], "answer": [2, 0]}, "AC"), (ARC, "C"), (COUNTED, "B"),
        ({"question": "Why?", "A": "w", "B": "x", "C": "y", "answer": "C"}, "C"),
    ],
)  # fmt: skip
def test_options_in_lists_as_hubs_keep_them(tmp_path: Path, row: dict[str, Any], right: str) -> None:
    lines(tmp_path / "x.jsonl", row)
    asked = sets.load(str(tmp_path))
    (question,) = asked.questions()
    assert (asked.kind, question.options, question.letters, question.expected) == (
        "choice",
        ("w", "x", "y"),
        "ABC",
        right,
    )


def test_c_eval_and_cmmlu_as_hubs_keep_them(tmp_path: Path) -> None:
    row = {"question": "问", "A": "1.10", "B": "2", "C": "3", "D": "4"}
    for subject in sorted(categories("C-Eval")):
        parquet(
            tmp_path / f"ceval/{subject}/val-00000-of-00001.parquet", {"id": 0, **row, "answer": "D", "explanation": ""}
        )
        parquet(
            tmp_path / f"ceval/{subject}/test-00000-of-00001.parquet", {"id": 0, **row, "answer": "", "explanation": ""}
        )
        parquet(
            tmp_path / f"ceval/{subject}/dev-00000-of-00001.parquet",
            {"id": 0, **row, "answer": "A", "explanation": "因为"},
        )
    asked = sets.load(str(tmp_path / "ceval"), 1)
    assert (asked.layout.name, asked.file.languages, len(asked.questions())) == ("C-Eval", ["zh"], 52)
    (first, *_) = asked.questions()
    assert (first.id, first.options[0], first.expected, first.messages[1]["content"]) == (
        "accountant/0",
        "1.10",
        "D",
        "A",
    )
    assert asked.category["law"] == "humanities"
    renamed = {"Question": "问", **row, "Answer": "B"}
    del renamed["question"]
    for split in ("dev", "test"):
        parquet(tmp_path / f"cmmlu/agronomy/{split}/0000.parquet", renamed)
    (question,) = sets.load(str(tmp_path / "cmmlu"), 1).questions()
    assert (question.id, question.expected, len(question.messages)) == ("agronomy/1", "B", 3)


def test_the_split_of_a_configuration(tmp_path: Path) -> None:
    for split, answer in (("train", 0), ("validation", 1), ("test", 2)):
        lines(tmp_path / f"s/easy/{split}.jsonl", {"question": "Why?", "choices": ["w", "x", "y"], "answer": answer})
    (question,) = sets.load(str(tmp_path / "s")).questions()
    assert (question.id, question.expected) == ("easy/1", "C")
    lines(tmp_path / "s/all/test.jsonl", {"question": "All?", "choices": ["w", "x"], "answer": 1})
    assert [q.id for q in sets.load(str(tmp_path / "s")).questions()] == ["easy/1"]
    lines(tmp_path / "t/more/train.jsonl", {"question": "More?", "choices": ["w", "x"], "answer": 1})
    lines(tmp_path / "t/all/test.jsonl", {"question": "All?", "choices": ["w", "x"], "answer": 1})
    assert [q.id for q in sets.load(str(tmp_path / "t")).questions()] == ["all/1"]
    (tmp_path / "s/easy/test-00001-of-00002.jsonl").write_text("{}")
    with pytest.raises(SuiteError, match=r"test-00001-of-00002.jsonl and test.jsonl are both of one split"):
        sets.load(str(tmp_path / "s"))


def pieces(names: list[str], folder: Path) -> list[str]:
    """Five rows without ids in each of the files, asked with seven examples of two more; what the questions expect."""
    for number, name in enumerate(names):
        rows = ({"question": f"{number}/{i}?", "choices": ["w", "x"], "answer": i % 2} for i in range(5))
        lines(folder / name, *rows)
        lines(folder / name.replace("test", "train"), *({"question": "e", "choices": ["w", "x"], "answer": 1},) * 5)
    questions = sets.load(str(folder), 7).questions()
    assert all(len(q.messages) == 15 for q in questions)
    return [f"{q.id} {q.stem}" for q in questions]


@pytest.mark.parametrize(
    "names",
    [
        ["law/test-00000-of-00002.jsonl", "law/test-00001-of-00002.jsonl"], ["law/test/0000.jsonl", "law/test/0001.jsonl"],
        ["law/test-00000-of-00002-0123456789abcdef.jsonl", "law/test-00001-of-00002-fedcba9876543210.jsonl"],
    ],
)  # fmt: skip
def test_parts_of_a_split_are_read_in_their_order_as_one_file(names: list[str], tmp_path: Path) -> None:
    found = pieces(names, tmp_path)
    assert sorted(found) == sorted(f"law/{n + 1} {n // 5}/{n % 5}?" for n in range(10))
    before = sets.load(str(tmp_path)).digest
    with (tmp_path / names[1]).open("a", encoding="utf-8") as file:
        file.write("\n")
    assert sets.load(str(tmp_path)).digest != before


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["test-00000-of-00003.jsonl", "test-00002-of-00003.jsonl"], "is one of 3 parts, and number 1 is not there"),
        (["test-00000-of-00003.jsonl", "test-00001-of-00003.jsonl"], "is one of 3 parts, and number 2 is not there"),
        (["test/0001.jsonl", "test/0002.jsonl"], "is one of 3 parts, and number 0 is not there"),
        (["test-00000-of-00002.jsonl", "test/0001.jsonl"], "are both of one split"),
        (["test-00000-of-00002.jsonl", "test-00001-of-00002.csv"], "are both of one split"),
        (["a/test-00000-of-00001-0123456789abcdef.jsonl", "a/test-00000-of-00001-fedcba9876543210.jsonl"], "both of one split"),
    ],
)  # fmt: skip
def test_parts_that_make_no_whole_are_not_asked(names: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match=said):
        pieces(names, tmp_path)


def test_cmmlu_and_mmlu_ask_their_test_splits(tmp_path: Path) -> None:
    for split, answer in (("dev", "C"), ("test", "D")):
        table(tmp_path / f"cmmlu/{split}/agronomy.csv", CMMLU, ["0", "问", "1", "2", "3", "4", answer])
    for split, answer in (("dev", "A"), ("val", "B"), ("test", "C")):
        row = ["What is 1.10?", "1", "NA", "", "d, e", answer]
        row[3] = "3"
        table(tmp_path / f"mmlu/{split}/anatomy_{split}.csv", row, ["Again?", "1", "2", "3", "4", answer])
    cmmlu, mmlu = (sets.load(str(tmp_path / name), 1) for name in ("cmmlu", "mmlu"))
    assert (cmmlu.layout.name, mmlu.layout.name) == ("CMMLU", "MMLU")
    (question,) = cmmlu.questions()
    assert (question.id, question.expected, question.messages[1]["content"]) == ("agronomy/0", "D", "C")
    first, second = mmlu.questions()
    assert (first.id, first.expected, first.language, first.messages[1]["content"]) == ("anatomy/1", "C", "en", "A")
    assert first.options == ("1", "NA", "3", "d, e")
    assert second.stem == "Again?"
    assert mmlu.category == {"anatomy": "other"}


def test_a_set_file_may_point_to_data_and_choose_its_split(tmp_path: Path) -> None:
    table(tmp_path / "mmlu/val/law_val.csv", ["Q?", "1", "2", "3", "4", "A"])
    table(tmp_path / "mmlu/test/law_test.csv", ["Q?", "1", "2", "3", "4", "B"])
    about = 'kind = "choice"\ntitle = "t"\nlanguages = ["en"]\nlicense = "MIT"\nsource = "a test"\ndata = "../mmlu"\n'
    (tmp_path / "mine").mkdir()
    for split, answer in (("val", "A"), ("test", "B")):
        (tmp_path / "mine/set.toml").write_text(f'{about}split = "{split}"\n', "utf-8")
        found = sets.load(str(tmp_path / "mine"))
        assert (found.name, found.questions()[0].expected) == ("mine", answer)
    (tmp_path / "mine/set.toml").write_text(about.replace("../mmlu", "../gone"), "utf-8")
    with pytest.raises(SuiteError, match=r"set.toml:6: no folder .*gone"):
        sets.load(str(tmp_path / "mine"))


def test_the_digest_does_not_depend_on_where_data_lies(tmp_path: Path) -> None:
    digests = set()
    for name in ("a", "b"):
        table(tmp_path / name / "data/x_val.csv", CEVAL, ["0", "Q", "1", "2", "3", "4", "A", ""])
        about = f'kind = "choice"\ntitle = "t"\nlanguages = ["en"]\nlicense = "MIT"\nsource = "s"\ndata = "{tmp_path / name / "data"}"\n'
        (tmp_path / name / "set.toml").write_text(about, "utf-8")
        digests.add(sets.load(str(tmp_path / name)).digest)
    assert len(digests) == 1


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_mcq_folders_of_other_tools(tmp_path: Path, suffix: str) -> None:
    columns = ["question", "A", "B", "C", "D", "E", "answer"]
    rows = [["Which, of these?", "1.10", "NA", "x\ny", "d", "e", "E"], ["二？", "1", "2", "3", "4", "5", "A"]]
    for name, some in (("mine_val", rows), ("mine_dev", rows[1:])):
        path = tmp_path / "mcq" / f"{name}.{suffix}"
        if suffix == "jsonl":
            lines(path, *(dict(zip(columns, row, strict=True)) for row in some))
        elif suffix == "parquet":
            parquet(path, *(dict(zip(columns, row, strict=True)) for row in some))
        else:
            table(path, columns, *some)
    found = sets.load(str(tmp_path / "mcq"), 1)
    one, two = found.questions()
    assert (one.subset, one.letters, one.expected, one.options) == (
        "mine",
        "ABCDE",
        "E",
        ("1.10", "NA", "x\ny", "d", "e"),
    )
    assert (two.language, two.expected, two.messages[1]["content"]) == ("zh", "A", "A")


def test_several_right_options(tmp_path: Path) -> None:
    row = {"question": "Which?", "A": "1", "B": "2", "C": "3"}
    lines(tmp_path / "s/x_val.jsonl", {**row, "answer": ["C", "A"]}, {**row, "answer": ["B"]})
    found = sets.load(str(tmp_path / "s"))
    assert found.file.multiple
    assert not found.file.likelihood
    one, two = found.questions()
    assert (one.expected, two.expected) == ("AC", "B")
    assert "Name every right option." in one.messages[0]["content"]
    table(
        tmp_path / "t/x_val.csv",
        ["question", "A", "B", "C", "answer"],
        ["Q", "1", "2", "3", "A, C"],
        ["Q2", "1", "2", "3", "BC"],
    )
    assert [q.expected for q in sets.load(str(tmp_path / "t")).questions()] == ["AC", "BC"]


def test_options_end_where_a_letter_is_missing(tmp_path: Path) -> None:
    lines(tmp_path / "s/x.jsonl", {"question": "Which?", "A": "1", "B": 2.50, "D": "no", "answer": "B"})
    (question,) = sets.load(str(tmp_path / "s")).questions()
    assert (question.letters, question.options) == ("AB", ("1", "2.5"))  # json.dumps wrote 2.5


def test_numbers_of_json_stay_as_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(
        '{"question": "Which?", "A": 1.10, "B": 007.0e1, "answer": "B"}'.replace("007", "7"), "utf-8"
    )
    (question,) = sets.load(str(tmp_path)).questions()
    assert question.options == ("1.10", "7.0e1")


def test_qa_folders_of_other_tools(tmp_path: Path) -> None:
    lines(
        tmp_path / "qa/news.jsonl",
        {"query": "Q", "response": "R", "history": []}, {"question": "Q", "answer": "R", "system": "S"},
        {"query": "Q", "response": "R", "history": [["a", "b"]]},
        {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}], "response": "R"},
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "R"}]},
    )  # fmt: skip
    found = sets.load(str(tmp_path / "qa"))
    assert (found.kind, found.file.metrics) == ("qa", ["rouge", "bleu", "exact", "f1"])
    questions = found.questions()
    assert {(q.stem, q.expected) for q in questions} == {("Q", "R")}
    roles = ["user", "system user", "user assistant user", "system user", "user"]
    assert [" ".join(m["role"] for m in q.messages) for q in questions] == roles


def test_gsm8k_asks_test_and_solves_train(tmp_path: Path) -> None:
    lines(tmp_path / "train.jsonl", {"question": "1 + 1?", "answer": "It is two.\n#### 2"})
    lines(tmp_path / "test.jsonl", {"question": "How much?", "answer": "so 1,200 dollars\n#### 1,200"})
    found = sets.load(str(tmp_path), 1)
    (question,) = found.questions()
    assert (found.kind, question.expected, question.id) == ("numeric", "1200", "test/00001")
    assert question.messages[1]["content"] == "It is two.\n#### 2"


def test_tool_folders(tmp_path: Path) -> None:
    function = {"name": "add", "parameters": {"type": "object"}}
    messages = [{"role": "user", "content": "Add 1 and 2"}]
    lines(
        tmp_path / "tools/x.jsonl",
        {"query": "Add", "tools": [function], "calls": [{"name": "add", "arguments": '{"a": 1}'}]},
    )
    lines(
        tmp_path / "fc/x.jsonl",
        {
            "messages": json.dumps(messages),
            "tools": json.dumps([{"type": "function", "function": function}]),
            "should_call_tool": True,
        },
    )
    lines(
        tmp_path / "bench/x.jsonl",
        {
            "messages": [*messages, {"role": "function", "name": "f", "content": "3"}],
            "tools": [function],
            "target": "Action: add\nAction Input: {}",
        },
    )
    tools, fc, bench = (sets.load(str(tmp_path / name)) for name in ("tools", "fc", "bench"))
    assert (tools.kind, fc.kind, bench.kind) == ("tools", "tools", "toolbench")
    assert tools.questions()[0].expected == [{"name": "add", "arguments": {"a": 1}}]
    assert fc.questions()[0].expected is True
    assert fc.questions()[0].tools == tools.questions()[0].tools == ({"type": "function", "function": function},)
    (question,) = bench.questions()
    assert question.expected == {"target": "Action: add\nAction Input: {}", "tools": ["add"]}
    assert question.messages[-1] == {"role": "user", "content": '{"role": "function", "content": "3"}'}


def test_a_question_with_two_keys_is_reported(tmp_path: Path) -> None:
    table(
        tmp_path / "val/college_economics_val.csv", CEVAL,
        ["5", "Which  is it?", "one", "two", "three", "four", "A", ""], ["54", "Which is it?", "four", "two", "three", "one", "A", ""],
        ["55", "Which is it?", "four", "one", "two", "three", "B", ""], ["56", "Which is it?", "4", "1", "2", "3", "C", ""],
    )  # fmt: skip
    found = sets.contradictions(sets.load(str(tmp_path)).questions())
    assert [(a.id, b.id) for a, b in found] == [("college_economics/5", "college_economics/54")]


def test_every_published_subject_has_one_category() -> None:
    assert {name: len(categories(name)) for name in CATEGORIES} == {"C-Eval": 52, "CMMLU": 67, "MMLU": 57}
    for groups in CATEGORIES.values():
        listed = [subject for group in groups.values() for subject in group.split()]
        assert len(listed) == len(set(listed))


cells = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(cells, cells, cells), min_size=1, max_size=4),
    st.sampled_from(["csv", "tsv", "jsonl", "parquet"]),
)
def test_a_table_comes_back_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, ...]], suffix: str
) -> None:
    names = ["question", "A", "answer"]
    path = tmp_path_factory.mktemp("t") / f"x.{suffix}"
    if suffix == "jsonl":
        lines(path, *(dict(zip(names, row, strict=True)) for row in rows))
    elif suffix == "parquet":
        parquet(path, *(dict(zip(names, row, strict=True)) for row in rows))
    else:
        table(path, names, *map(list, rows))
    assert [tuple(row.cell(name) for name in names) for row in tables.rows(path)] == rows
