"""The comparison of child with parent: exact for equals, and it sees what differs."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from export import parity
from export.parity import Probe
from suite.errors import SuiteError
from tests.tiny.tiny_models import tiny_model

VOCAB = 11


class Table(torch.nn.Module):
    """A bigram model: the logits after a token are a row of a table, so every metric can be worked out by hand."""

    device = "cpu"

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.table[input_ids], past_key_values=None)


def table(seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed))


def measure(parent: torch.Tensor, child: torch.Tensor, *probes: Probe) -> dict[str, Any]:
    return parity.measure(lambda: Table(parent), lambda: Table(child), probes)


def test_equal_models_are_equal() -> None:
    found = measure(table(0), table(0), Probe("text", [1, 2, 3, 4]), Probe("question", [5, 6], asks=True))
    assert found["max_dlogit"] == found["mean_dlogit"] == found["kl"] == 0
    assert found["top1"] == found["greedy"] == 1
    assert found["ppl_parent"] == found["ppl_child"]
    assert found["positions"] == 4 + 2 + parity.ANSWER


def test_the_numbers_are_those_of_their_definitions() -> None:
    parent, child, ids = table(0), table(1), [1, 2, 3, 7]
    found = measure(parent, child, Probe("text", ids))
    p, q = parent[ids].double().softmax(-1), child[ids].double().softmax(-1)
    assert found["max_dlogit"] == pytest.approx((parent[ids] - child[ids]).abs().max().item())
    assert found["kl"] == pytest.approx((p * (p / q).log()).sum(-1).mean().item())
    assert found["top1"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    nll = -sum(math.log(q[i, ids[i + 1]]) for i in range(3)) / 3
    assert found["ppl_child"] == pytest.approx(math.exp(nll))


def test_greedy_counts_up_to_where_the_answers_part() -> None:
    chain = 10 * torch.eye(VOCAB).roll(1, 1)  # after token i comes i + 1
    broken = chain.clone()
    broken[5] = 10 * torch.eye(VOCAB)[0]
    found = measure(chain, broken, Probe("question", [0, 1], asks=True))
    # 2 3 4 5 agree, then the child says 0 for 6; that it would agree again later does not count
    assert found["greedy"] == pytest.approx(4 / parity.ANSWER)


def test_an_answer_ends_at_a_stop_token() -> None:
    chain = 10 * torch.eye(VOCAB).roll(1, 1)
    found = measure(chain, chain, Probe("question", [0, 1], asks=True, stops=frozenset({4})))
    assert found["positions"] == 2 + 3


def test_the_worst_probe_is_named() -> None:
    changed = table(0)
    changed[9] = -changed[9]
    found = measure(table(0), changed, Probe("fine", [1, 2]), Probe("off", [9, 9]), Probe("fine too", [3, 4]))
    assert found["worst_probe"] == "off"
    assert found["worst_kl"] > 0


def test_models_of_different_vocabulary_are_an_error() -> None:
    with pytest.raises(SuiteError, match="11 and 12 tokens"):
        parity.measure(lambda: Table(table(0)), lambda: Table(torch.zeros(VOCAB, 12)), [Probe("text", [1, 2])])


def test_parent_and_child_are_never_in_memory_together() -> None:
    alive: list[str] = []

    class Counted(Table):
        def __init__(self, name: str) -> None:
            super().__init__(table(0))
            assert not alive
            alive.append(name)

        def __del__(self) -> None:
            alive.clear()

    parity.measure(lambda: Counted("parent"), lambda: Counted("child"), [Probe("text", [1, 2])])


def test_probes_of_a_real_model(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", hidden=64)
    rows = [[{"role": "user", "content": "mine"}, {"role": "assistant", "content": "yes"}]]
    found = parity.probes(folder, rows)
    assert sum(p.asks for p in found) == len(parity.dialogues())
    assert found[-1].name == "mine"
    assert all(1 < len(p.ids) <= parity.LONGEST for p in found)
    model = parity.load(folder)
    assert model.dtype == torch.float32
    measured = parity.measure(lambda: model, lambda: model, found)
    # the answer is found with a cache and checked without: the same tokens
    assert measured["greedy"] == 1
    assert measured["max_dlogit"] == 0


def test_a_model_without_template_or_system_role_still_has_probes(tmp_path: Path) -> None:
    plain = parity.probes(tiny_model(tmp_path / "plain", hidden=64, template=None))
    assert plain
    assert not any(p.asks for p in plain)
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.role + ':' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    strict = parity.probes(tiny_model(tmp_path / "strict", hidden=64, template=template))
    assert sum(p.asks for p in strict) == len(parity.dialogues())


def test_the_widest_dtype_that_fits(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", hidden=64, dtype="bfloat16")
    weights = (folder / "model.safetensors").stat().st_size
    assert parity.precision(folder) == torch.float32
    assert parity.precision(folder, free=10 * weights) == torch.float32
    assert parity.precision(folder, free=2 * weights) == torch.bfloat16
    assert parity.precision(folder, free=weights) is None
