"""Several adapters in one model, against dense implementations of the papers on whole weights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from export import parity
from export.lora import blocks, combine
from export.lora.fit import Combination
from export.merge import Merge, merge
from suite.errors import SuiteError
from suite.stages import Artifact
from tests.tiny.export_jobs import run
from tests.tiny.merge_jobs import merged_by_peft, random_adapter, weights
from tests.tiny.tiny_models import tiny_model

KINDS: tuple[dict[str, Any], ...] = (
    {"r": 4},
    {"r": 2, "use_rslora": True, "target_modules": ["q_proj", "gate_proj"]},
    {"r": 4, "use_dora": True, "target_modules": ["q_proj", "up_proj"], "modules_to_save": ["lm_head"]},
)
FACTORS = (0.7, 0.4, 1.2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    folder = tmp_path_factory.mktemp("trained")
    base = tiny_model(folder / "base", hidden=64, layers=1, tie_word_embeddings=False)
    adapters = [random_adapter(base, folder / f"a{i}", seed=i, **kind) for i, kind in enumerate(KINDS)]
    return base, adapters


def task_vectors(base: Path, adapters: list[Path], work: Path) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Each weight's name, the base's values (rows, columns) and what each adapter adds to them, in float64."""
    before = weights(base)
    after = [merged_by_peft(base, adapter, work / adapter.name) for adapter in adapters]
    for name, weight in before.items():
        yield name, weight.double(), torch.stack([a[name].double() - weight.double() for a in after])


