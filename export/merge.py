"""The `merge` stage: a base and LoRA adapters become one model, tensor by tensor, without loading any of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator

from export.folder import copy_beside, copy_tokenizer, read_config, write_json
from export.lora.adapter import Adapter
from export.lora.fit import ALONE, Combination, Edit, Method, fit
from export.tensors import Tensor, is_pickled, read_checkpoint
from export.writer import Block, Source, write_checkpoint
from suite import quantized
from suite.config import AdapterRef, ArtifactType, Takes
from suite.errors import SuiteError
from suite.stages import RECORD, Artifact, Job, Stage
from suite.store import Store, home

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
ROUNDED = "the base is quantized: its weights are rounded, and a merge would round them once more"
INSTEAD = "merge into the model that it was quantized from, and quantize the result; give it as base"
THREADS = 4
"""More than these wait for each other: the pages of a file are handed out one by one."""
Progress = Callable[[float, float, str], None]


class Merge(Stage):
    """Add LoRA adapters to their base's weights, and prove that the result answers as base and adapter do together.

    Reads and writes a few rows at a time, so memory does not grow with the model; sums in float32, writes the type of
    the base.
    """

    version: ClassVar[int] = 3
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "peft")
    preload: ClassVar[tuple[str, ...]] = ("torch", "transformers", "peft")

    adapter: AdapterRef | list[AdapterRef]
    """The LoRA adapter to merge, e.g. "@train"; or several of one base, e.g. ["@poet", "@coder"]."""
    base: Annotated[str, Takes("model", "quantized")] | None = None
    """The model it was trained on; left out: the one that its training recorded. Of a quantized model, the model that
    it was made from is taken."""
    weights: list[float] = Field(default_factory=list)
    """How much of each adapter's change to add, e.g. [0.7, 0.3]; left out: all of each."""
    combine: Method = "sum"
    """How the changes become one: "sum" adds them, "ties" averages those that agree in sign, after dropping the small
    entries of each, "dare" drops entries at random and enlarges the rest."""
    density: float = Field(0.5, gt=0, le=1)
    """The share of each adapter's change that "ties" and "dare" keep."""
    seed: int = 0
    """What "dare" drops depends on it."""
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
        """Whether the adapters fit the base, from the headers of their files."""
        found = inputs.get("adapter", [])
        how = self._how(len(found)) if found else ALONE
        adapters = [a for a in found if a]
        base = next(iter(inputs.get("base", ())), None)
        if adapters and (base or self.base is None):
            folder = base_of(adapters, base).path
            if not is_pickled(folder):
                plan(folder, [a.path for a in adapters], how)
        elif base:
            read_config(unquantized(base).path)

    def run(self, job: Job) -> dict[str, Any]:
        """Merge, then measure the merged model against base and adapter."""
        from export.lora.arithmetic import is_zero

        given = job.optional("base") or job.input("adapter").input("base")
        base = base_of(job.inputs["adapter"], job.optional("base"))
        if given and given.path != base.path:
            job.say(f"merging into '{base.name}', the model that '{given.name}' was quantized from")
        adapters = [a.path for a in job.inputs["adapter"]]
        how = self._how(len(adapters))
        edits, _ = plan(base.path, adapters, how)
        with Source() as source:
            if is_zero(edits, source):
                job.warn("the adapter changes nothing: all its B matrices are zero")
        metrics = merge(base.path, adapters, job.out, parse_size(self.max_shard_size), job.progress, how)
        metrics["parity"] = self._prove(job, base, how, edits)
        return metrics

    def _prove(self, job: Job, base: Artifact, how: Combination, edits: Sequence[Edit]) -> dict[str, Any]:
        """Compare the merged model with base plus adapter, and require that it differs by rounding only.

        Where no library computes what the merge did, it is compared with what it was made of, and nothing is required.
        """
        from export import parity
        from export.lora import combine, proof

        merged, given = proof.Merged(job.out, base.path, edits), job.inputs["adapter"]
        adapters = [a.path for a in given]
        reads = next((a for a in adapters[:1] if (a / "tokenizer.json").is_file()), base.path)
        probes = parity.probes(job.out, parent=reads)
        with Source() as source:
            together = [Adapter.read(a) for a in adapters]
            adapter = adapters[0] if how.single else combine.as_one(together, how, job.scratch / "adapter", source)
        if adapter:
            return proof.prove(merged, adapter, probes, job.progress)
        parts = [(base.name, None), *((a.name, a.path) for a in given)]
        found = proof.distances(merged, parts, probes, job.progress)
        parity.require_prompts(found, str(job.out))
        near = ", ".join(f"{other['kl']:.2g} to '{other['name']}'" for other in found["against"])
        job.warn(f"there is no model that this merge should equal; KL in nats a token: {near}")
        return found

    def _how(self, adapters: int) -> Combination:
        weights = tuple(self.weights) or (1.0,) * adapters
        if len(weights) != adapters:
            raise SuiteError(f"{len(weights)} for {adapters} adapters", where="weights", hint="give one each")
        if self.combine == "ties" and min(weights) <= 0:
            raise SuiteError("ties averages by weight: each must be above 0", where="weights")
        return Combination(weights, self.combine, self.density, self.seed)


