"""Every kind of decoder is served as `generate` answers, alone and in a batch, or refused with the reason."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from serve.folders import read_model
from serve.generation import Request
from serve.torch import loading
from serve.torch.adapters import Adapters
from serve.torch.cache import SlotCache
from serve.torch.engine import Engine
from serve.torch.forward import Forward
from serve.torch.scheduler import Copy, Move
from suite.errors import SuiteError
from tests.tiny.tiny_models import greedy, tiny_model

NEW = 12
generate = partial(greedy, new=NEW)
DEEPSEEK = {
    "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 24,
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "moe_intermediate_size": 64,
}  # fmt: skip
SERVED: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 16},
    "bloom": {},
    "falcon": {},
    "gptj": {"rotary_dim": 16},
    "gpt_neo": {"attention_types": [[["global"], 2]]},
    "gpt_neox": {},
    "gpt_neox_japanese": {},
    "opt": {"ffn_dim": 256, "word_embed_proj_dim": 128},
    "mpt": {"max_seq_len": 2048},
    "xglm": {"ffn_dim": 256},
    "cohere2": {"sliding_window": 16},
    "deepseek_v3": DEEPSEEK,
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gpt_neo": ({"attention_types": [[["global", "local"], 1]]}, "layers of type local"),
    "rwkv": ({}, "RwkvForCausalLM keeps a state in a way of its own"),
    "recurrent_gemma": ({"lru_width": 128, "block_types": ["recurrent", "attention"]}, "in a way of its own"),
    "openai-gpt": ({}, "takes no cache"),
    "bert": ({}, "BertLMHeadModel cannot be served in batches"),
    "falcon": ({"alibi": True}, "cannot be served in batches"),
}


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(count)
    return [[rng.randrange(3, 512) for _ in range(rng.randrange(1, 60))] for _ in range(count)]


@pytest.mark.parametrize("architecture", SERVED)
def test_served_as_generate_answers(tmp_path: Path, architecture: str) -> None:
    folder = tiny_model(tmp_path, architecture=architecture, **SERVED[architecture])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    engine = Engine(folder, max_batch=4)
    engine.scheduler.chunk = 32
    asked = prompts(5)
    try:
        together = [generation.new for generation in engine.generate([Request(p, "", NEW) for p in asked])]
        alone = [engine.generate([Request(p, "", NEW)])[0].new for p in asked[:2]]
    finally:
        engine.close()
    assert together == [generate(model, prompt) for prompt in asked]
    assert alone == together[:2]


@pytest.mark.parametrize("architecture", REFUSED)
def test_refused_with_the_reason(tmp_path: Path, architecture: str) -> None:
    config, reason = REFUSED[architecture]
    folder = tiny_model(tmp_path, architecture=architecture, **config)
    with pytest.raises(SuiteError, match=reason):
        Engine(folder)


def test_one_whose_batches_answer_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = read_model(tiny_model(tmp_path, architecture="codegen", rotary_dim=16))
    assert loading.load_model(folder, "float32").found.token_bytes == 2 * 2 * 128 * 4
    monkeypatch.setattr(loading, "OWN", loading.NAME)  # leaves out masks that its attention needs
    with pytest.raises(SuiteError, match=r"logits differ by \d+"):
        loading.load_model(folder, "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("architecture", ["qwen3", "gemma2", "qwen3_moe"])
def test_rounding_is_no_reason_to_refuse(tmp_path: Path, architecture: str, dtype: str) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    folder = tiny_model(tmp_path, architecture=architecture, **experts if architecture == "qwen3_moe" else {})
    assert loading.load_model(read_model(folder), dtype).dtype == getattr(torch, dtype)


class OneDeviceEach(TorchDispatchMode):
    """Lets no operation mix tensors of two devices, as GPUs do not; `meta` stands for the second of them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        devices = {leaf.device for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)}
        assert len(devices) < 2 or func is torch.ops.aten._to_copy.default, f"{func} on {devices}"
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("starts", [[0, 0], [5, 2]])
def test_layers_on_several_devices(starts: list[int]) -> None:
    cache = SlotCache(2, 4)
    cache.fit(2, 8)
    with OneDeviceEach():
        for width in (3, 1):
            cache.begin(0, starts, width, torch.device("cpu"))
            for layer, device in enumerate(("cpu", "meta", "meta", "cpu")):
                new = torch.ones(2, 1, width, 4, device=device)
                keys, values = cache.update(new, new, layer)
                assert (keys.device.type, values.device.type) == (device, device)
        cache.move([Move(0, 1, 4)])
        cache.keep([Copy(0, 0, 1)])
        cache.load([Copy(1, 0, 1)])
    assert torch.equal(cache.keys[0], cache.keys[3])


def test_the_head_on_another_device_than_the_embedding(tmp_path: Path) -> None:
    model = loading.load_model(read_model(tiny_model(tmp_path)), "float32")
    forward = Forward(model, Adapters(model, read_model(tmp_path), 0, lambda: None), SlotCache(0, 1))
    forward._keep = torch.tensor([2, 0])
    with OneDeviceEach():
        kept = forward._last(torch.ones(2, 3, 128, device="meta"))
    assert (kept.shape, kept.device.type) == ((2, 1, 128), "meta")


def test_a_folder_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"qwen3"', '"unheard_of"'))
    with pytest.raises(SuiteError, match="no causal language model of this kind"):
        Engine(folder)
