"""Question sets: the published layouts read as they are, and each mistake named with its place."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evalsets import named, sets
from suite.errors import SuiteError

ABOUT = 'title = "t"\nlanguages = ["en", "zh"]\nlicense = "CC0-1.0"\nsource = "a test"\n'
COLUMNS = ["id", "question", "A", "B", "C", "D", "answer", "explanation"]


def choice_set(folder: Path, more: str = "", **subjects: list[list[str]]) -> Path:
    """A set in C-Eval's layout; `subjects` by file name such as law_val."""
    (folder / "set.toml").parent.mkdir(parents=True, exist_ok=True)
    (folder / "set.toml").write_text(f'kind = "choice"\n{ABOUT}{more}', "utf-8")
    for name, rows in subjects.items():
        path = folder / name.rsplit("_", 1)[1] / f"{name}.csv"
        path.parent.mkdir(exist_ok=True)
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
    return folder


def rows_set(folder: Path, kind: str, rows: list[Any], more: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "set.toml").write_text(f'kind = "{kind}"\n{ABOUT}{more}', "utf-8")
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "default.jsonl").write_text("".join(line + "\n" for line in lines), "utf-8")
    return folder


def law(i: int, answer: str = "B", question: str = "Which?") -> list[str]:
    return [str(i), question, "1.10", "NA", "true", "2,5", answer, ""]


def test_choice_questions_are_asked_in_the_form_of_c_eval(tmp_path: Path) -> None:
    chinese = ["1", "哪个最大？", "一", "二", "三", "四", "d", ""]
    found = sets.load(str(choice_set(tmp_path / "s", law_val=[law(0)], math_val=[chinese]))).questions()
    assert [(q.id, q.subset, q.language, q.expected, q.letters) for q in found] == [
        ("law/0", "law", "en", "B", "ABCD"), ("math/1", "math", "zh", "D", "ABCD"),
    ]  # fmt: skip
    english = "Which?\nA. 1.10\nB. NA\nC. true\nD. 2,5\nAnswer:"
    assert found[0].messages == ({"role": "user", "content": english},)
    assert found[1].messages[0]["content"] == "哪个最大？\nA. 一\nB. 二\nC. 三\nD. 四\n答案："


def test_shots_are_solved_questions_of_the_same_subject(tmp_path: Path) -> None:
    dev = [law(i, "AC"[i], f"Solved {i}?") for i in range(2)]
    folder = choice_set(tmp_path / "s", "shots = 2", law_val=[law(7)], law_dev=dev)
    (question,) = sets.load(str(folder)).questions()
    assert [m["role"] for m in question.messages] == ["user", "assistant"] * 2 + ["user"]
    assert [m["content"] for m in question.messages if m["role"] == "assistant"] == ["A", "C"]
    assert question.messages[2]["content"].startswith("Solved 1?\nA. 1.10")
    short = choice_set(tmp_path / "short", "shots = 3", law_val=[law(7)], law_dev=dev)
    with pytest.raises(SuiteError, match=r"shots = 3, but dev/law_dev.csv has 2 rows"):
        sets.load(str(short)).questions()


cells = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(cells, cells, cells, cells, cells, st.sampled_from("ABCD")), min_size=1, max_size=4))
def test_every_cell_stays_the_text_it_is(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, ...]]) -> None:
    folder = choice_set(tmp_path_factory.mktemp("set"), law_val=[[str(i), *row, ""] for i, row in enumerate(rows)])
    for question in sets.load(str(folder)).questions():
        asked, *options, answer = rows[int(question.id.partition("/")[2])]
        listed = "\n".join(f"{name}. {text}" for name, text in zip("ABCD", options, strict=True))
        assert question.messages[0]["content"].startswith(f"{asked}\n{listed}\n")
        assert question.expected == answer


def test_questions_and_references(tmp_path: Path) -> None:
    rows = [
        {"query": "Sum up: {x}", "response": "x"}, {"question": "概括", "answer": "短", "system": "简短"},
        {"query": "1", "response": "2", "lang": "zh", "id": "one", "history": []},
    ]  # fmt: skip
    found = sets.load(str(rows_set(tmp_path / "s", "qa", rows))).questions()
    assert [(q.id, q.language, q.expected) for q in found] == [
        ("default/00001", "en", "x"), ("default/00002", "zh", "短"), ("default/one", "zh", "2"),
    ]  # fmt: skip
    assert found[0].messages[0]["content"] == "Sum up: {x}"
    assert [m["role"] for m in found[1].messages] == ["system", "user"]


