"""The `train` stage before it runs: its settings, its checks, its checkpoints and its curve, all without torch."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from suite.config import Where, parse
from suite.errors import SuiteError
from suite.stages import Artifact
from suite.train import checkpoint, curve
from suite.train.stage import Train

ROOT = Path(__file__).parents[2]


def stage(**settings: Any) -> Train:
    return parse(Train, {"base": "base", "data": "rows.json", **settings}, Where())


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, list[Artifact | None]]:
    base = tmp_path / "base"
    base.mkdir()
    for name in ("config.json", "model.safetensors", "chat_template.jinja"):
        (base / name).write_text("{}", "utf-8")
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"instruction": "Hi {{name}}", "output": "Hello"}]), "utf-8")
    return {"base": [Artifact(base, "model")], "data": [Artifact(rows, "dataset")]}


def test_it_makes_an_adapter_or_a_model() -> None:
    assert stage().makes() == "adapter"
    assert stage(lora={"rank": 4}).makes() == "adapter"
    assert stage(lora=False).makes() == "model"


def test_data_is_one_file_or_several() -> None:
    assert stage().references() == {"base": ["base"], "data": ["rows.json"]}
    assert stage(data=["a.json", "@made"]).references()["data"] == ["a.json", "@made"]


def test_how_often_to_save_does_not_change_the_result() -> None:
    assert stage(save_steps=5).recipe() == stage(save_steps=50).recipe()
    assert stage(lr=1e-3).recipe() != stage().recipe()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": {"rnak": 4}}, "did you mean 'rank'"),
        ({"lora": {"rank": 0}}, "greater than or equal to 1"),
        ({"lr": -1}, "greater than 0"),
        ({"epohcs": 3}, "did you mean 'epochs'"),
        ({"schedule": "linaer"}, "linear"),
    ],
)
def test_wrong_settings_say_what_is_meant(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SuiteError, match=message):
        stage(**settings)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"weigth_decay": 0.1}, "did you mean 'weight_decay'"),
        ({"learning_rate": 1e-4}, "set lr instead"),
        ({"packing_strategy": "wrapped"}, "exact and repeatable training depends on it"),
        ({"assistant_only_loss": True}, "exact and repeatable training depends on it"),
        ({"resume_from_checkpoint": "x"}, "exact and repeatable training depends on it"),
    ],
)
def test_extra_is_checked_against_trl_s_real_names(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(SuiteError, match=message):
        stage(extra=extra).check({})


def test_extra_takes_trl_s_other_settings() -> None:
    stage(extra={"weight_decay": 0.1, "max_grad_norm": 0.5, "neftune_noise_alpha": 5, "loss_type": "dft"}).check({})


def test_check_looks_at_base_and_data(inputs: dict[str, list[Any]]) -> None:
    stage(fill={"name": "x"}).check(inputs)
    with pytest.raises(SuiteError, match="no value for"):
        stage().check(inputs)
    stage().check({"base": [None], "data": [None]})
    base = inputs["base"][0].path
    (base / "config.json").write_text('{"max_position_embeddings": 512}', "utf-8")
    with pytest.raises(SuiteError, match="more than the base's 512 positions"):
        stage(fill={"name": "x"}, max_length=513).check(inputs)
    (base / "config.json").write_text("{}", "utf-8")
    for name, message in (
        ("chat_template.jinja", "no chat template"),
        ("model.safetensors", "no .safetensors weights"),
        ("config.json", "no config.json"),
    ):
        (base / name).unlink()
        with pytest.raises(SuiteError, match=message):
            stage(fill={"name": "x"}).check(inputs)


def test_checking_imports_no_torch(inputs: dict[str, list[Any]]) -> None:
    base, rows = inputs["base"][0].path, inputs["data"][0].path
    program = f"""
import sys
from pathlib import Path
from suite.stages import Artifact, kind
made = kind("train")(base="x", data="y", fill={{"name": "x"}}, extra={{"weight_decay": 0.1}})
made.check({{"base": [Artifact(Path({str(base)!r}), "model")], "data": [Artifact(Path({str(rows)!r}), "dataset")]}})
heavy = {{"torch", "transformers", "trl", "peft", "numpy", "matplotlib"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_the_newest_complete_checkpoint_counts_and_torn_ones_go(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "none") is None
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert checkpoint.newest(tmp_path) is None
    assert not list(tmp_path.iterdir())
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step != 100:
            checkpoint.seal(tmp_path / f"checkpoint-{step}")
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoint-10"


def test_the_curve_has_a_row_a_step(tmp_path: Path) -> None:
    history = [{"step": n, "epoch": n / 4, "loss": 3.0 / n, "learning_rate": 0.1, "other": 1.0} for n in (1, 2, 3)]
    curve.write(tmp_path, history)
    with (tmp_path / "loss.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == [3.0, 1.5, 1.0]
    assert list(rows[0]) == ["step", "epoch", "loss", "learning_rate"]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@given(st.lists(st.floats(0, 100), min_size=1, max_size=50))
def test_smoothing_stays_within_what_it_has_seen(values: list[float]) -> None:
    smoothed = curve.smooth(values)
    assert len(smoothed) == len(values)
    assert smoothed[0] == pytest.approx(values[0])
    for count, value in enumerate(smoothed, 1):
        assert min(values[:count]) - 1e-9 <= value <= max(values[:count]) + 1e-9