def close(merged: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    torch.testing.assert_close(merged.double(), expected, rtol=1e-5, atol=2e-6, msg=name)


def test_sum_adds_every_change_by_its_weight(trained: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, adapters = trained
    merge(base, adapters, tmp_path / "out", 10**9, how=Combination(FACTORS))
    merged = weights(tmp_path / "out")
    factors = torch.tensor(FACTORS).double()
    for name, weight, deltas in task_vectors(base, adapters, tmp_path):
        close(merged[name], weight + torch.einsum("a,a...->...", factors, deltas), name)


def test_ties_trims_elects_and_averages_as_in_the_paper(trained: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, adapters = trained
    how = Combination((1.0, 1.0, 1.0), "ties", density=0.3)
    merge(base, adapters, tmp_path / "out", 10**9, how=how)
    merged = weights(tmp_path / "out")
    agreed = 0
    for name, weight, deltas in task_vectors(base, adapters, tmp_path):
        # arXiv:2306.01708, algorithm 1, on the whole weight
        trimmed = torch.stack([trim(d, how.density) for d in deltas])
        sign = torch.sign(trimmed.sum(0))
        kept = (torch.sign(trimmed) == sign) & (trimmed != 0)
        mean = (trimmed * kept).sum(0) / kept.sum(0).clamp(min=1)
        same = torch.isclose(merged[name].double(), weight + mean, rtol=1e-5, atol=2e-6)
        assert same.double().mean() > 0.998, name  # an entry on the threshold may fall to either side in float32
        agreed += int((kept.sum(0) > 1).sum())
    assert agreed > 100


def trim(delta: torch.Tensor, density: float) -> torch.Tensor:
    count = max(1, round(density * delta.numel()))
    least = delta.abs().flatten().kthvalue(delta.numel() - count + 1).values
    return delta * (delta.abs() >= least) if least > 0 else delta


def test_dare_drops_at_random_and_enlarges_the_rest(trained: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, adapters = trained
    how = Combination(FACTORS, "dare", density=0.25, seed=3)
    merge(base, adapters, tmp_path / "out", 10**9, how=how)
    merged = weights(tmp_path / "out")
    for name, weight, deltas in task_vectors(base, adapters, tmp_path):
        expected = weight.clone()
        for i, (factor, delta) in enumerate(zip(FACTORS, deltas, strict=True)):
            if delta.any():
                mask = torch.from_numpy(combine.keep(how, i, name, 0, delta.numel())).view_as(delta)
                assert abs(mask.double().mean() - 0.25) < 0.05
                expected += factor * mask * delta / 0.25
        close(merged[name], expected, name)


def test_blocks_and_threads_do_not_show_in_the_bytes(
    trained: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapters = trained
    for method in ("ties", "dare"):
        how = Combination(FACTORS, method, 0.4, seed=1)  # type: ignore[arg-type]
        files = []
        for size, threads in ((1 << 17, 1), (1 << 10, 3)):
            monkeypatch.setattr(blocks, "TILE_SIZE", size)
            monkeypatch.setattr(blocks, "BLOCK_SIZE", 4 * size)
            monkeypatch.setattr(torch, "get_num_threads", lambda count=threads: count)
            out = tmp_path / f"{method}-{size}"
            merge(base, adapters, out, 10**9, how=how)
            files.append((out / "model.safetensors").read_bytes())
        assert files[0] == files[1]


@given(st.lists(st.lists(st.floats(0, 2.0**100, width=32), max_size=30), min_size=1, max_size=5), st.floats(0.01, 1))
@settings(max_examples=100, deadline=None)
def test_the_threshold_is_the_smallest_of_the_largest(blocks: list[list[float]], density: float) -> None:
    arrays = [np.array(block, np.float32) for block in blocks]
    ordered = np.sort(np.concatenate(arrays))[::-1]
    if len(ordered):
        expected = ordered[max(1, round(density * len(ordered))) - 1]
        assert combine.threshold(lambda: iter(arrays), density) == expected


@given(st.integers(0, 500), st.integers(0, 300), st.integers(0, 5))
def test_what_dare_keeps_depends_on_the_place_alone(first: int, count: int, seed: int) -> None:
    how = Combination((1.0,), "dare", density=0.5, seed=seed)
    whole = combine.keep(how, 0, "w", 0, 800)
    assert (combine.keep(how, 0, "w", first, count) == whole[first : first + count]).all()
    assert (combine.keep(how, 1, "w", 0, 800) != whole).any()
    assert (combine.keep(how, 0, "v", 0, 800) != whole).any()


def test_a_sum_of_adapters_is_compared_with_all_of_them_on_the_base(
    trained: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, adapters = trained
    stage = Merge(adapter=["a", "b"], base="m", weights=[0.7, -0.3])
    metrics = run(stage, tmp_path / "out", adapter=[Artifact(a, "adapter") for a in adapters[:2]], base=base)
    assert metrics["changed"] == 7
    assert metrics["parity"]["max_dlogit"] < 1e-3
    assert metrics["parity"]["kl"] < 1e-9


@pytest.mark.parametrize(("how", "which"), [({"combine": "ties"}, [0, 1]), ({"weights": [0.5, 0.5]}, [0, 2])])
def test_what_no_library_computes_is_measured_against_its_parts(
    trained: tuple[Path, list[Path]], tmp_path: Path, how: dict[str, Any], which: list[int]
) -> None:
    """A sum with DoRA and whole modules is one of them."""
    base, adapters = trained
    events: list[dict[str, Any]] = []
    stage = Merge(adapter=["a", "b"], base="m", **how)
    inputs = [Artifact(adapters[i], "adapter") for i in which]
    found = run(stage, tmp_path / "out", events, adapter=inputs, base=base)["parity"]
    assert found["prompts"] == 1
    assert [other["name"] for other in found["against"]] == ["base", *(f"a{i}" for i in which)]
    for other, adapter in zip(found["against"], [None, *(adapters[i] for i in which)], strict=True):
        by_hand = parity.measure(
            lambda: parity.load(tmp_path / "out"),
            lambda adapter=adapter: parity.load(base, adapter),
            parity.probes(tmp_path / "out"),
        )
        assert other == {"name": other["name"], **by_hand}
        assert other["kl"] > 1e-4
    warned = next(e["text"] for e in events if e["event"] == "warn")
    assert re.fullmatch(
        r"there is no model that this merge should equal; KL .*: \S+ to 'base', \S+ to 'a0', .*", warned
    )


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"weights": [1.0]}, "1 for 2 adapters"),
        ({"weights": [1.0, -1.0], "combine": "ties"}, "each must be above 0"),
    ],
)
def test_weights_that_fit_nothing(trained: tuple[Path, list[Path]], wrong: dict[str, Any], said: str) -> None:
    base, adapters = trained
    inputs = {"adapter": [Artifact(a, "adapter") for a in adapters[:2]], "base": [Artifact(base, "model")]}
    with pytest.raises(SuiteError, match=said) as caught:
        Merge(adapter=["a", "b"], base="m", **wrong).check(inputs)  # type: ignore[arg-type]
    assert caught.value.where == "weights"


def test_adapters_of_different_bases_are_not_combined(tmp_path: Path) -> None:
    found: list[Artifact | None] = []
    for i in range(2):
        folder, base = tmp_path / f"a{i}", tmp_path / f"b{i}"
        folder.mkdir()
        base.mkdir()
        made_from = {"path": str(base), "type": "model", "digest": f"d{i}"}
        (folder / "artifact.json").write_text(f'{{"inputs": {{"base": [{made_from}]}}}}'.replace("'", '"'))
        found.append(Artifact(folder, "adapter"))
    with pytest.raises(SuiteError, match="'a0' was trained on 'b0', 'a1' on 'b1'"):
        Merge(adapter=["a", "b"]).check({"adapter": found})