def test_a_limit_takes_evenly_from_the_subjects(tmp_path: Path) -> None:
    many = {f"{s}_val": [law(i) for i in range(5)] for s in ("law", "math", "art")}
    found = sets.load(str(choice_set(tmp_path / "s", **many)))
    assert [q.id for q in found.questions(4)] == ["art/0", "art/1", "law/0", "math/0"]
    assert len(found.questions(99)) == 15


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["0", "Which?", "1", "2"], r"law_val.csv:3: 4 values in a table of 8 columns"),
        (law(0, "E"), r"law_val.csv:3: answer is 'E'"),
        (law(0, ""), r"law_val.csv:3: answer is ''"),
        (["0", "Which?", "1", "", "", "", "A", ""], r"law_val.csv:3: a question needs at least two options"),
        (law(5), r"two questions have the id 'law/5'"),
    ],
)
def test_a_wrong_row_has_its_line(tmp_path: Path, row: list[str], message: str) -> None:
    found = sets.load(str(choice_set(tmp_path / "s", law_val=[law(5), row])))
    with pytest.raises(SuiteError, match=message):
        found.questions()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"query": "a"', r"default.jsonl:2: not valid JSON"),
        ("[1]", r"default.jsonl:2: expected an object"),
        ({"query": "a"}, r"default.jsonl:2: no 'response'"),
        ({"qeury": "a", "response": "b"}, r"default.jsonl:2: no 'query'\n  hint: did you mean 'qeury'"),
        ({"query": 5, "response": "b"}, r"default.jsonl:2: 'query' must be a text"),
    ],
)
def test_a_wrong_line_has_its_number(tmp_path: Path, row: Any, message: str) -> None:
    found = sets.load(str(rows_set(tmp_path / "s", "qa", [{"query": "a", "response": "b"}, row])))
    with pytest.raises(SuiteError, match=message):
        found.questions()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("shot = 1", r"set.toml:6: unknown key 'shot'\n  hint: did you mean 'shots'"),
        ("shots = -1", r"set.toml:6: shots: .*greater than or equal to 0"),
        ("[generation]\nmax_tokens = 0", r"set.toml:7: generation.max_tokens"),
        ('[prompt]\nen = "{question}"', r"set.toml:7: prompt has the fields \['question'\]"),
        ('[prompt]\nen = "{question} {options"', r"set.toml:7: prompt: expected '}'"),
        ("x = ", r"set.toml:6:.*not valid TOML"),
    ],
)
def test_a_wrong_set_file_has_its_line(tmp_path: Path, more: str, message: str) -> None:
    with pytest.raises(SuiteError, match=message):
        sets.load(str(choice_set(tmp_path / "s", more, law_val=[law(0)])))


def test_shots_may_be_drawn_by_chance_and_always_the_same(tmp_path: Path) -> None:
    dev = [law(i, "ABCD"[i % 4], f"Solved {i}?") for i in range(20)]

    def shown(name: str, more: str) -> list[str]:
        asked = sets.load(str(choice_set(tmp_path / name, f"shots = 3\n{more}", law_val=[law(50)], law_dev=dev)))
        return [m["content"].partition("\n")[0] for m in asked.questions()[0].messages if m["role"] == "user"][:-1]

    first, drawn = shown("a", ""), shown("b", "shots_random = true\n")
    assert first == ["Solved 0?", "Solved 1?", "Solved 2?"]
    assert drawn == shown("c", "shots_random = true\n") != first
    assert shown("d", "shots_random = true\n[generation]\nseed = 5\n") not in (first, drawn)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("extract = '(a'", r"set.toml:6: extract: missing \)"), ("extract = 'a|b'", "set.toml:6: extract has 0 groups, and needs one"),
        ("metric = 'partial'", r"set.toml:6: metric = 'partial' needs multiple = true"), ("metric = 'likelihood'", "needs likelihood = true in a choice set"),
        ("extract = '(a)(b)'", "extract has 2 groups"), ("metrics = ['f1']\nextract = '(a)'", "'extract' is for choice and numeric sets"),
    ],
)  # fmt: skip
def test_patterns_are_checked_when_a_set_is_read(tmp_path: Path, more: str, message: str) -> None:
    kind = "qa" if "f1" in more else "choice"
    folder = rows_set(
        tmp_path / "s", kind, [{"question": "?", "A": "1", "B": "2", "answer": "A", "response": "x"}], more
    )
    with pytest.raises(SuiteError, match=message):
        sets.load(str(folder))


