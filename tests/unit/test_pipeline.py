"""Every mistake in a pipeline file gives one message with its line and the cure, before anything runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import evalsets
from suite import pipeline
from suite.errors import SuiteError
from tests.unit.kinds import pipeline_file

GOOD = """
name = "good"

[defaults.make]
inner.rank = 8

[stage.start]
use = "make"

[stage.tuned]
use = "tune"
base = "@start"
"""


def mistake(folder: Path, text: str, overrides: list[str] | None = None) -> str:
    with pytest.raises(SuiteError) as caught:
        pipeline.read(pipeline_file(folder, text), overrides)
    assert caught.value.exit_code == 2
    return str(caught.value).replace(str(folder) + "/", "")


MISTAKES = [
    ("unknown key", '[stage.a]\nuse = "make"\ntxet = "x"', "pipeline.toml:3: unknown key 'txet'", "did you mean 'text'?"),
    ("unknown nested key", '[stage.a]\nuse = "make"\n[stage.a.inner]\nrnak = 2', "pipeline.toml:4: unknown key 'rnak'", "'rank'"),
    ("wrong type", '[stage.a]\nuse = "make"\ntext = 3', "pipeline.toml:3: text: input should be a valid string, got 3", ""),
    ("out of bounds", '[stage.a]\nuse = "make"\ninner.rank = 0', "pipeline.toml:3: inner.rank: input should be greater", ""),
    ("unknown stage kind", '[stage.a]\nuse = "trian"', "pipeline.toml:2: unknown stage kind 'trian'", "did you mean 'train'?"),
    ("kind by the table's name", "\n[stage.trian]", "pipeline.toml:2: unknown stage kind 'trian'", "did you mean"),
    ("no such module", '[stage.a]\nuse = "nowhere:X"', "pipeline.toml:2: stage kind 'nowhere:X' cannot be imported", "PYTHONPATH"),
    ("missing setting", '\n[stage.a]\nuse = "tune"', "pipeline.toml:2: 'base' is missing", "The model."),
    ("missing file", '[stage.a]\nuse = "make"\ndata = "no.jsonl"', "pipeline.toml:3: data: no such file or folder: no.jsonl", "looked for"),
    ("no such stage", '[stage.a]\nuse = "tune"\nbase = "@b"', "pipeline.toml:3: no stage 'b'", "known: a"),
    ("a stage's own check", '[stage.a]\nuse = "make"\ntext = "refused"', "pipeline.toml:3: text: this text is refused", "write another"),
    ("top level", '[stages.a]\nuse = "make"', "pipeline.toml:1: unknown table 'stages'", "did you mean 'stage'?"),
    ("no stages", 'name = "x"', "pipeline.toml: no stages", "[stage.train]"),
    ("not a table", "[stage]\na = 1", "pipeline.toml:2: 'stage.a' must be a table", "[stage.a]"),
    ("not TOML", '[stage.a]\nuse = "make', "pipeline.toml:2: not valid TOML", ""),
    ("bad gate", '[stage.a]\nuse = "make"\ngate = ["x >="]', "pipeline.toml:3: gate 'x >=': a value is missing", "spaces"),
    ("gate on nothing", '[stage.a]\nuse = "make"\ngate = ["x > @z.y"]', "pipeline.toml:3: no stage 'z'", "known: a"),
    ("needs nothing", '[stage.a]\nuse = "make"\nneeds = ["@z"]', "pipeline.toml:3: no stage 'z'", "known: a"),
    ("needs no reference", '[stage.a]\nuse = "make"\nneeds = ["z"]', "pipeline.toml:3: expected a reference to a stage", "@name"),
    ("needs a word", '[stage.a]\nuse = "make"\nneeds = "@z"', "pipeline.toml:3: needs: input should be a valid list", ""),
    ("matrix no list", '[stage.a]\nuse = "make"\nmatrix.text = "x"', "pipeline.toml:3: matrix.text must be a list", "["),
    ("matrix and value", '[stage.a]\nuse = "make"\ntext = "x"\nmatrix.text = ["y"]', "pipeline.toml:4: 'text' is set twice", ""),
    ("matrix wrong type", '[stage.a]\nuse = "make"\nmatrix.text = ["y", 3]', "pipeline.toml:3: text: input should be", ""),
    ("hub address", '[stage.a]\nuse = "tune"\nbase = "hf:a/b"', "pipeline.toml:3: hf:a/b: HF_HUB_OFFLINE is set", "unset it"),
    ("hub data", '[stage.a]\nuse = "train"\nbase = "nano"\ndata = "hf:a/b"', "pipeline.toml:4: data: 'hf:a/b': no hub", "give the file"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said", "hint"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_said_with_its_line_and_cure(tmp_path: Path, text: str, said: str, hint: str) -> None:
    message = mistake(tmp_path, text)
    assert said in message
    assert hint in message


def test_a_mistake_in_the_defaults_is_reported_there(tmp_path: Path) -> None:
    message = mistake(tmp_path, GOOD.replace("inner.rank = 8", "inner.rnak = 8"))
    assert message.startswith("pipeline.toml:5: unknown key 'rnak'")


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    message = mistake(tmp_path, GOOD + '[stage.again]\nuse = "tune"\nbase = "@tuned"\n')
    assert "pipeline.toml:15: 'base' takes a model, but '@tuned' makes an adapter" in message
    assert "put a merge stage between them" in message


def test_a_cycle_is_drawn(tmp_path: Path) -> None:
    text = '[stage.a]\nuse = "fold"\nadapter = "@b"\n[stage.b]\nuse = "tune"\nbase = "@a"\n'
    message = mistake(tmp_path, text)
    assert "stages depend on each other: " in message
    assert "a -> b -> a" in message or "b -> a -> b" in message


def test_of_a_union_only_the_branch_that_was_meant_is_explained(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text("{}")
    message = mistake(tmp_path, '[stage.train]\nbase = "nano"\ndata = "d.jsonl"\nlora.rank = 0\n')
    assert message.startswith("pipeline.toml:4: lora.rank: input should be greater than")
    assert "False" not in message


def test_several_mistakes_come_together(tmp_path: Path) -> None:
    message = mistake(tmp_path, '[stage.a]\nuse = "make"\ntext = 1\nscore = "high"')
    assert "pipeline.toml:3: text" in message
    assert "pipeline.toml:4: score" in message


def test_defaults_are_inherited_and_overridden(tmp_path: Path) -> None:
    text = GOOD + '[stage.own]\nuse = "make"\ninner.rank = 2\n[stage.named]\nuse = "make"\ninner.name = "y"\n'
    nodes = pipeline.read(pipeline_file(tmp_path, text)).nodes
    dumped = {name: node.stage.model_dump()["inner"] for name, node in nodes.items() if name != "tuned"}
    assert dumped == {
        "start": {"rank": 8, "name": "x"}, "own": {"rank": 2, "name": "x"}, "named": {"rank": 8, "name": "y"},
    }  # fmt: skip


def test_set_overrides_one_setting_and_is_named_in_errors(tmp_path: Path) -> None:
    file = pipeline_file(tmp_path, GOOD)
    nodes = pipeline.read(file, ["stage.start.inner.rank=2", "stage.start.text=word"]).nodes
    assert nodes["start"].stage.model_dump()["inner"]["rank"] == 2
    assert nodes["start"].stage.model_dump()["text"] == "word"
    assert "--set stage.start.inner.rank=-1: inner.rank" in mistake(tmp_path, GOOD, ["stage.start.inner.rank=-1"])
    assert "no stage 'strat'" in mistake(tmp_path, GOOD, ["stage.strat.text=x"])
    assert "expected key=value" in mistake(tmp_path, GOOD, ["stage.start.text"])


def test_a_matrix_opens_and_is_referred_to(tmp_path: Path) -> None:
    text = """
