"""The proof of a merge: it passes what rounding explains, on any model, and nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from export import parity
from export.lora import proof
from export.merge import Merge, merge, plan
from export.streaming import Streamed
from suite.errors import SuiteError
from tests.tiny.export_jobs import run
from tests.tiny.merge_jobs import random_adapter
from tests.tiny.tiny_models import tiny_adapter, tiny_model

Folders = tuple[Path, Path]


def variant(adapter: Path, folder: Path, factor: Callable[[str], float]) -> Path:
    """A copy of the adapter whose B matrices are multiplied by what `factor` says of their names."""
    shutil.copytree(adapter, folder)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({n: t * (factor(n) if "lora_B" in n else 1.0) for n, t in tensors.items()}, file)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A base in bfloat16, and an adapter whose change is many steps of that type."""
    folder = tmp_path_factory.mktemp("proof")
    base = tiny_model(folder / "base", hidden=64, dtype="bfloat16")
    return base, variant(tiny_adapter(base, folder / "adapter"), folder / "strong", lambda _: 2.0)


def prove(base: Path, adapter: Path, out: Path) -> dict[str, Any]:
    edits, _ = plan(base, [adapter])
    return proof.prove(proof.Merged(out, base, edits), adapter, parity.probes(out)[::3], lambda *_: None)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_merge_costs_what_rounding_at_random_costs(
    folders: Folders, tmp_path: Path, streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = folders
    merge(base, [adapter], tmp_path / "out", 10**9)
    if streamed:
        monkeypatch.setattr(parity, "fits", lambda _: False)
    found = prove(base, adapter, tmp_path / "out")
    assert found["rounding"] / 4 < found["kl"] < found["rounding"]
    assert found["effect"] > 20 * found["kl"]


FAULTS: dict[str, Callable[[str], float]] = {
    "no adapter": lambda _: 0.0,
    "a wrong scale": lambda _: 1.1,
    "one layer less": lambda name: 0.0 if ".layers.1." in name else 1.0,
    "one matrix less": lambda name: 0.0 if "layers.0.mlp.up_proj" in name else 1.0,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_merge_fails_the_stage_and_shows_the_worst_probe(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    base, adapter = folders
    wrong = variant(adapter, tmp_path / "wrong", FAULTS[fault])
    monkeypatch.setattr("export.merge.merge", lambda base, _, *rest: merge(base, [wrong], *rest))
    monkeypatch.setattr(parity, "TEXTS", parity.TEXTS[:2])
    with pytest.raises(SuiteError, match=r"the mean KL to the parent is .*; worst on '") as caught:
        run(Merge(adapter="a", base="b"), tmp_path / "out", adapter=adapter, base=base)
    assert "please report this" in caught.value.hint


def test_an_adapter_that_rounding_swallows_is_not_merged_silently(folders: Folders, tmp_path: Path) -> None:
    base, adapter = folders
    weak = variant(adapter, tmp_path / "weak", lambda _: 1e-3)
    merge(base, [weak], tmp_path / "out", 10**9)
    with pytest.raises(SuiteError, match=r"the adapter is lost: .*; worst on '") as caught:
        prove(base, weak, tmp_path / "out")
    assert "serve it unmerged" in caught.value.hint


def test_of_a_faint_adapter_rounding_may_take_a_part(folders: Folders, tmp_path: Path) -> None:
    """As of one that was trained for a few steps, which tests/quickstart/test_crash.py merges."""
    base, adapter = folders
    faint, less = (variant(adapter, tmp_path / str(part), lambda _, part=part: part) for part in (0.1, 0.075))
    merge(base, [less], tmp_path / "out", 10**9)
    found = prove(base, faint, tmp_path / "out")
    assert proof.ROUNDINGS * found["rounding"] < found["kl"] < proof.LOST * found["effect"]


def test_new_tokens_are_proved_without_loading_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_model(tmp_path / "base", hidden=64, dtype="bfloat16")
    adapter = random_adapter(base, tmp_path / "adapter", tokens=530, target_modules=["q_proj"])
    loaded = []
    monkeypatch.setattr(parity, "fits", lambda folder: loaded.append(folder))
    found = run(Merge(adapter="a", base="b"), tmp_path / "out", adapter=adapter, base=base)["parity"]
    assert loaded == [base, tmp_path / "out", tmp_path / "out"]
    assert found["kl"] <= 2 * found["rounding"]
    assert found["vocabulary_parent"] == found["vocabulary_child"] == 530


@pytest.mark.parametrize(
    ("lora", "tied"),
    [({}, True), ({"modules_to_save": ["embed_tokens", "lm_head"]}, False), ({"trainable_token_indices": [513]}, True)],
)
def test_new_tokens_streamed_are_those_in_memory(tmp_path: Path, lora: dict[str, Any], tied: bool) -> None:
    base = tiny_model(tmp_path / "base", hidden=64, tie_word_embeddings=tied)
    adapter = random_adapter(base, tmp_path / "adapter", tokens=530, target_modules=["q_proj"], **lora)
    models = [parity.load(base, adapter, streamed=streamed, tokens=530) for streamed in (False, True)]
    assert isinstance(models[1], Streamed)
    with torch.no_grad():
        one, other = (model(input_ids=torch.tensor([[3, 529, 513, 7]])).logits for model in models)
    assert one.equal(other)
