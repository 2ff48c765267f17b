"""Question sets whose data lies at a hub: fetched as a stage of the plan, at one commit, and read as hubs keep it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from evalsets import named
from suite import pipeline, store
from suite.cli import main
from suite.commands import named as artifacts
from suite.errors import SuiteError
from suite.evaluate import Evaluate
from suite.runner import Runner
from suite.runs import new_run
from tests.hub_server import TOKEN, Hub
from tests.modelscope_server import ModelScopeHandler
from tests.tiny.test_hub import hub
from tests.unit.openai_fake import Say, serve

__all__ = ["hub"]

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
ONE = "-00000-of-00001"
SETTINGS = 'kind = "choice"\ntitle = "t"\nlanguages = ["en"]\nlicense = "MIT"\nsource = "a test"\n'


def parquet(*rows: dict[str, Any]) -> bytes:
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), content)
    return content.getvalue()


def lines(*rows: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def mmlu(subject: str, number: int) -> dict[str, Any]:
    return {
        "question": f"{subject} {number}?",
        "subject": subject,
        "choices": ["w", "x", "y", "1.10"],
        "answer": number % 4,
    }


def gsm8k(number: int) -> dict[str, Any]:
    return {"question": f"{number} + 1?", "answer": f"{number} + 1 = {number + 1}\n#### {number + 1}"}


QUIZ = {
    f"{subject}/{split}{ONE}.parquet": parquet(*(mmlu(subject, i) for i in range(count)))
    for subject in ("law", "art", "all")
    for split, count in (("dev", 2), ("validation", 1), ("test", 5))
} | {"README.md": b"a card", "quiz.py": b"raise SystemExit", "set.toml": b"metrics = ['os:system']", "law/a.zip": b"x"}
SUMS = {
    f"{config}/{split}{ONE}.parquet": parquet(*map(gsm8k, range(3)))
    for config in ("main", "socratic")
    for split in ("train", "test")
}


@pytest.fixture
def data(hub: Hub) -> Hub:
    hub.add("datasets/org/quiz", QUIZ, private=False)
    hub.add("datasets/org/sums", SUMS, private=False)
    return hub


def fetched(address: str) -> dict[str, Path]:
    return {address: artifacts.artifact(address, "--sets", "data").path}


def test_configurations_are_subsets_and_numbers_are_classes(data: Hub) -> None:
    (asked,) = named.load(["hf:org/quiz"], 2, fetched("hf:datasets/org/quiz"))
    questions = asked.questions()
    assert (asked.name, asked.kind, asked.file.likelihood) == ("quiz", "choice", True)
    assert [q.id for q in questions] == [f"{subject}/{i}" for subject in ("art", "law") for i in range(1, 6)]
    assert [q.expected for q in questions[:5]] == list("ABCDA")
    assert questions[0].options == ("w", "x", "y", "1.10")
    assert [m["content"][:5] for m in questions[-1].messages if m["role"] == "user"] == ["law 0", "law 1", "law 4"]


def test_only_tables_and_the_card_are_fetched(data: Hub) -> None:
    """What a repository says of how it is asked, or runs, is nobody's business here."""
    ((_, folder),) = fetched("hf:datasets/org/quiz").items()
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {name for name in QUIZ if name.endswith((".parquet", ".md"))} | {"artifact.json"}


def test_a_folder_of_a_repository_is_a_set(data: Hub) -> None:
    (asked,) = named.load(["hf:org/sums/main"], None, fetched("hf:datasets/org/sums/main"))
    assert (asked.name, asked.kind, [q.expected for q in asked.questions()]) == (
        "sums-main",
        "numeric",
        ["1", "2", "3"],
    )
    assert not any("socratic" in request.path for request in data.log if "resolve" in request.path)


def test_a_table_in_several_parts_is_one_set(data: Hub) -> None:
    parts = (parquet(*map(gsm8k, range(first, first + 3))) for first in (0, 3))
    data.add(
        "datasets/org/parts", {f"data/test-0000{n}-of-00002.parquet": p for n, p in enumerate(parts)}, private=False
    )
    (asked,) = named.load(["hf:org/parts"], None, fetched("hf:datasets/org/parts"))
    assert [(q.id, q.expected) for q in asked.questions()] == [(f"default/{i:05}", str(i)) for i in range(1, 7)]


