"""Layers of a loaded model remade of fewer, wider operations: on small batches their number is what a step costs.

    q_proj, k_proj, v_proj   ->  qkv_proj       one matrix product; one norm and one rotation of queries and keys
    gate_proj, up_proj       ->  gate_up_proj   one matrix product
    ...RMSNorm               ->  FusedNorm      4 operations for 7
    ...RotaryEmbedding       ->  FusedRotary    3 operations for 12
    ...ForCausalLM           ->  Stack          no modules around the layers, where there are no others than these

They are recognised by what they compute, not by the model's name: the model reads a few tokens, each candidate is given
the very inputs of the layer that it would replace, and takes its place where the outputs are the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import nn

from serve.torch.cache import SlotCache
from serve.torch.layers import FusedAttention, FusedMlp, FusedNorm, FusedRotary, Rotation
from serve.torch.stack import Stack

WIDE = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""The layers made, and those that each is made of."""
HEAD_NORMS = {"q_norm", "k_norm"}


class Part(NamedTuple):
    """Where a layer of the checkpoint lives now: columns `first` to `last` of what the layer `path` puts out."""

    path: str
    first: int
    last: int


def fuse(model: Any) -> dict[str, Part]:
    """Remake the layers of `model` in place; returns where each projection of the checkpoint is now, by its path.

    What is quantized, fused already, on several devices or computed in another way stays as it is. Weights are moved,
    not doubled: one layer at a time exists twice.
    """
    parts: dict[str, Part] = {}
    rotation = Rotation()

    def compare(path: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], wanted: Any) -> None:
        for made in _candidates(layer, rotation):
            if _equal(made, args, kwargs, wanted):
                if isinstance(made, FusedAttention):
                    # from the first token on, `slot_mask` gives any other mask than the causal one as a tensor
                    made.causal = kwargs["attention_mask"] is None
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, made.eval())
                parts.update(_parts(path, layer))
                return

    hooks = [
        layer.register_forward_hook(partial(compare, path), with_kwargs=True)
        for path, layer in model.named_modules()
        if (_is_attention(layer) or _is_mlp(layer) or _is_norm(layer) or _is_rotary(layer))
        and not any(hasattr(part, "_hf_hook") for part in layer.modules())  # accelerate's: it moves what goes in
    ]
    logits = _read_a_little(model)
    for hook in hooks:
        hook.remove()
    _call_directly(model, logits)
    return parts


def _call_directly(model: Any, logits: torch.Tensor) -> None:
    """Leave out what is around the layers: all of it, or what transformers wraps its models' `forward` in.

    That collects outputs that nobody asks for here.
    """
    if Stack.fits(model):
        model.forward = Stack(model)
        if _gives(model, logits):
            return
        del model.forward
    outer = [layer for layer in (model, model.base_model) if "forward" not in vars(layer)]
    for layer in outer:
        layer.forward = MethodType(inspect.unwrap(type(layer).forward), layer)
    if not _gives(model, logits):
        for layer in outer:
            del layer.forward


def _gives(model: Any, logits: torch.Tensor) -> bool:
    try:
        return _near(_read_a_little(model), logits)
    except (AttributeError, TypeError):  # it needs what was left out
        return False


def _candidates(layer: Any, rotation: Rotation) -> Iterator[nn.Module]:
    """What may compute the same as `layer`; each is made when it is asked for."""
    if _is_mlp(layer):
        yield FusedMlp(layer)
    elif _is_norm(layer):
        yield FusedNorm(layer.weight, _eps(layer))
        yield FusedNorm(1 + layer.weight.float(), _eps(layer))  # as Gemma stores it
    elif _is_rotary(layer):
        yield FusedRotary(layer)
    # norms of all heads together would be one vector of another size
    elif all(type(norm) is FusedNorm and len(norm.weight) == layer.head_dim for norm in _head_norms(layer)):
        yield FusedAttention(layer, rotation)


def _equal(made: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], wanted: Any) -> bool:
    """Whether `made` gives what the layer gave, up to half of the digits of its type."""
    try:
        given = made(*args, **kwargs)
    except (RuntimeError, TypeError):  # another shape or call, as where only a part of each head is rotated
        return False
    if not isinstance(wanted, tuple):
        given, wanted = (given,), (wanted,)
    return len(given) == len(wanted) and all(map(_near, given, wanted))


