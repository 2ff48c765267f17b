"""The comparison of child with parent: exact for equals, and it sees what differs."""

from __future__ import annotations

import errno
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from export import parity, sums
from export.answering import Answering
from export.limits import Limits
from export.sums import TIE, Probe
from suite.errors import SuiteError
from tests.tiny.tiny_models import CHAT_TEMPLATE, tiny_model

VOCAB = 11
EXACT = Limits(kl=0, max_dlogit=0, top1=1)


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
    assert found["positions"] == 4 + 2 + Answering.tokens


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
    assert found["greedy"] == pytest.approx(4 / Answering.tokens)


@pytest.mark.parametrize(("better", "equal"), [(TIE / 2, 1.0), (2 * TIE, 0.0)])
def test_answers_that_part_where_two_tokens_are_as_good_are_equal(better: float, equal: float) -> None:
    chain = 10 * torch.eye(VOCAB).roll(1, 1)
    chain[5, 0] = 10 - better  # the parent says 6 after 5, and has 0 for nearly as good
    other = chain.clone()
    other[5, 0] = 10 + better
    found = measure(chain, other, Probe("same", [7, 8], asks=True, stops=frozenset({0})), Probe("q", [1, 2], asks=True))
    assert found["greedy"] < 1
    assert found["greedy_equal"] == (1 + equal) / 2
    assert found.get("other_answer") == (None if equal else "q")
    parity.require(found, Limits(greedy=0.5))
    if not equal:
        with pytest.raises(SuiteError, match=r"50% of the greedy answers are the parent's, below 100%; .* 'q'; worst"):
            parity.require(found, Limits(greedy=1))


def test_answers_grow_together_as_each_would_alone(tmp_path: Path) -> None:
    model = parity.load(tiny_model(tmp_path / "m", architecture="gemma2", hidden=64, sliding_window=8))
    prompts = [[5, 6, 7], list(range(3, 40)), [9]]
    asked = Answering(model)
    together = asked.answers(prompts, [()] * 3, lambda _: None)
    with torch.no_grad():
        for prompt, answer in zip(prompts, together, strict=True):
            assert asked.answers([prompt], [()], lambda _: None) == [answer]
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0]
            assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer
    ends = [{answer[2]} for answer in together]
    for answer, short in zip(together, asked.answers(prompts, ends, lambda _: None), strict=True):
        assert short == answer[: answer.index(answer[2]) + 1]


def test_an_answer_ends_at_a_stop_token() -> None:
    chain = 10 * torch.eye(VOCAB).roll(1, 1)
    found = measure(chain, chain, Probe("question", [0, 1], asks=True, stops=frozenset({4})))
    assert found["positions"] == 2 + 3


def test_a_token_that_is_as_good_is_counted_apart() -> None:
    close = 10 * torch.eye(VOCAB).roll(1, 1)
    other = close.clone()
    close[2, 5] = 10 - TIE / 2  # the parent prefers 3 to 5 by next to nothing, the child 5
    other[2, 5] = 10 + TIE / 2
    found = measure(close, other, Probe("text", [1, 2, 3, 4]))
    assert (found["top1"], found["ties"]) == (0.75, 0.25)
    parity.require(found, Limits(top1=1))


def test_the_worst_probe_is_named() -> None:
    changed = table(0)
    changed[9] = -changed[9]
    found = measure(table(0), changed, Probe("fine", [1, 2]), Probe("off", [9, 9]), Probe("fine too", [3, 4]))
    assert found["worst_probe"] == "off"
    assert found["worst_kl"] > 0


def test_the_common_part_of_two_vocabularies_is_compared() -> None:
    padded = torch.cat([table(0), torch.full((VOCAB, 3), 50.0)], 1)
    found = parity.measure(lambda: Table(table(0)), lambda: Table(padded), [Probe("text", [1, 2])])
    assert (found["vocabulary_parent"], found["vocabulary_child"]) == (VOCAB, VOCAB + 3)
    assert found["kl"] == 0


def test_a_token_that_one_of_them_lacks_is_an_error() -> None:
    short = table(0)[:, :4]
    with pytest.raises(SuiteError, match=r"11 and 4 tokens in the vocabulary, and 'text' has token 7"):
        parity.measure(lambda: Table(table(0)), lambda: Table(short), [Probe("text", [1, 7])])


def test_logits_are_compared_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    probes = [Probe("text", list(range(VOCAB))), Probe("question", [5, 6], asks=True)]
    whole = measure(table(0), table(1), *probes)
    monkeypatch.setattr(sums, "AT_ONCE", 3 * VOCAB)
    assert measure(table(0), table(1), *probes) == pytest.approx(whole)


