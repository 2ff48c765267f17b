"""Quantized checkpoints of today and of the archived tools: what they say about themselves, and how they are loaded.

    today       config.json has `quantization_config`
    AutoGPTQ    quantize_config.json beside it, before 0.5 only there; weights in gptq_model-4bit-128g.safetensors,
                or .bin: a pickle, of which only weights are read
    AutoAWQ     before 0.2 in quant_config.json only, with w_bit and q_group_size

The bytes of the weights are the same in all of them, so nothing is converted: the settings are.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from suite.errors import SuiteError

# with one worker a core, a machine of two cores has a pool of one, and GPTQModel stops; read when it is imported
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, os.cpu_count() or 2)))

OLDER = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files in which AutoGPTQ and AutoAWQ kept what config.json says today."""
PICKLED = "pytorch_model.bin"
"""The one name by which transformers finds a pickled file."""
RENAMED = {"w_bit": "bits", "q_group_size": "group_size"}


def settings(folder: Path) -> dict[str, Any] | None:
    """The `quantization_config` of a model folder, in today's words; None for one that is not quantized.

    Raises SuiteError for a file that holds no JSON object.
    """
    config = folder / "config.json"
    if config.is_file() and (found := _read(config).get("quantization_config")) is not None:
        return dict(found)
    for name, method in OLDER.items():
        if (folder / name).is_file():
            given = {RENAMED.get(key, key): value for key, value in _read(folder / name).items()}
            given["quant_method"] = "awq" if "zero_point" in given else method
            if "version" in given:
                given["version"] = str(given["version"]).lower()
            return given
    return None


def mixed(given: Mapping[str, Any]) -> bool:
    """Whether these settings give layers different bits."""
    return any(not rule.startswith("-:") for rule in given.get("dynamic") or ())


def unread(folder: Path) -> str:
    """What of a quantized model plain transformers does not read, and GPTQModel does; empty for nothing."""
    given = settings(folder) or {}
    config = _read(folder / "config.json")
    if mixed(given):
        return "layers of different bits"
    experts = config.get("num_experts") or config.get("num_local_experts")
    return "experts in these formats" if experts and given.get("quant_method") in OLDER.values() else ""


def load(folder: Path, **options: Any) -> Any:
    """`AutoModelForCausalLM.from_pretrained(folder, **options)`, for every layout, and for layers of different bits.

    Only files of the folder are read, of pickled ones only weights. Raises SuiteError where a checkpoint lacks
    tensors that its settings promise, which transformers would make up, and for a pickle that holds more.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    given = settings(folder)
    if given:
        if given.get("quant_method") in OLDER.values():
            import defuser

            defuser.replace_fused_blocks(config.model_type)  # experts, one tensor in transformers, become layers
        if mixed(given):
            from suite.mixed_gptq import METHOD

            given["quant_method"] = METHOD
        config.quantization_config = given
        named = sorted(folder.glob("*.safetensors"))
        if len(named) == 1 and named[0].name != "model.safetensors":
            config.transformers_weights = named[0].name
    with _pickled_by_its_usual_name(folder) as found, weights_only(folder):
        model, loaded = AutoModelForCausalLM.from_pretrained(
            found, config=config, local_files_only=True, output_loading_info=True, **options
        )
    check_whole(folder, loaded)
    return model


def check_whole(folder: Path, loaded: Mapping[str, Any]) -> None:
    """Raise SuiteError where the files lack weights, which transformers made up, as its `loaded` says."""
    if missing := sorted(loaded["missing_keys"]):
        also = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        hint = "fetch its files anew, and see whether config.json belongs to these weights (tie_word_embeddings)"
        if settings(folder):
            hint = "look into quantization_config: quant_method, version, the layers that are not quantized"
        raise SuiteError(
            f"its settings do not describe its weights: {missing[0]} is missing{also}", where=str(folder), hint=hint
        )


@contextmanager
def weights_only(where: Path) -> Iterator[None]:
    """Raise SuiteError where torch, told to read only weights, refuses a pickle at `where` that holds more."""
    try:
        yield
    except pickle.UnpicklingError:
        raise SuiteError(
            "its pickle holds more than weights, and loading that would run code from the file",
            where=str(where),
            hint="save the weights again, as safetensors, where you trust the file",
        ) from None


@contextmanager
def _pickled_by_its_usual_name(folder: Path) -> Iterator[Path]:
    """`folder`; where its one file of weights has a name of AutoGPTQ's, links by the name that is looked for."""
    weights = [file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin")]
    if len(weights) != 1 or weights[0].suffix != ".bin" or weights[0].name == PICKLED:
        yield folder
        return
    with TemporaryDirectory() as temporary:
        for file in folder.iterdir():
            (Path(temporary) / (PICKLED if file in weights else file.name)).symlink_to(file.absolute())
        yield Path(temporary)


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SuiteError(f"{file.name} is not valid JSON: {error}", where=str(file.parent)) from None
    if not isinstance(content, dict):
        raise SuiteError(f"{file.name} must hold a JSON object", where=str(file.parent))
    return content
