"""A GGUF file among the artifacts that are evaluated and compared; skipped where llama.cpp's server is not installed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from serve.engines.llamacpp import NEEDED
from suite import cli, runs, store

for name in NEEDED:
    pytest.importorskip(name, reason="llama.cpp's server is not installed")

PIPELINE = """
[stage.gguf]
use = "export"
to = "gguf"
model = "nano"

[stage.score]
use = "eval"
matrix.model = ["nano", "@gguf"]
sets = ["ceval-mini", "tool-calls", "perplexity"]
limit = 12
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with nano, its GGUF file and both evaluations."""
    folder = tmp_path_factory.mktemp("gguf")
    (folder / "beside.toml").write_text(PIPELINE, "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUITE_HOME", str(folder / "home"))
        assert cli.main(["run", str(folder / "beside.toml")]) == 0
    return folder / "home"


@pytest.fixture(autouse=True)
def in_that_store(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUITE_HOME", str(home))


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main([*arguments, "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))


def test_a_gguf_has_a_row_of_quality_beside_its_model(capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "compare", "beside", "--against", "parent")
    base, file = found["subjects"]
    assert (base["backend"], file["backend"]) == ("torch", "llamacpp")
    assert file["sets"]["ceval-mini"]["acc"] == base["sets"]["ceval-mini"]["acc"]
    assert file["sets"]["tool-calls"] == base["sets"]["tool-calls"]
    assert file["sets"]["perplexity"]["ppl"] == pytest.approx(base["sets"]["perplexity"]["ppl"], rel=1e-2)
    assert file["bytes"] > 3e6
    assert file["parity"]["kl"] < 1e-3
    assert [(pair["subject"], pair["against"]) for pair in found["comparisons"]] == [(file["name"], base["name"])]


def test_a_file_is_evaluated_by_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs.find(store.home(), "beside")
    assert run
    (made,) = runs.link(run, "gguf").resolve().glob("*.gguf")
    alone = shutil.copyfile(made, tmp_path / "alone.gguf")
    assert cli.main(["eval", str(alone), "--sets", "ceval-mini", "--limit", "12"]) == 0
    (found,) = told(capsys, "compare", str(alone))["subjects"]
    whole, _ = told(capsys, "compare", str(made), "nano")["subjects"]
    assert found["sets"]["ceval-mini"]["acc"] == whole["sets"]["ceval-mini"]["acc"]
    assert cli.main(["eval", str(alone), "--backend", "torch", "--limit", "12"]) == 2
    assert "leave backend out: llamacpp serves it" in capsys.readouterr().err
    assert cli.main(["eval", "nano", "--backend", "llamacpp", "--limit", "12"]) == 2
    assert "no GGUF file" in capsys.readouterr().err
