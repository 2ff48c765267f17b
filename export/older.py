"""What readers from before transformers 5 look for, beside what it writes; transformers 5 loads the same as without.

Measured with transformers 4.57: without these keys gemma3's rotary base of sliding layers is lost (its answers differ),
phi3's long rope is refused, and no tokenizer loads.
"""

from __future__ import annotations

from typing import Any

TOKENIZER_CLASS = {"TokenizersBackend": "PreTrainedTokenizerFast"}
"""The same class under the name that both know."""


def config(given: dict[str, Any]) -> dict[str, Any]:
    """config.json with the keys of transformers 4 added, in the language model's part too."""
    older = {**given, **({"torch_dtype": given["dtype"]} if "dtype" in given else {}), **_rope(given)}
    if isinstance(given.get("text_config"), dict):
        older["text_config"] = config(given["text_config"])
    return older


def tokenizer_config(given: dict[str, Any], template: str) -> dict[str, Any]:
    """tokenizer_config.json under a class name that both know, with the chat template in it."""
    name = given.get("tokenizer_class")
    older = {**given, "tokenizer_class": TOKENIZER_CLASS[name]} if name in TOKENIZER_CLASS else given
    return {**older, "chat_template": template} if template else older


def _rope(given: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` as the keys from which it was made one."""
    parameters = given.get("rope_parameters") or {}
    apart = {}
    if "full_attention" in parameters and "sliding_attention" in parameters:  # by kind of layer
        if str(given.get("model_type")).startswith("gemma3"):
            apart["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        parameters = parameters["full_attention"]
    if "rope_theta" not in parameters:
        return {}
    if "partial_rotary_factor" in parameters:
        apart["partial_rotary_factor"] = parameters["partial_rotary_factor"]
    return {"rope_theta": parameters["rope_theta"], "rope_scaling": _scaling(given, parameters), **apart}


def _scaling(given: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any] | None:
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        return None
    if given.get("model_type") == "phi3":  # takes these three and no more
        return {"type": kind, **{key: parameters[key] for key in ("short_factor", "long_factor")}}
    return {key: value for key, value in parameters.items() if key not in ("rope_theta", "partial_rotary_factor")}
