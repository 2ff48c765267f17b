"""`suite parity A B`: models, adapters and artifacts by name, a table or JSON, and an exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from export.merge import merge
from suite.cli import main
from suite.stages import RECORD
from suite.store import Store
from tests.tiny.tiny_models import tiny_adapter, tiny_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`m`, an adapter `a` for it, `merged` of both, and `off`: `m` with one weight changed."""
    folder = tmp_path_factory.mktemp("models")
    base = tiny_model(folder / "m", hidden=64)
    adapter = tiny_adapter(base, folder / "a")
    merge(base, [adapter], folder / "merged", 10**9)
    tiny_model(folder / "wide", hidden=128)
    tiny_model(folder / "off", hidden=64)
    weights = load_file(folder / "off" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] += 1
    save_file(weights, folder / "off" / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(autouse=True)
def here(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)


def recorded(home: Path, key: str, source: Path, **record: Any) -> Path:
    """An artifact of the store, with links to the files of `source`."""
    Store(home)
    folder = home / "artifacts" / key
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).symlink_to(file)
    described = {"name": "train", "kind": "train", "digest": key, "inputs": {}, **record}
    (folder / RECORD).write_text(json.dumps(described))
    return folder


def test_a_table_names_the_numbers_and_the_worst_probe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", "m", "off"]) == 0
    said = capsys.readouterr().out
    for what in ("off against m", "KL, nats a token", "same preferred token", "same prompt tokens", "worst probe"):
        assert what in said


def test_json_and_limits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", "m", "m", "--json", "--max-kl", "0", "--min-top1", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kl"] == 0
    assert found["prompts"] == 1
    assert main(["parity", "m", "off", "--json", "--max-kl", "1e-9"]) == 3
    shown = capsys.readouterr()
    assert 0 < json.loads(shown.out)["kl"] < 1
    assert "above 1e-09; worst on" in shown.err


def test_an_adapter_with_its_base_is_its_merged_model(suite_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", "a", "merged", "--base", "m", "--max-kl", "1e-9"]) == 0
    made_from = {
        "base": [{"path": str(Path("m").resolve()), "type": "model", "digest": Store(suite_home).digest(Path("m"))}]
    }
    recorded(suite_home, "abc123", Path("a").resolve(), type="adapter", inputs=made_from)
    assert main(["parity", "abc", "merged", "--json", "--max-kl", "1e-9"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["max_dlogit"] < 1e-4


def test_a_base_that_changed_since_is_not_taken(suite_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_from = {"base": [{"path": str(Path("off").resolve()), "type": "model", "digest": "another"}]}
    recorded(suite_home, "abc123", Path("a").resolve(), type="adapter", inputs=made_from)
    assert main(["parity", "abc123", "merged"]) == 2
    assert "has changed since the adapter was trained" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["m"], "required: child"),
        (["m", "nowhere"], "no such file or folder: nowhere"),
        (["m", "@nothing"], "no run has an artifact of a stage 'nothing'"),
        (["a", "m"], "does not record where its base is"),
        (["a", "m", "--base", "nowhere"], "--base: no such file or folder: nowhere"),
        (["a", "m", "--base", "wide"], "the adapter is for another base"),
        (["m", "empty"], "no model*.safetensors"),
        (["m", "m", "--max-kl", "much"], "invalid float value: 'much'"),
        (["m", "key"], "begins the keys of 2 artifacts"),
        (["one.gguf", "two.gguf"], "GGUF files"),
    ],
)
def test_wrong_input_is_one_message_before_torch_is_imported(
    tmp_path: Path, suite_home: Path, arguments: list[str], said: str
) -> None:
    for name in ("key1", "key2"):
        recorded(suite_home, name, Path("m").resolve(), type="model")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    (tmp_path / "one.gguf").touch()
    (tmp_path / "two.gguf").touch()
    for name in ("m", "a", "wide"):
        (tmp_path / name).symlink_to(Path(name).resolve())
    script = f"import sys; from suite.cli import main; code = main({['parity', *arguments]!r}); assert 'torch' not in sys.modules; sys.exit(code)"
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 2, run.stderr
    assert run.stderr.startswith("error: ")
    assert said in run.stderr