def test_what_does_not_fit_the_kind_is_refused(tmp_path: Path) -> None:
    row = {"query": "a", "response": "b", "text": "c"}
    for kind, more, message in (
        ("qa", "shots = 1", "'shots' is for choice and numeric sets, and this is a qa set"), ("qa", 'metrics = ["bleu"]', "bleu cannot be the first metric"),
        ("perplexity", '[prompt]\nen = "{question}"', "prompt has the fields"),
    ):  # fmt: skip
        with pytest.raises(SuiteError, match=message):
            sets.load(str(rows_set(tmp_path / kind, kind, [row], more)))


def test_a_folder_is_told_by_a_slash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows_set(tmp_path / "mine", "qa", [{"query": "a", "response": "b"}])
    monkeypatch.chdir(tmp_path)
    assert sets.load("./mine").name == "mine"
    with pytest.raises(SuiteError, match=r"no question set 'mine'\n  hint: for the folder write \./mine"):
        sets.load("mine")


def test_a_name_that_is_no_set_gets_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match="no question set 'ceval-mnii'") as caught:
        sets.load("ceval-mnii")
    assert "'ceval-mini'" in caught.value.hint
    with pytest.raises(SuiteError, match="the set has no data to ask: the folder is empty"):
        sets.load(str(tmp_path))
    (tmp_path / "set.toml").write_text(f'kind = "qa"\n{ABOUT}', "utf-8")
    with pytest.raises(SuiteError, match=r"the set has no data to ask: found set\.toml"):
        sets.load(str(tmp_path))
    with pytest.raises(SuiteError, match="no question sets"):
        named.load([])


def test_two_sets_of_one_name_are_refused(tmp_path: Path) -> None:
    folders = [str(rows_set(tmp_path / x / "s", "qa", [{"query": "a", "response": "b"}])) for x in "ab"]
    with pytest.raises(SuiteError, match="two sets would be reported as 's'"):
        named.load(folders)


def test_the_digest_is_that_of_the_content(tmp_path: Path) -> None:
    one, same = (sets.load(str(choice_set(tmp_path / x, law_val=[law(0)]))).digest for x in "ab")
    assert one == same
    others = [
        choice_set(tmp_path / "c", law_val=[law(0, "A")]), choice_set(tmp_path / "d", "likelihood = true", law_val=[law(0)]),
        choice_set(tmp_path / "e", law_val=[law(0)], law_dev=[law(1)]), choice_set(tmp_path / "f", art_val=[law(0)]),
    ]  # fmt: skip
    assert len({one, *(sets.load(str(o)).digest for o in others)}) == 5


def test_a_metric_that_was_changed_makes_another_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    code = tmp_path / "changing_metric_of_a_test.py"
    folder = rows_set(tmp_path / "s", "qa", [{"query": "a", "response": "b"}], f'metrics = ["{code.stem}:near"]')
    code.write_text("def near(reply, expected): return 0.5\n", "utf-8")
    before = sets.load(str(folder)).digest
    assert sets.load(str(folder)).digest == before
    code.write_text("def near(reply, expected): return 0.25\n", "utf-8")
    assert sets.load(str(folder)).digest != before


@pytest.mark.parametrize("name", sets.names())
def test_shipped_sets_are_right(name: str) -> None:
    found = sets.load(name)
    questions = found.questions()
    languages = [q.language for q in questions]
    assert len(questions) >= 50
    assert set(languages) == set(found.file.languages) == {"en", "zh"}
    assert min(languages.count("en"), languages.count("zh")) >= 20
    assert found.file.license == "Apache-2.0"
    assert found.file.source.startswith("written for this project")
    if found.kind == "choice":
        for_each = [sum(q.expected == option for q in questions) for option in "ABCD"]
        assert min(for_each) > len(questions) / 8, "one letter must not be right too often"
    assert len({q.digest for q in questions}) == len(questions)


def test_sets_need_no_torch() -> None:
    code = "import sys, evalsets.sets, suite.evaluate; print([m for m in ('torch', 'transformers', 'numpy.random', 'aiohttp') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch" not in shown.stdout
    assert "transformers" not in shown.stdout
