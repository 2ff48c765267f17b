"""What is compiled against torch: any sizes, any width of vectors, one thread or several."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers import AutoModelForCausalLM

from serve.folders import read_model
from serve.torch.cache import SlotCache
from serve.torch.fused import Part
from serve.torch.loading import load_model
from serve.torch.low_rank import Weights
from serve.torch.native import attention, function, lora, pointwise
from serve.torch.native.adapters import Places
from serve.torch.native.attention import Heads
from serve.torch.native.code import Code
from serve.torch.native.function import Function, lanes
from tests.tiny.tiny_models import tiny_model

TOGETHER = [False, True]
CACHED = attention.attention, pointwise.norm, pointwise.swiglu


@pytest.fixture(params=[4, 8, 16])
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The widest vectors that a processor has."""
    monkeypatch.setattr(function, "widest", lambda: request.param)
    for compiled in CACHED:
        compiled.cache_clear()
    yield request.param
    for compiled in CACHED:
        compiled.cache_clear()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def near(given: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(given, wanted, rtol=2e-5, atol=2e-5)


def test_vectors_are_as_wide_as_all_sizes_allow(width: int) -> None:
    assert lanes(64, 32) == width
    assert (lanes(48, 20), lanes(6), lanes(7, 64)) == (4, 2, 1)


def test_exp_is_right_to_the_last_places() -> None:
    def write(code: Code) -> None:
        x = code.floats("x")
        with code.loop(code.field("count"), step=code.lanes) as place:
            x[place] = code.exp(x[place])

    x = torch.cat((torch.linspace(-86.9, 87.9, 4000), torch.linspace(-1, 1, 4000)))
    wanted = x.double().exp()
    Function("exps", 16, ("x", "count"), write).with_(x=x.data_ptr(), count=len(x))(False)
    assert ((x - wanted) / wanted).abs().max() < 2 * torch.finfo(torch.float32).eps
    far = torch.tensor([-1e30, -200.0, 200.0, 1e30] * 4)
    Function("exps", 16, ("x", "count"), write).with_(x=far.data_ptr(), count=len(far))(False)
    assert far[:2].max() < 2e-38
    assert far.isfinite().all()
    assert far[2:4].min() > 1e38


@pytest.mark.parametrize("together", TOGETHER)
@pytest.mark.parametrize("size", [256, 24, 6])
def test_norm_adds_what_changed(width: int, size: int, together: bool) -> None:
    x, change, weight = torch.randn(5, size), torch.randn(5, size), torch.randn(size)
    gain, result = weight * size**0.5, torch.empty(5, size)
    addresses = {"x": x.data_ptr(), "gain": gain.data_ptr(), "result": result.data_ptr(), "rows": 5}
    wanted = x + change
    pointwise.norm(size, size * 1e-6, True).with_(change=change.data_ptr(), **addresses)(together)
    near(x, wanted)
    near(result, functional.rms_norm(wanted, (size,), weight, 1e-6))
    pointwise.norm(size, size * 1e-2, False).with_(**addresses)(together)
    near(x, wanted)
    near(result, functional.rms_norm(wanted, (size,), weight, 1e-2))


@pytest.mark.parametrize("together", TOGETHER)
@pytest.mark.parametrize("size", [64, 20, 3])
def test_swiglu(width: int, size: int, together: bool) -> None:
    x, result = 20 * torch.randn(7, 2 * size), torch.empty(7, size)
    x[0, 0], x[1, 0] = -1e4, 1e4
    pointwise.swiglu(size).with_(x=x.data_ptr(), result=result.data_ptr(), rows=7)(together)
    near(result, functional.silu(x[:, :size]) * x[:, size:])


def attend(x: torch.Tensor, heads: Heads, gain: torch.Tensor, tables: Any, starts: torch.Tensor, kept: Any) -> Any:
    """The same in torch, row by row."""
    found = []
    for row, start in enumerate(starts.tolist()):
        split = x[row].split((heads.queries, heads.keys, heads.keys))
        turned = torch.cat(split[:2])
        if heads.floor is not None:
            turned = turned / (turned.pow(2).sum(-1, keepdim=True) + heads.floor).sqrt() * gain
        a, b = turned.chunk(2, -1)
        cos, sin = (table[start] for table in tables)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        keys, values = (tensor[row, :, : start + 1] for tensor in kept)
        keys[:, start], values[:, start] = turned[heads.queries :], split[2]
        query = turned[: heads.queries, None]
        found.append(
            functional.scaled_dot_product_attention(query, keys, values, scale=heads.scale, enable_gqa=True)[:, 0]
        )
    return torch.stack(found)


@pytest.mark.parametrize("together", TOGETHER)
@pytest.mark.parametrize(
    "heads",
    [Heads(4, 2, 64, 0.125, 64e-6), Heads(4, 4, 16, 0.3, None), Heads(6, 2, 8, 0.3, None), Heads(2, 1, 6, 1.0, 6e-2)],
)
def test_attention_of_rows_of_any_lengths(width: int, heads: Heads, together: bool) -> None:
    length, size = 128, heads.size
    starts = torch.tensor([0, 1, width - 1, width, 63, 64, length - 1])
    rows = len(starts)
    x = torch.randn(rows, heads.queries + 2 * heads.keys, size)
    gain, angles = torch.randn(heads.queries + heads.keys, size), torch.randn(length, size // 2)
    tables = angles.cos(), angles.sin()
    # what is behind the end of a row is any finite number
    kept = torch.randn(rows + 2, heads.keys, length, size), 1e30 * torch.randn(rows + 2, heads.keys, length, size)
    for row, start in enumerate(starts.tolist()):
        kept[1][row + 2, :, :start] = torch.randn(heads.keys, start, size)
    mine, wanted_kept = [[tensor[2:] for tensor in kept], [tensor[2:].clone() for tensor in kept]]
    result = torch.empty(rows, heads.queries, size)
    wanted = attend(x, heads, gain, tables, starts, wanted_kept)
    row, head, *_ = kept[0].stride()
    attention.attention(heads).with_(
        x=x.data_ptr(), cos=tables[0].data_ptr(), sin=tables[1].data_ptr(), gain=gain.data_ptr(),
        starts=starts.data_ptr(), keys=mine[0].data_ptr(), values=mine[1].data_ptr(), row=row, head=head,
        result=result.data_ptr(), rows=rows,
    )(together)  # fmt: skip
    near(result, wanted)
    for tensor, expected in zip(mine, wanted_kept, strict=True):
        near(tensor, expected)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(-1, 3), min_size=1, max_size=9),
    st.integers(1, 6),
    st.sampled_from([16, 24, 5]),
    st.lists(st.sampled_from([16, 8, 3]), min_size=1, max_size=3),
    st.lists(st.integers(0, 9), min_size=12, max_size=12),
    st.booleans(),
    st.booleans(),
)
def test_each_token_has_its_own_adapter(
    rows: list[int], wide: int, inputs: int, widths: list[int], ranks: list[int], scaled: bool, together: bool
) -> None:
    """Adapter -1 is the base; rank 0 is a part that an adapter does not change."""
    torch.manual_seed(len(rows))
    ends = [0, *accumulate(widths)]
    x, result = torch.randn(len(rows) * wide, inputs), torch.randn(len(rows) * wide, ends[-1])
    wanted, parts, keep = result.clone(), [], []
    members = [[row for row, adapter in enumerate(rows) if adapter == number] for number in range(4)]
    tokens = [[row * wide + i for row in own for i in range(wide)] for own in members]
    for number in range(4):
        for part, size in enumerate(widths):
            rank = ranks[number * 3 + part]
            a, b, gain, shift = (torch.randn(shape) for shape in ((rank, inputs), (rank, size), (size,), (size,)))
            own = wanted[tokens[number], ends[part] : ends[part + 1]]
            if scaled := scaled and rank > 0:
                own = own * gain + shift
            wanted[tokens[number], ends[part] : ends[part + 1]] = own + x[tokens[number]] @ a.T @ b
            addresses = [tensor.data_ptr() for tensor in (gain, shift)] if scaled else [0, 0]
            parts.append([a.data_ptr(), b.data_ptr(), rank, ends[part], size, *addresses])
            keep.append((a, b, gain, shift))
    table, order = torch.tensor(parts), torch.tensor([token for own in tokens for token in own], dtype=torch.long)
    bounds = torch.tensor([0, *accumulate(map(len, tokens))])
    lora.lora(lanes(inputs, *ends)).with_(
        x=x.data_ptr(), inputs=inputs, result=result.data_ptr(), outputs=ends[-1], parts=table.data_ptr(),
        of_adapter=len(lora.PART) * len(widths), count=len(widths), order=order.data_ptr(), bounds=bounds.data_ptr(),
        adapters=4, tokens=len(order),
    )(together)  # fmt: skip
    near(result, wanted)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_step_is_what_reading_gives(tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_model(tmp_path, architecture=architecture)
    model = load_model(read_model(base), "float32").requires_grad_(False)
    assert model.forward.decoder is not None
    assert AutoModelForCausalLM.from_pretrained(base).dtype == torch.float32
    found = {}
    for way in ("compiled", "torch"):
        cache, ends = SlotCache(0, 1), [3, 70, 20]
        found[way] = []
        with torch.inference_mode():
            for first, starts in ((0, ends), (1, [71, 21]), (0, [4, 72, 22]), (2, [23])):
                wide = first == 0 and starts == ends
                cache.fit(3, 128)
                # the first pass is a prompt of rows as long as the longest, whose ends are rubbish then
                cache.begin(first, [0] * 3 if wide else starts, max(ends) if wide else 1, model.device)
                ids = torch.arange(cache.positions.numel()).view(cache.positions.shape) * 7 % 500 + 3
                with monkeypatch.context() as patch:
                    if way == "torch":
                        patch.setattr(model.forward, "decoder", None)
                    output = model(input_ids=ids, position_ids=cache.positions, past_key_values=cache)
                found[way].append(output.logits.clone())
    for logits, wanted in zip(found["compiled"], found["torch"], strict=True):
        near(logits, wanted)


def test_tokens_that_are_no_whole_rows_are_refused() -> None:
    weights = Weights({"layer": (torch.ones(1, 4), torch.ones(1, 2))})
    places = Places()
    layer = places.layer({"layer": Part("layer", 0, 2)}, weights.layers["layer"][0])
    layer.follow(places.plan(["a", ""], {"a": weights}, 1))
    output = torch.zeros(2, 2)
    layer.add(torch.ones(2, 4), output)
    assert output.tolist() == [[4, 4], [0, 0]]
    with pytest.raises(ValueError, match="3 inputs of a layer are not the tokens of 2 rows"):
        layer.add(torch.ones(3, 4), torch.zeros(3, 2))
