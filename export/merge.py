"""The `merge` stage: a base and LoRA adapters become one model, tensor by tensor, without loading any of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator

from export.folder import copy_beside, copy_tokenizer, read_config, write_json
from export.limits import Limits
from export.lora.adapter import Adapter
from export.lora.fit import ALONE, Combination, Edit, Method, fit
from export.tensors import Tensor, is_pickled, read_checkpoint
from export.writer import Block, Source, write_checkpoint
from suite import quantized
from suite.config import AdapterRef, ArtifactType, Takes
from suite.errors import SuiteError
from suite.stages import Artifact, Job, Stage

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
ROUNDED = "the base is quantized: its weights are rounded, and a merge would round them once more"
INSTEAD = "merge into the model that it was quantized from, and quantize the result; give it as base"
THREADS = 4
"""More than these wait for each other: the pages of a file are handed out one by one."""
Progress = Callable[[float, float, str], None]
LIMITS = {
    dtype: Limits(kl=kl, cure="the merged weights are not those of base and adapter: please report this")
    for dtype, kl in {"F32": 1e-6, "F16": 1e-3, "BF16": 2e-2}.items()
}
"""How far rounding a merged weight to its type may move the answers."""


class Merge(Stage):
    """Add LoRA adapters to their base's weights, and prove that the result answers as base and adapter do together.

    Reads and writes a few rows at a time, so memory does not grow with the model; sums in float32, writes the type of
    the base.
    """

    version: ClassVar[int] = 2
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
        metrics["parity"] = self._prove(job, base.path, adapters, how, edits)
        return metrics

    def _prove(
        self, job: Job, base: Path, adapters: Sequence[Path], how: Combination, edits: Sequence[Edit]
    ) -> dict[str, Any]:
        """Compare the merged model with base plus adapter, and require that it differs by rounding only."""
        from export import parity
        from export.lora import combine

        with Source() as source:
            together = [Adapter.read(a) for a in adapters]
            adapter = adapters[0] if how.single else combine.as_one(together, how, job.scratch / "adapter", source)
        if adapter is None:
            job.say("not compared: there is no other way to ask the base with these adapters together")
            return {}
        rows = {e.target.name: e.target.shape[0] for e in edits}
        tokens = next(
            (rows[n] for n, t in read_checkpoint(base).items() if rows.get(n, t.shape[0]) != t.shape[0]), None
        )
        result = parity.measure(
            lambda: parity.load(base, adapter) if tokens is None else resized(base, adapter, tokens),
            lambda: parity.load(job.out),
            parity.probes(job.out, parent=next((a for a in adapters[:1] if (a / "tokenizer.json").is_file()), base)),
            job.progress,
        )
        changed = {e.target.dtype for e in edits if e.changed}
        parity.require(
            result, max((LIMITS[d] for d in changed if d in LIMITS), key=lambda limits: limits.kl, default=Limits())
        )
        return result

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


def resized(base: Path, adapter: Path, tokens: int) -> Any:
    """Base and adapter in memory, for an adapter that brings new tokens."""
    from peft import PeftModel

    from export import parity

    model = parity.load(base, streamed=False)
    model.resize_token_embeddings(tokens, mean_resizing=False)
    return PeftModel.from_pretrained(model, str(adapter)).eval()


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
    """The unquantized model that the adapters belong to: the given one, else what their training recorded."""
    if base:
        return unquantized(base)
    recorded = [a.input("base") for a in adapters]
    found = recorded[0]
    if found is None:
        raise SuiteError(
            "the adapter's folder does not record where its base is",
            where=str(adapters[0].path),
            hint='give it: base = "path/of/the/model"',
        )
    for adapter, other in zip(adapters, recorded, strict=True):
        if other and other.digest != found.digest:
            raise SuiteError(
                f"'{adapters[0].name}' was trained on '{found.name}', '{adapter.name}' on '{other.name}'",
                where="adapter",
                hint="only changes of the same weights can be combined",
            )
    return unquantized(found)


def unquantized(model: Artifact) -> Artifact:
    """`model`, or what it was quantized from; raises SuiteError for a quantized model that does not record that."""
    if model.type != "quantized":
        return model
    parent = model.input("model")
    if parent is None:
        raise SuiteError(ROUNDED, where=str(model.path), hint=INSTEAD)
    return unquantized(parent)