def _near(given: Any, wanted: Any) -> bool:
    if not isinstance(given, torch.Tensor) or given.shape != wanted.shape:
        return given is None  # attention weights, which only the slowest kind of attention has
    return bool((given - wanted).abs().max() <= torch.finfo(wanted.dtype).eps ** 0.5 * wanted.abs().max())


def _read_a_little(model: Any) -> torch.Tensor:
    """Logits of two rows of three tokens, one of them at the far end of what the model can read."""
    far = (getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048) - 3
    near = torch.arange(3, device=model.device)
    cache = SlotCache(0, 1)
    cache.fit(2, 3)
    cache.begin(0, [0, 0], 3, model.device)
    with torch.no_grad():
        logits: torch.Tensor = model(
            input_ids=torch.stack((near + 1, near + 4)),
            position_ids=torch.stack((near, near + far)),
            past_key_values=cache,
            use_cache=True,
        ).logits
    return logits


def _parts(path: str, layer: Any) -> dict[str, Part]:
    for wide, names in WIDE.items():
        if hasattr(layer, names[0]):
            ends = torch.tensor([0, *(getattr(layer, name).out_features for name in names)]).cumsum(0).tolist()
            return {f"{path}.{name}": Part(f"{path}.{wide}", *ends[i : i + 2]) for i, name in enumerate(names)}
    return {}


def _is_attention(layer: nn.Module) -> bool:
    arguments = inspect.signature(type(layer).forward).parameters.keys()
    return (
        _joins(layer, WIDE["qkv_proj"], "o_proj")
        and _children(layer) - {*WIDE["qkv_proj"], "o_proj"} in (set(), HEAD_NORMS)
        and vars(layer).keys() >= {"head_dim", "scaling", "layer_idx"}
        and arguments >= {"hidden_states", "position_embeddings", "attention_mask", "past_key_values"}
        and "layer_idx" not in arguments  # Zamba2's, which serves several layers
        and getattr(layer.config, "clip_qkv", None) is None  # OLMo's: so few tokens may not show it
    )


def _is_mlp(layer: nn.Module) -> bool:
    names = WIDE["gate_up_proj"]
    return _joins(layer, names, "down_proj") and _children(layer) == {*names, "down_proj", "act_fn"}


def _is_norm(layer: nn.Module) -> bool:
    named = type(layer).__name__.endswith("RMSNorm") and type(layer) is not nn.RMSNorm
    return named and [name for name, _ in layer.named_parameters()] == ["weight"] and _eps(layer) is not None


def _is_rotary(layer: nn.Module) -> bool:
    # the other kinds, dynamic and longrope, change their frequencies with the length
    constant = getattr(layer, "rope_type", None) in ("default", "linear", "llama3", "yarn")
    return constant and {name for name, _ in layer.named_buffers()} == {"inv_freq", "original_inv_freq"}


def _joins(layer: nn.Module, names: Sequence[str], last: str) -> bool:
    """Whether plain linear layers of these names, on one device, hold all that `layer` has learnt."""
    linear: list[Any] = [getattr(layer, name, None) for name in (*names, last)]
    return (
        all(_is_plain(part) for part in linear)
        and len({(part.weight.device, part.weight.dtype, part.bias is None) for part in linear[:-1]}) == 1
        and not list(layer.parameters(recurse=False))
    )


def _is_plain(part: Any) -> bool:
    """Whether it is a linear layer whose weights are not packed."""
    return type(part) is nn.Linear and {"weight"} <= {n for n, _ in part.named_parameters()} <= {"weight", "bias"}


def _children(layer: nn.Module) -> set[str]:
    return {name for name, _ in layer.named_children()}


def _head_norms(layer: nn.Module) -> list[Any]:
    return [getattr(layer, name) for name in HEAD_NORMS if hasattr(layer, name)]


def _eps(layer: Any) -> Any:
    return getattr(layer, "variance_epsilon", getattr(layer, "eps", None))
