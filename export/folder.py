"""What a model folder holds beside its weights: configuration, tokenizer, template; read and copied without torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from suite.errors import SuiteError
from suite.stages import RECORD

TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
LICENCES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")
"""Under what terms a model is given; who passes it on must pass them on too."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json")
OF_THE_PARENT = (RECORD, "README.md", "checksums.txt")
"""Files that describe the folder they lie in, and would be untrue in a copy."""


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; raises SuiteError when it is missing or damaged."""
    try:
        content: dict[str, Any] = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise SuiteError(f"the folder has no {file.name}", where=str(file.parent)) from None
    except json.JSONDecodeError as error:
        raise SuiteError(error.msg, where=f"{file}:{error.lineno}") from None
    return content


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write `content` as transformers writes its files."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def read_config(folder: Path) -> dict[str, Any]:
    """The model's config.json; raises SuiteError for a folder without."""
    if not (folder / "config.json").is_file():
        raise SuiteError("not a model folder: it has no config.json", where=str(folder))
    return read_json(folder / "config.json")


def weight_bytes(folder: Path) -> int:
    """The size of the weights' files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def is_tied(config: dict[str, Any], names: set[str]) -> bool:
    """Whether the head is the embedding; `names` are the tensors of the checkpoint."""
    return bool(config.get("tie_word_embeddings", "lm_head.weight" not in names))


def copy_beside(source: Path, out: Path) -> None:
    """Copy what is not weights (configuration, tokenizer, template, generation settings, licence) from a model."""
    for file in sorted(source.iterdir()):
        left_out = file.name.startswith(".") or file.name.endswith(WEIGHTS) or file.name in OF_THE_PARENT
        if file.is_file() and not left_out:
            shutil.copyfile(file, out / file.name)


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy the tokenizer and its chat template; what `source` lacks stays as it is in `out`."""
    for name in TOKENIZER:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def copy_licences(source: Path, out: Path) -> None:
    """Copy the terms under which `source` is given."""
    for file in sorted(file for pattern in LICENCES for file in source.glob(pattern)):
        if file.is_file():
            shutil.copyfile(file, out / file.name)


def eos_ids(folder: Path) -> list[int]:
    """The tokens that end an answer: of the generation config, else of the configuration."""
    file = folder / "generation_config.json"
    settings = read_json(file) if file.is_file() else {}
    ids = settings.get("eos_token_id", read_config(folder).get("eos_token_id"))
    return [] if ids is None else ids if isinstance(ids, list) else [ids]
