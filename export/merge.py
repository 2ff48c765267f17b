"""The `merge` stage: a base and a LoRA adapter become one model, tensor by tensor, without loading either."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, ClassVar

from pydantic import field_validator

from export.adapter import Adapter, Edit
from export.folder import copy_beside, copy_tokenizer, is_tied, read_config, write_json
from export.tensors import Tensor, copy, read_checkpoint, write_checkpoint
from suite.config import AdapterRef, ArtifactType, ModelRef
from suite.errors import SuiteError
from suite.stages import Artifact, Job, Stage

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


class Merge(Stage):
    """Add a LoRA adapter to its base's weights, and prove that the result answers as base and adapter do together.

    Reads and writes a few rows at a time, so memory does not grow with the model; sums in float32, writes the type of
    the base.
    """

    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "peft")
    preload: ClassVar[tuple[str, ...]] = ("torch", "transformers", "peft")

    adapter: AdapterRef
    """The LoRA adapter to merge, e.g. "@train"."""
    base: ModelRef | None = None
    """The model it was trained on; left out: the one that its training recorded."""
    max_shard_size: str = "5GB"
    """The largest weights file, e.g. "500MB" or "5GB"; a larger model is split."""

    @field_validator("max_shard_size")
    @classmethod
    def _size(cls, value: str) -> str:
        parse_size(value)
        return value

    def makes(self) -> ArtifactType:
        """A model folder."""
        return "model"

    def check(self, inputs: Mapping[str, list[Artifact | None]]) -> None:
        """Whether the adapter fits the base, from the headers of their files."""
        adapter = next(iter(inputs.get("adapter", ())), None)
        base = next(iter(inputs.get("base", ())), None)
        if adapter and (base or self.base is None):
            plan(_base_of(adapter, base).path, adapter.path)
        elif base:
            read_config(base.path)

    def run(self, job: Job) -> dict[str, Any]:
        """Merge, then measure the merged model against base and adapter."""
        from export import parity
        from export.lora import is_zero

        adapter = job.input("adapter")
        base = _base_of(adapter, job.optional("base"))
        edits, _ = plan(base.path, adapter.path)
        if is_zero(edits):
            job.warn("the adapter changes nothing: all its B matrices are zero")
        metrics = merge(base.path, adapter.path, job.out, parse_size(self.max_shard_size), job.progress)
        dtype = parity.precision(base.path)
        if dtype is None:
            job.warn(
                "not measured: merging takes little memory, but comparing runs the whole model, and it does not fit"
            )
            return metrics
        metrics["parity"] = parity.measure(
            lambda: parity.load(base.path, adapter.path, dtype),
            lambda: parity.load(job.out, dtype=dtype),
            parity.probes(job.out),
            job.progress,
        )
        return metrics


def plan(base: Path, adapter: Path) -> tuple[list[Edit], dict[str, Any]]:
    """What every tensor of the merged model is made of, and its configuration; reads headers only.

    Raises SuiteError for a folder that is none, and for an adapter of another base.
    """
    config = read_config(base)
    if "quantization_config" in config:
        raise SuiteError(
            "the base is quantized: a merge would be rounded twice",
            where=str(base),
            hint="merge into the model that it was quantized from, then quantize the result",
        )
    tensors = read_checkpoint(base)
    edits, tied = Adapter.read(adapter).fit(tensors, is_tied(config, set(tensors)))
    return edits, {**config, "tie_word_embeddings": tied}


def merge(
    base: Path, adapter: Path, out: Path, max_shard_size: int, progress: Callable[[float, float, str], None]
) -> dict[str, Any]:
    """Write the merged model folder to `out`; returns how many tensors it has and how many were changed."""
    from export import lora

    edits, config = plan(base, adapter)
    by_name = {e.target.name: e for e in edits}
    total, done = sum(t.target.size for t in edits), 0

    def fill(tensor: Tensor, stream: IO[bytes]) -> None:
        nonlocal done
        edit = by_name[tensor.name]
        if edit.copied:
            copy(edit.source, stream)
        else:
            lora.write(edit, stream)
        done += tensor.size
        progress(done, total, "merge")

    out.mkdir(parents=True, exist_ok=True)
    copy_beside(base, out)
    copy_tokenizer(adapter, out)
    write_json(out / "config.json", config)
    with lora.one_thread():
        size = write_checkpoint(out, [e.target for e in edits], fill, max_shard_size)
    changed = sum(e.lora is not None or e.source is not e.target for e in edits)
    return {"tensors": len(edits), "changed": changed, "bytes": size}


def parse_size(text: str) -> int:
    """Bytes in a size such as "5GB"; raises ValueError.

    >>> parse_size("500MB")
    500000000
    """
    match = re.fullmatch(r"(\d+) ?(KB|MB|GB)", text.strip())
    if not match or not int(match[1]):
        raise ValueError("expected a size such as '500MB' or '5GB'")
    return int(match[1]) * UNITS[match[2]]


def _base_of(adapter: Artifact, base: Artifact | None) -> Artifact:
    found = base or adapter.input("base")
    if found is None:
        raise SuiteError(
            "the adapter's folder does not record where its base is",
            where=str(adapter.path),
            hint='give it: base = "path/of/the/model"',
        )
    return found