[stage.m]
use = "make"
matrix.text = ["a", "b"]
matrix.inner.rank = [1, 2]
skip = [{ text = "b", inner.rank = 2 }]

[stage.all]
use = "pack"
models = ["@m[*]"]

[stage.some]
use = "pack"
models = ["@m[a,2]", "@m[b,1]"]
"""
    plan = pipeline.read(pipeline_file(tmp_path, text))
    assert list(plan.nodes) == ["m[a,1]", "m[a,2]", "m[b,1]", "all", "some"]
    assert plan.nodes["all"].inputs["models"] == ["m[a,1]", "m[a,2]", "m[b,1]"]
    assert plan.nodes["m[b,1]"].stage.model_dump()["inner"]["rank"] == 1


def test_a_matrix_over_references(tmp_path: Path) -> None:
    text = """
[stage.m]
use = "make"
matrix.text = ["a", "b"]

[stage.t]
use = "tune"
matrix.base = ["@m[*]"]
"""
    plan = pipeline.read(pipeline_file(tmp_path, text))
    assert list(plan.nodes) == ["m[a]", "m[b]", "t[m[a]]", "t[m[b]]"]
    assert plan.nodes["t[m[b]]"].inputs["base"] == ["m[b]"]
    message = mistake(tmp_path, text.replace('matrix.base = ["@m[*]"]', 'base = "@m"'))
    assert "'@m' has a matrix" in message
    assert "@m[a], @m[b]" in message
    message = mistake(tmp_path, text + '[stage.u]\nuse = "tune"\nbase = "@m[c]"\n')
    assert "no stage 'm[c]'" in message
    loop = text.replace('matrix.text = ["a", "b"]', 'matrix.text = ["@t[*]"]')
    assert "matrices depend on each other" in mistake(tmp_path, loop)


def test_the_order_is_the_files_order_where_references_allow(tmp_path: Path) -> None:
    text = '[stage.z]\nuse = "tune"\nbase = "@y"\n[stage.y]\nuse = "make"\n[stage.x]\nuse = "make"\nneeds = ["@z"]\n'
    assert list(pipeline.read(pipeline_file(tmp_path, text)).nodes) == ["y", "z", "x"]


def test_a_set_of_ones_own_is_looked_for_beside_the_pipeline(tmp_path: Path) -> None:
    text = '[stage.eval]\nmodel = "nano"\nsets = ["sets/own", "ceval-mini"]\n'
    assert "sets/own" in mistake(tmp_path, text)
    shutil.copytree(Path(evalsets.__file__).parent / "shipped" / "perplexity", tmp_path / "sets" / "own")
    (node,) = pipeline.read(tmp_path / "pipeline.toml").nodes.values()
    assert node.stage.model_dump()["sets"] == [str(tmp_path / "sets" / "own"), "ceval-mini"]
    alone = pipeline.one_stage("score", node.stage.model_copy(update={"sets": ["./sets/own"]}), tmp_path)
    assert alone.nodes["score"].stage.model_dump()["sets"] == [str(tmp_path / "sets" / "own")]


def test_serve_is_checked_with_the_rest(tmp_path: Path) -> None:
    serve = '[serve]\nbase = "@start"\nadapters = { t = "@tuned" }\n'
    plan = pipeline.read(pipeline_file(tmp_path, GOOD + serve))
    assert plan.serve_sources == {("base",): "start", ("adapters", "t"): "tuned"}
    assert "'base' takes a model or a quantized model, but '@tuned' makes an adapter" in mistake(
        tmp_path, GOOD + '[serve]\nbase = "@tuned"\n'
    )
    assert "pipeline.toml:15: no stage 'tuend'" in mistake(tmp_path, GOOD + serve.replace("@tuned", "@tuend"))
    assert "unknown key 'prot'" in mistake(tmp_path, GOOD + serve + "prot = 1\n")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda f: f.mkdir(), "this folder has no config.json"),
        (lambda f: f.write_text(""), "this is a file"),
        (lambda f: (f.mkdir(), (f / "config.json").write_text("{")), "config.json is not valid JSON"),
        (lambda f: (f.mkdir(), (f / "adapter_config.json").write_text("{}")), "this folder holds adapter"),
    ],
)
def test_a_folder_is_looked_at(tmp_path: Path, make: object, said: str) -> None:
    make(tmp_path / "base")  # type: ignore[operator]
    message = mistake(tmp_path, '[stage.a]\nuse = "tune"\nbase = "base"\n')
    assert message.startswith("pipeline.toml:3: base: base: ")
    assert said in message
