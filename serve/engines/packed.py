"""Which quantized weights vLLM takes, known before it is started: as seen with 0.32, in docs/quantization.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from serve.settings import Settings
from suite import envs, quantized
from suite.errors import SuiteError

HINT = "docs/quantization.md lists what it takes; the backend 'torch' serves it"


def check(settings: Settings) -> None:
    """Raise SuiteError for weights that it would refuse, unless `quantization` says that it is known how to do it."""
    found = quantized.settings(settings.model)
    if found is None or settings.quantization:
        return
    cpu = envs.device() == "cpu"
    if cpu and settings.dtype == "float32":
        raise SuiteError("vLLM computes with quantized weights in 16 bits only", where="dtype", hint="leave it out")
    if reason := next(_reasons(found, cpu=cpu, adapters=bool(settings.adapters or settings.lora_dir)), ""):
        raise SuiteError(f"vLLM cannot serve {settings.model.name}: {reason}", hint=HINT)


def _reasons(found: Mapping[str, Any], *, cpu: bool, adapters: bool) -> Iterator[str]:
    method, bits = found.get("quant_method"), found.get("bits")
    if method == "bitsandbytes":
        yield "it reads no weights of bitsandbytes"
    elif method == "awq" and bits != 4:
        yield f"it reads awq at 4 bits, not at {bits}"
    elif method == "gptq":
        yield from _gptq(found, cpu)
    elif method == "compressed-tensors":
        yield from _compressed(found, cpu, adapters)


def _gptq(found: Mapping[str, Any], cpu: bool) -> Iterator[str]:
    widths = {found.get("bits"), *_mixed(found)}
    if odd := sorted(str(bits) for bits in widths - {4, 8}):
        yield f"it reads gptq at 4 and 8 bits, not at {odd[0]}"
    if not found.get("sym", True):
        yield "it reads gptq with symmetric scales (sym = true) only"
    if found.get("desc_act"):
        yield "it reads no gptq whose groups are ordered by activations (desc_act = true)"
    if cpu and 8 in widths:
        yield "on a CPU it reads gptq at 4 bits only"


def _mixed(found: Mapping[str, Any]) -> set[Any]:
    """Bits of layers that have others; those of a rule that starts with "-:" are not quantized."""
    rules: Mapping[str, Mapping[str, Any]] = found.get("dynamic") or {}
    return {own["bits"] for rule, own in rules.items() if not rule.startswith("-:") and "bits" in own}


def _compressed(found: Mapping[str, Any], cpu: bool, adapters: bool) -> Iterator[str]:
    for group in (found.get("config_groups") or {}).values():
        weights, computed = group.get("weights") or {}, group.get("input_activations")
        if cpu and weights.get("num_bits") == 8 and computed is None:
            yield "on a CPU it reads 8-bit weights only where activations have 8 bits too"
        if cpu and adapters and computed is not None:
            yield "on a CPU it has no adapters beside 8-bit activations"