def plan(base: Path, adapters: Sequence[Path], how: Combination = ALONE) -> tuple[list[Edit], dict[str, Any]]:
    """What every tensor of the merged model is made of, and its configuration; reads headers only.

    Raises SuiteError for a folder that is none, and for an adapter of another base.
    """
    config = read_config(base)
    if quantized.settings(base) is not None:
        raise SuiteError(ROUNDED, where=str(base), hint=INSTEAD)
    return fit(read_checkpoint(base), config, [Adapter.read(a) for a in adapters], how)


def merge(
    base: Path,
    adapters: Sequence[Path],
    out: Path,
    max_shard_size: int,
    progress: Progress = lambda *_: None,
    how: Combination = ALONE,
) -> dict[str, Any]:
    """Write the merged model folder to `out`; returns how many tensors it has and how many were changed.

    The configuration is written last: what an interruption leaves is no model folder.
    """
    import torch

    from export.lora.arithmetic import one_thread
    from export.lora.blocks import Merger

    edits, config = plan(base, adapters, how)
    total, done = sum(e.target.size for e in edits), 0
    threads = min(THREADS, torch.get_num_threads())
    out.mkdir(parents=True, exist_ok=True)
    with Source() as source, one_thread():
        merger = Merger(edits, how, source)

        def blocks(target: Tensor) -> Iterator[Block]:
            nonlocal done
            progress(done, total, "merge")
            yield from merger.blocks(target)
            done += target.size

        size = write_checkpoint(out, [e.target for e in edits], blocks, max_shard_size, threads)
    progress(total, total, "merge")
    copy_beside(base, out)
    copy_tokenizer(adapters[0], out)
    write_json(out / "config.json", config)
    return {"tensors": len(edits), "changed": sum(e.changed for e in edits), "bytes": size}


def parse_size(text: str) -> int:
    """Bytes in a size such as "5GB"; raises ValueError.

    >>> parse_size("2.5MB")
    2500000
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(KB|MB|GB)", text.strip())
    if not match or not float(match[1]):
        raise ValueError("expected a size such as '500MB' or '5GB'")
    return int(float(match[1]) * UNITS[match[2]])


def base_of(adapters: Sequence[Artifact], base: Artifact | None) -> Artifact:
    """The unquantized model that the adapters belong to: the given one, else what their training recorded.

    Raises SuiteError where it is not, byte for byte, what an adapter was trained on; one that records nothing goes with
    any base that its shapes fit.
    """
    found = base or adapters[0].input("base")
    if found is None:
        raise SuiteError(
            "the adapter's folder does not record where its base is",
            where=str(adapters[0].path),
            hint='give it: base = "path/of/the/model"',
        )
    for adapter in adapters[1:]:
        first, other = adapters[0].input("base"), adapter.input("base")
        if first and other and other.digest != first.digest:
            raise SuiteError(
                f"'{adapters[0].name}' was trained on '{first.name}', '{adapter.name}' on '{other.name}'",
                where="adapter",
                hint="only changes of the same weights can be combined",
            )
    whole = unquantized(found)
    for adapter in adapters:
        _require_trained_on(whole, adapter)
    return whole


def _require_trained_on(base: Artifact, adapter: Artifact) -> None:
    """Compare the content of `base` with what was recorded when `adapter` was trained."""
    recorded = next(iter(adapter.record.get("inputs", {}).get("base", ())), None)
    known = adapter.input("base")
    while known and known.type == "quantized":
        known = known.input("model")
    if known:
        wanted = known.digest
    elif recorded and recorded["type"] != "quantized":
        wanted = recorded["digest"]
    else:
        return
    if Store(home()).digest(base.path) != wanted:
        raise SuiteError(
            f"'{base.name}' is not the model that '{adapter.name}' was trained on, or has changed since",
            where=str(base.path),
            hint=f"give that model, as it was then; a copy of the adapter's folder without {RECORD} goes with any base "
            "that its shapes fit",
        )


def unquantized(model: Artifact) -> Artifact:
    """`model`, or what it was quantized from; raises SuiteError for a quantized model that does not record that."""
    if model.type != "quantized":
        return model
    parent = model.input("model")
    if parent is None:
        raise SuiteError(ROUNDED, where=str(model.path), hint=INSTEAD)
    return unquantized(parent)