def test_equal_infinities_are_equal() -> None:
    masked = table(0)
    masked[:, 3] = -math.inf
    found = measure(masked, masked, Probe("text", [1, 2]))
    assert found["kl"] == found["max_dlogit"] == 0


@pytest.mark.parametrize("greedy", [False, True])
def test_an_object_that_gives_logits_is_asked_as_a_model(greedy: bool) -> None:
    class Gives:
        def logits(self, ids: list[int]) -> Any:
            return table(0)[ids].numpy()

    class GivesGreedy(Gives):
        def greedy(self, ids: list[int], n: int, stops: frozenset[int]) -> list[int]:
            return [1, 2, 3]

    given = GivesGreedy() if greedy else Gives()
    question = Probe("question", [5, 6], asks=True)
    as_child = parity.measure(lambda: Table(table(0)), lambda: given, [question])
    assert as_child["greedy"] == 1
    assert as_child["max_dlogit"] == 0
    as_parent = parity.measure(lambda: given, lambda: Table(table(0)), [question])
    assert as_parent["positions"] == 2 + (3 if greedy else 16)
    assert as_parent["kl"] == 0


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("numpy.save", full)
    with pytest.raises(SuiteError, match="No space left on device") as caught:
        measure(table(0), table(0), Probe("text", [1, 2]))
    assert "TMPDIR" in caught.value.hint


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


def test_what_fits_into_memory_is_not_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_model(tmp_path / "m", hidden=64, dtype="bfloat16")
    weights = 2 * (folder / "model.safetensors").stat().st_size
    assert parity.fits(folder)
    assert parity.fits(folder, free=2 * weights)
    assert not parity.fits(folder, free=weights)
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(parity, "CONTAINER", (limit,))
    for said, enough in (("max", True), (str(1 << 60), True), (str(weights), False)):
        limit.write_text(f"{said}\n")
        assert parity.fits(folder) == enough


def test_a_changed_template_or_tokenizer_is_named(tmp_path: Path) -> None:
    parent = tiny_model(tmp_path / "parent", hidden=64)
    trims = tiny_model(
        tmp_path / "trims", hidden=64, template=CHAT_TEMPLATE.replace("+ message.content", "+ message.content | trim")
    )
    other = tiny_model(tmp_path / "other", hidden=64, vocab=300)
    # which dialogue comes first depends on the merges that the tokenizer learnt, and those on ties
    for child, probe in ((trims, r"\\tAgain|\[INST\]"), (other, "The old lighthouse")):
        found = parity.probes(child, parent=parent)
        measured = parity.measure(
            lambda: Table(table(0)), lambda: Table(table(0)), [replace(p, ids=[1, 2]) for p in found]
        )
        assert measured["prompts"] < 1
        with pytest.raises(SuiteError, match=f"other tokens than its parent: '{probe}"):
            parity.require(measured, Limits())
    assert all(probe.same for probe in parity.probes(parent, parent=parent))


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (
            Limits(kl=1e-3, cure="round less"),
            "the mean KL to the parent is .* nats a token, above 0.001; worst on 'off'",
        ),
        (Limits(max_dlogit=0.5), "a logit differs from the parent's by .*, above 0.5; worst on 'off'"),
        (Limits(top1=0.9), "prefer the same token at 80.00% of positions, below 90.00%; worst on 'off'"),
    ],
)
def test_what_is_beyond_a_limit_is_named(limits: Limits, said: str) -> None:
    changed = table(0)
    changed[9] = -changed[9]
    found = measure(table(0), changed, Probe("fine", [1, 2, 3, 4]), Probe("off", [5, 6, 7, 8, 9, 9]))
    parity.require(found, Limits(kl=10, max_dlogit=10, top1=0.5))
    with pytest.raises(SuiteError, match=said) as caught:
        parity.require(found, limits, where="out")
    assert caught.value.where == "out"
    assert caught.value.hint == limits.cure


def test_what_is_no_number_is_beyond_any_limit() -> None:
    broken = table(0)
    broken[9, 3] = math.nan
    found = measure(table(0), broken, Probe("fine", [1, 2]), Probe("broken", [9, 9]))
    with pytest.raises(SuiteError, match="no number; worst on 'broken'"):
        parity.require(found, Limits())


def test_a_copy_is_exact_or_no_copy() -> None:
    parity.require(measure(table(0), table(0), Probe("text", [1, 2])), EXACT)
    with pytest.raises(SuiteError, match="above 0"):
        parity.require(measure(table(0), table(0) * (1 + 1e-6), Probe("text", [1, 2])), EXACT)