def test_a_stage_takes_the_address_and_a_moved_branch_is_another_set(data: Hub, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "set.toml").write_text(f'{SETTINGS}shots = 1\ndata = "hf:org/quiz/law"\n', "utf-8")
    file = tmp_path / "p.toml"
    file.write_text('[stage.eval]\nmodel = "nano"\nsets = ["ceval-mini", "hf:org/sums/main", "./mine"]\n', "utf-8")
    plan = pipeline.read(file)
    assert {*plan.nodes} == {"hf:datasets/org/sums/main", "hf:datasets/org/quiz/law", "eval"}
    at = store.Store(store.home())

    class Silent:
        def event(self, stage: str, event: Any) -> None: ...
        def tick(self) -> None: ...

    def made() -> tuple[dict[str, Any], list[str]]:
        whole = pipeline.read(file)
        downloads = {name: node for name, node in whole.nodes.items() if name != "eval"}
        outcomes = Runner(type(plan)("p", None, "", downloads), at, new_run(at, "p", "", []), Silent()).run()
        assert [str(o.error) for o in outcomes.values() if o.error] == []
        stage = whole.nodes["eval"].stage
        inputs = {"sets": [outcomes[address].artifact for address in stage.references()["sets"]]}
        stage.check(inputs)
        assert isinstance(stage, Evaluate)
        sets = named.load(stage.sets, None, stage._fetched(inputs))
        return {asked.name: asked.digest for asked in sets}, [o.state for o in outcomes.values()]

    first, states = made()
    assert ({*first}, states) == ({"ceval-mini", "sums-main", "mine"}, ["done", "done"])
    assert made() == (first, ["cached", "cached"])
    data.add("datasets/org/quiz", {f"law/test{ONE}.parquet": parquet(mmlu("law", 7))}, private=False)
    second, states = made()
    assert {name for name in first if first[name] != second[name]} == {"mine"}
    assert sorted(states) == ["cached", "done"]


def test_an_endpoint_is_asked_what_lies_at_a_hub(data: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def rule(body: dict[str, Any]) -> Say:
        first, _, second = body["messages"][-1]["content"].partition(" + ")
        return Say(str(int(first) + int(second[0])))

    with serve(rule) as fake:
        command = [
            "eval",
            "--url",
            fake.url,
            "--model",
            "m",
            "--sets",
            "hf:org/sums/main",
            "--json",
            "--out",
            str(tmp_path / "out"),
        ]
        assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["sums-main"]["acc"] == 1


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("hf:org/nothing", "no repository datasets/org/nothing"), ("hf:org/quiz@v9", "no such commit, branch or tag"), ("hf:org/quiz/gone", "'gone' of the repository has no csv"),
        ("hf:org/zipped", "the repository has no csv, tsv, jsonl or parquet; it has data.zip"), ("hf:quiz", "address"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_while_planning(data: Hub, tmp_path: Path, address: str, said: str) -> None:
    data.add("datasets/org/zipped", {"data.zip": b"x"}, private=False)
    file = tmp_path / "p.toml"
    file.write_text(f'[stage.eval]\nmodel = "nano"\nsets = ["{address}"]\n', "utf-8")
    with pytest.raises(SuiteError, match=said) as caught:
        pipeline.read(file)
    assert caught.value.where == f"{file}:3"


def test_a_set_of_questions_is_no_model_and_no_training_data(data: Hub, tmp_path: Path) -> None:
    file = tmp_path / "p.toml"
    for table, said in (
        ('quantize]\nmodel = "hf:datasets/org/quiz"\n', "takes a model, but 'hf:datasets/org/quiz' makes data"),
        ('train]\nbase = "nano"\ndata = "hf:datasets/org/quiz"\n', "no hub address can stand here"),
    ):
        file.write_text(f"[stage.{table}", "utf-8")
        with pytest.raises(SuiteError, match=said):
            pipeline.read(file)


def test_modelscope_has_data_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("modelscope_hub", reason="the extra 'modelscope' is not installed")

    with Hub(ModelScopeHandler).serving() as hub:
        for name, value in (("ENDPOINT", hub.url), ("API_TOKEN", TOKEN), ("HOME", str(tmp_path / "ms-home"))):
            monkeypatch.setenv(f"MODELSCOPE_{name}", value)
        repo = hub.add("datasets/org/quiz", {})
        repo.commit("master", "by hand", {"test.jsonl": (lines(mmlu("law", 2)), ""), "law/test.csv": (b"x", "")})
        repo.commit("master", "again", {"law/test.csv": None, "train.jsonl": (lines(mmlu("law", 1)), "")})
        (asked,) = named.load(["ms:org/quiz"], 1, fetched("ms:datasets/org/quiz"))
        (question,) = asked.questions()
        assert (question.id, question.expected, question.messages[1]["content"]) == ("test/1", "C", "B")
