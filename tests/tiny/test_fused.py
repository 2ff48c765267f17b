"""Remade layers compute what the model's own did, share no memory with them, and take the place of no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from serve.torch import fused
from serve.torch.attention import register
from serve.torch.cache import SlotCache
from serve.torch.fused import fuse
from serve.torch.layers import FusedNorm
from serve.torch.stack import Stack
from tests.tiny.tiny_models import tiny_model

QKV = ["k_proj", "q_proj", "v_proj"]
GATE_UP = ["gate_proj", "up_proj"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("fused"), architecture="llama")


def load(folder: Path, **options: Any) -> Any:
    options = {"dtype": torch.float32, **options}
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=register(), **options).eval()


def read(model: Any, starts: tuple[int, ...] = (0, 7, 3)) -> torch.Tensor:
    """Logits of random tokens of rows that begin at different places."""
    generator = torch.Generator().manual_seed(0)
    cache = SlotCache(0, 1)
    cache.fit(len(starts), 32)
    logits = []
    for width in (9, 1, 1):
        cache.begin(0, starts, width, model.device)
        ids = torch.randint(3, 500, (len(starts), width), generator=generator)
        with torch.no_grad():
            out = model(input_ids=ids, position_ids=cache.positions, past_key_values=cache, use_cache=True)
        logits.append(out.logits)
        starts = tuple(start + width for start in starts)
    return torch.cat(logits, 1)


def names(parts: dict[str, Any], layer: int) -> list[str]:
    return sorted(path.rpartition(".")[2] for path in parts if f".{layer}." in path)


@pytest.mark.parametrize(
    ("architecture", "config", "fused"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}, GATE_UP + QKV),
        ("mistral", {"sliding_window": 4}, GATE_UP + QKV),
        ("mistral", {"sliding_window": None}, GATE_UP + QKV),
        ("qwen2", {}, GATE_UP + QKV),
        ("qwen3", {}, GATE_UP + QKV),
        ("gemma", {}, GATE_UP + QKV),
        ("gemma2", {"sliding_window": 4}, GATE_UP + QKV),
        ("gemma3_text", {"sliding_window": 4}, GATE_UP + QKV),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}, QKV),
        ("olmo", {}, GATE_UP + QKV),
        ("olmo", {"clip_qkv": 5.0}, GATE_UP),
        ("stablelm", {}, GATE_UP),  # turns only a quarter of each head
        ("ernie4_5", {}, GATE_UP),  # turns neighbours, not halves
        ("olmo2", {}, GATE_UP),  # norms of all heads together
        ("phi3", {}, []),
        ("gpt2", {}, []),
    ],
)
def test_logits_are_the_same(tmp_path: Path, architecture: str, config: dict[str, Any], fused: list[str]) -> None:
    model = load(tiny_model(tmp_path / "model", architecture=architecture, **config))
    wanted, weights = read(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parts = fuse(model)
    assert names(parts, 0) == names(parts, 1) == sorted(fused)
    torch.testing.assert_close(read(model), wanted, atol=2e-4, rtol=1e-4)
    plain = architecture in ("llama", "qwen2", "qwen3") or config.get("sliding_window", 0) is None
    assert isinstance(vars(model).get("forward"), Stack) == plain, "the others have windows, scales or more norms"
    for path, (wide, first, last) in parts.items():
        assert torch.equal(model.get_submodule(wide).weight[first:last], weights[f"{path}.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_types_round_no_worse(llama: Path, dtype: torch.dtype) -> None:
    exact, model = read(load(llama)), load(llama, dtype=dtype)
    before = (read(model) - exact).abs().mean()
    assert len(fuse(model)) == 10
    assert (read(model) - exact).abs().mean() < 1.1 * before


def test_weights_are_moved_and_not_doubled(llama: Path) -> None:
    def size(model: Any) -> int:
        return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}.values())

    model = load(llama)
    before = size(model)
    fuse(model)
    assert size(model) <= before
    assert model.lm_head.weight is model.model.embed_tokens.weight


class OtherMlp(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


def test_what_computes_something_else_stays(llama: Path) -> None:
    model = load(llama)
    model.model.layers[1].mlp.__class__ = OtherMlp
    wanted = read(model)
    parts = fuse(model)
    assert (names(parts, 0), names(parts, 1)) == (sorted(GATE_UP + QKV), QKV)
    torch.testing.assert_close(read(model), wanted, atol=2e-4, rtol=1e-4)


def test_what_accelerate_moves_between_devices_stays(llama: Path) -> None:
    model = load(llama)
    for layer in (model.model.layers[0].self_attn.q_proj, model.model.layers[1].mlp, model.model.norm, model):
        add_hook_to_module(layer, AlignDevicesHook("cpu", io_same_device=True))
    wanted = read(model)
    parts = fuse(model)
    assert (names(parts, 0), names(parts, 1)) == (GATE_UP, QKV)
    assert isinstance(model.model.norm, LlamaRMSNorm)
    torch.testing.assert_close(read(model), wanted, atol=2e-4, rtol=1e-4)


def test_quantized_layers_stay(llama: Path) -> None:
    quantized = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["q_proj", "lm_head"])
    model = load(llama, quantization_config=quantized)
    wanted = read(model)
    assert fuse(model) == {}
    torch.testing.assert_close(read(model), wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0.0, 1e-4, 1.0, 1e3])
def test_norms_of_any_size(dtype: torch.dtype, size: float) -> None:
    theirs = LlamaRMSNorm(96, eps=1e-5).to(dtype)
    nn.init.normal_(theirs.weight)
    x = (torch.randn(3, 5, 96) * size).to(dtype)
    made = FusedNorm(theirs.weight, theirs.variance_epsilon)
    torch.testing.assert_close(made(x), theirs(x), atol=1e-5, rtol=3 * torch.finfo(dtype).eps)


def test_layers_whose_weights_are_packed_stay() -> None:
    packed, scaled = nn.Linear(4, 4), nn.Linear(4, 4)
    del packed.weight
    packed.register_parameter("weight_packed", nn.Parameter(torch.zeros(4, 1, dtype=torch.int32), requires_grad=False))
    scaled.register_parameter("weight_scale", nn.Parameter(torch.ones(4, 1)))
    assert [fused._is_plain(layer) for layer in (nn.Linear(4, 4), packed, scaled)] == [True, False, False]
