"""PyTorch's own files (`pytorch_model.bin`) as places of tensors: the pickle is read, the weights stay on the disk.

Such a file is an uncompressed zip archive: one small pickle that describes the tensors, and one entry of bytes for each
storage. Loading it onto the meta device, weights only, runs no code of the file and reads no weight.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from export.lora.arithmetic import DTYPES
from export.tensors import AGAIN, Tensor
from suite.errors import SuiteError
from suite.quantized import weights_only

NAMES = {dtype: name for name, dtype in DTYPES.items()} | {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def read_bin(file: Path) -> dict[str, Tensor]:
    """The tensors of one file, in the order of their bytes; raises SuiteError for what is no plain table of weights."""
    try:
        with weights_only(file):
            found = torch.load(file, map_location="meta", weights_only=True)
    except (OSError, EOFError, RuntimeError, KeyError, ValueError) as error:
        text = str(error).strip().splitlines()
        reason = text[0] if text else "it is empty"
        raise SuiteError(f"not a readable PyTorch file: {reason}", where=str(file), hint=AGAIN) from None
    if not isinstance(found, dict) or not all(isinstance(t, torch.Tensor) for t in found.values()):
        raise SuiteError(
            "not a table of weights by name: a training checkpoint perhaps",
            where=str(file),
            hint="give the folder that save_pretrained wrote",
        )
    tensors = [_tensor(name, tensor, file) for name, tensor in found.items()]
    return {t.name: t for t in sorted(tensors, key=lambda t: t.start)}


def _tensor(name: str, tensor: Any, file: Path) -> Tensor:
    start = tensor.untyped_storage()._checkpoint_offset
    wrong = (
        "a file of PyTorch before 1.6"
        if start is None
        else f"'{name}' is not contiguous"
        if not tensor.is_contiguous()
        else f"'{name}' is {tensor.dtype}"
        if tensor.dtype not in NAMES
        else ""
    )
    if wrong:
        raise SuiteError(f"{wrong}, which cannot be copied as it lies", where=str(file), hint="save it as safetensors")
    start += tensor.storage_offset() * tensor.element_size()
    return Tensor(name, NAMES[tensor.dtype], tuple(tensor.shape), file, start)
