"""GPTQ checkpoints whose layers have different bits: the `dynamic` rules of GPTQModel and vLLM, for transformers.

Transformers gives every layer the same width, and reads such a checkpoint wrongly without saying so. Registered under
a method name of its own, which `suite.quantized.load` asks for; the checkpoint itself stays plain GPTQ.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import torch
from transformers import GPTQConfig
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_gptq import GptqHfQuantizer

METHOD = "gptq-mixed"


@register_quantization_config(METHOD)
class MixedGptqConfig(GPTQConfig):  # type: ignore[misc]
    """GPTQ settings with `dynamic`: regular expressions, each with what the layers it matches have different."""

    def __init__(self, dynamic: dict[str, dict[str, Any]], **settings: Any) -> None:
        super().__init__(**settings)
        self.dynamic, self.quant_method = dynamic, METHOD

    def bits_of(self, module: str) -> int:
        """The width of a layer; 0 where a rule says that it is not quantized. The first rule that matches counts."""
        for rule, changed in self.dynamic.items():
            sign, pattern = (rule[:2], rule[2:]) if rule[:2] in ("+:", "-:") else ("+:", rule)
            if re.match(pattern, module):
                return 0 if sign == "-:" else int(changed.get("bits") or self.bits)
        return int(self.bits)


@register_quantizer(METHOD)
class MixedGptq(GptqHfQuantizer):  # type: ignore[misc]
    """Puts quantized layers in place of linear ones, one width after the other."""

    def _process_model_before_weight_loading(self, model: Any, **options: Any) -> None:
        from optimum.gptq import GPTQQuantizer
        from optimum.gptq.utils import get_block_name_with_pattern

        widths: dict[int, list[str]] = defaultdict(list)
        blocks = get_block_name_with_pattern(model)
        for name, module in model.named_modules():
            if name.startswith(f"{blocks}.") and isinstance(module, torch.nn.Linear):
                widths[self.quantization_config.bits_of(name)].append(name)
        widths.pop(0, None)
        for bits, names in widths.items():
            given = {**self.quantization_config.to_dict_optimum(), "bits": bits}
            given["modules_in_block_to_quantize"] = [names]
            self.optimum_quantizer = GPTQQuantizer.from_dict(given)  # any of them finishes the layers of all
            self.optimum_quantizer.convert_model(model, **options)
