"""A folder ready to publish: weights, tokenizer, template, settings that older readers understand, checksums."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from export import older
from export.ends import ends
from export.folder import copy_beside, copy_licences, copy_tokenizer, read_config, read_json, write_json
from export.gguf.tokenizer import chat_template
from suite.errors import SuiteError

Progress = Callable[[float, float, str], None]
CHECKSUMS = "checksums.txt"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def write_model(source: Path, out: Path, progress: Progress) -> dict[str, Any]:
    """Copy the model or quantized model in `source` to `out`, completed for every reader; proves the weights equal."""
    copy_beside(source, out)
    copied = _copy_weights(source, out, progress)
    config = read_config(source)
    config = {key: value for key, value in config.items() if key != "_name_or_path"}
    write_json(out / "config.json", older.config(config))
    _complete_tokenizer(source, out)
    _complete_generation(source, out)
    return copied


def write_adapter(source: Path, out: Path, base_model: str, progress: Progress) -> dict[str, Any]:
    """Copy the PEFT adapter in `source` to `out`; its base is called `base_model` when that is given."""
    copy_tokenizer(source, out)
    copy_licences(source, out)
    copied = _copy_weights(source, out, progress)
    config = read_json(source / "adapter_config.json")
    if base_model:
        config["base_model_name_or_path"] = base_model
    elif Path(str(config.get("base_model_name_or_path") or "")).is_absolute():
        raise SuiteError(
            "adapter_config.json names its base by a path of this machine",
            where=str(source),
            hint='give its name on the hub: base_model = "organisation/name"',
        )
    write_json(out / "adapter_config.json", config)
    _complete_tokenizer(source, out)
    return copied


def write_checksums(out: Path) -> None:
    """List the sha256 of every file in `out`, in the form that `sha256sum -c` reads."""
    files = sorted(f for f in out.rglob("*") if f.is_file() and f.name != CHECKSUMS)
    lines = [f"{sha256(file)}  {file.relative_to(out).as_posix()}\n" for file in files]
    (out / CHECKSUMS).write_text("".join(lines), "utf-8")


def sha256(file: Path) -> str:
    """Hex digest of the content of `file`."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _copy_weights(source: Path, out: Path, progress: Progress) -> dict[str, Any]:
    files = sorted({file for pattern in WEIGHTS for file in source.glob(pattern)})
    if not files:
        raise SuiteError(
            "the folder has no *.safetensors",
            where=str(source),
            hint="save it again with transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other) "
            "writes safetensors, of pickled weights too",
        )
    for i, file in enumerate(files):
        shutil.copyfile(file, out / file.name)
        if sha256(file) != sha256(out / file.name):
            raise SuiteError(f"{file.name} was damaged while it was copied", where=str(out), hint="check the disk")
        progress(i + 1, len(files), "weights")
    return {"bytes": sum(file.stat().st_size for file in files), "equal_files": len(files)}


def _complete_tokenizer(source: Path, out: Path) -> None:
    """Say in tokenizer_config.json what older readers look for there; the template is in a file of its own too."""
    template = chat_template(source) or ""
    if template:
        (out / "chat_template.jinja").write_text(template, "utf-8")
    file = out / "tokenizer_config.json"
    if file.is_file():
        write_json(file, older.tokenizer_config(read_json(file), template))


def _complete_generation(source: Path, out: Path) -> None:
    """Name every token that ends an answer, the chat template's too: without it a reader runs on."""
    file = out / "generation_config.json"
    settings = read_json(file) if file.is_file() else {}
    if found := list(ends(source)):
        settings["eos_token_id"] = found if len(found) > 1 else found[0]
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")
