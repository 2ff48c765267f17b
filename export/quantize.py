"""The `quantize` stage: a model in 2 to 8 bits a weight, measured against the model it came from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from export import calibration
from export.folder import read_config, read_json
from suite import data
from suite.config import ArtifactType, DatasetRef, ModelRef
from suite.errors import SuiteError
from suite.stages import Artifact, Job, Stage

BITS: dict[str, tuple[int, ...]] = {"gptq": (2, 3, 4, 8), "awq": (4,), "bnb": (4, 8)}
PACKED = 32
"""Quantized columns are packed into 32-bit words, so a layer's outputs must be a multiple of this."""


class Quantize(Stage):
    """Store the weights in 2 to 8 bits, and measure the result against the model it came from.

    GPTQ and AWQ round so that calibration data sees little difference; bnb needs none. `gptq` packs 2, 3, 4 or 8 bits,
    `awq` 4 bits with zero points (the GEMM layout), `bnb` 4 bits as nf4 or 8 as int8. Transformers reads all of them,
    vLLM gptq and awq.
    """

    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "gptqmodel", "bitsandbytes")
    # gptqmodel starts threads when imported, and a process with threads must not be forked
    preload: ClassVar[tuple[str, ...]] = ("torch", "transformers")

    model: ModelRef
    """The model to quantize, e.g. "@merge"."""
    method: Literal["gptq", "awq", "bnb"] = "gptq"
    """How: gptq, awq (both need `calibration`) or bnb."""
    bits: Literal[2, 3, 4, 8] = 4
    """Bits a weight."""
    group_size: Literal[-1, 32, 64, 128] = 128
    """Weights that share one scale (gptq, awq); smaller is more exact and larger on disk; -1: a whole row."""
    desc_act: bool = False
    """gptq: round the columns with the largest activations first; more exact, slower to serve."""
    sym: bool = True
    """gptq: scales symmetric about zero, which more engines read."""
    calibration: DatasetRef | list[DatasetRef] | None = None
    """Chat data like that which the model will see; some of it is left aside, to measure the result on."""
    fill: dict[str, str] = Field(default_factory=dict)
    """Values for `{{placeholders}}` in the calibration data."""
    samples: int = Field(128, ge=1)
    """Conversations to calibrate on."""
    length: int = Field(256, ge=16)
    """Tokens of the blocks into which they are joined and cut."""
    seed: int = 0
    """Decides which conversations are drawn."""

    def makes(self) -> ArtifactType:
        """A quantized model folder."""
        return "quantized"

    def check(self, inputs: Mapping[str, list[Artifact | None]]) -> None:
        """Whether method, bits, calibration data and the model's shapes fit together."""
        if self.bits not in BITS[self.method]:
            known = " or ".join(map(str, BITS[self.method]))
            raise SuiteError(f"{self.method} has no {self.bits}-bit form", where="bits", hint=f"bits = {known}")
        if self.method != "bnb" and not self.calibration:
            raise SuiteError(
                f"{self.method} needs calibration data",
                where="calibration",
                hint='calibration = "data/chat.jsonl", e.g. the data that the model was trained on',
            )
        data.check([found.path for found in inputs.get("calibration", ()) if found], self.fill)
        if model := next(iter(inputs.get("model", ())), None):
            self._check_model(model.path)

    def _check_model(self, folder: Path) -> None:
        config = read_config(folder)
        if "quantization_config" in config:
            raise SuiteError("the model is quantized already", where=str(folder))
        if self.method == "bnb":
            return
        for name, size in _widths(config).items():
            if self.group_size > 0 and size % self.group_size:
                fits = [str(g) for g in (64, 32) if size % g == 0]
                hint = f"group_size = {fits[0]}" if fits else "use method = 'bnb'"
                raise SuiteError(
                    f"{name} = {size} is no multiple of group_size = {self.group_size}", where=str(folder), hint=hint
                )
            if size % PACKED:
                raise SuiteError(
                    f"{name} = {size} is no multiple of {PACKED}", where=str(folder), hint="method = 'bnb'"
                )
        templates = [folder / "chat_template.jinja", folder / "tokenizer_config.json"]
        if not templates[0].is_file() and "chat_template" not in (
            read_json(templates[1]) if templates[1].is_file() else {}
        ):
            raise SuiteError("the model has no chat template, with which to render calibration data", where=str(folder))

    def run(self, job: Job) -> dict[str, Any]:
        """Quantize, then measure the result against its parent, on conversations that calibration has not seen too."""
        from export import parity

        source = job.input("model").path
        metrics: dict[str, Any] = {}
        held_out: list[list[dict[str, Any]]] = []
        if files := [found.path for found in job.inputs.get("calibration", ())]:
            drawn = calibration.draw(source, files, self.fill, self.samples, self.length, self.seed)
            held_out = drawn.held_out
        if self.method == "bnb":
            from export import bnb

            bnb.quantize(source, job.out, self.bits)
        else:
            if drawn.warning:
                job.warn(drawn.warning)
            metrics["calibration"] = {"samples": drawn.conversations, "tokens": sum(map(len, drawn.blocks))}
            self._calibrated(source, job, drawn.blocks)
        metrics["bytes"], metrics["parent_bytes"] = _weight_bytes(job.out), _weight_bytes(source)
        metrics["parity"] = parity.measure(
            lambda: parity.load(source),
            lambda: parity.load(job.out, dtype="auto"),  # as it will be served
            parity.probes(source, held_out),
            job.progress,
        )
        return metrics

    def _calibrated(self, source: Path, job: Job, blocks: list[list[int]]) -> None:
        from export import awq, gptq

        if self.method == "awq":
            awq.quantize(source, job.out, blocks, job.progress, bits=self.bits, group_size=self.group_size)
            return
        gptq.quantize(
            source,
            job.out,
            blocks,
            job.progress,
            bits=self.bits,
            group_size=self.group_size,
            desc_act=self.desc_act,
            sym=self.sym,
        )


def _widths(config: dict[str, Any]) -> dict[str, int]:
    """The sizes that the layers' inputs and outputs have."""
    heads = config.get("num_attention_heads", 1)
    head = config.get("head_dim") or config.get("hidden_size", 0) // heads
    sizes = {
        "hidden_size": config.get("hidden_size"),
        "intermediate_size": config.get("intermediate_size"),
        "moe_intermediate_size": config.get("moe_intermediate_size"),
        "num_attention_heads * head_dim": heads * head,
    }
    return {name: size for name, size in sizes.items() if isinstance(size, int) and size}


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
