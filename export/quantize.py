"""The `quantize` stage: a model in 2 to 8 bits a weight, measured against the model it came from."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from export.folder import read_config, read_json, weight_bytes
from export.limits import Limits
from export.merge import parse_size
from export.quantizers import calibration, layers, mixes
from export.quantizers.calibration import Drawn
from export.quantizers.recipe import METHODS, Blocks, Recipe
from suite import data, quantized
from suite.config import ArtifactType, Config, DatasetRef, ModelRef
from suite.errors import SuiteError
from suite.stages import Artifact, Job, Stage

PACKED = 32
"""Quantized columns are packed into 32-bit words, so a layer's outputs must be a multiple of this."""
MAX_KL = {8: 0.05, 4: 0.5, 3: 1.0, 2: 3.0}
"""The KL (nats a token) at which a model of so many bits is broken rather than rounded."""
CURE = "more bits, a smaller group_size, keep = { ... = 16 } for some layers, or max_kl if this is good enough"


class Search(Config):
    """Choose method and bits for each group of layers, by measuring; exactly one limit is given."""

    max_kl: float | None = Field(None, gt=0)
    """Make the smallest model whose KL to its parent (nats a token, on the probes) is at most this."""
    max_bytes: str | None = None
    """Make the closest model whose weights take at most this, e.g. "2.5MB"."""
    methods: list[Literal["gptq", "awq", "bnb"]] = Field(["gptq", "awq", "bnb"], min_length=1)
    """The methods that may be chosen; each costs the making of one to three models."""
    bits: list[Literal[2, 3, 4, 8]] = Field([4, 8], min_length=1)
    """The widths that a group may get, beside 16: as it is. 2 and 3 make smaller models, and vLLM refuses them."""

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if (self.max_kl is None) == (self.max_bytes is None):
            raise ValueError("give either max_kl or max_bytes")
        if self.max_bytes is not None:
            parse_size(self.max_bytes)
        if not mixes.families(self.methods, self.bits):
            raise ValueError(f"{' and '.join(self.methods)} have no layers of {' or '.join(map(str, self.bits))} bits")
        return self


class Quantize(Stage):
    """Store the weights in 2 to 8 bits, and measure the result against the model it came from.

    GPTQ and AWQ round so that calibration data sees little difference; bnb needs none. `gptq` packs 2, 3, 4 or 8 bits,
    `awq` 4 bits with zero points (the GEMM layout), `bnb` 4 bits as nf4 or fp4, or 8 as int8. `w4a16`, `w8a8` (int8
    activations too) and `fp8` are compressed-tensors, made by llm-compressor in an environment of its own: `suite env
    install llmcompressor`. `keep` gives chosen layers more bits, `search` chooses for itself. Transformers reads all
    of them but layers of different bits, and experts of gptq and awq, which GPTQModel and this suite read; vLLM no
    bnb, and of gptq 4 and 8 bits that are symmetric and not `desc_act`.
    """

    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "gptqmodel", "bitsandbytes")
    # gptqmodel starts threads when imported, and a process with threads must not be forked
    preload: ClassVar[tuple[str, ...]] = ("torch", "transformers")

    model: ModelRef
    """The model to quantize, e.g. "@merge"."""
    method: Literal["gptq", "awq", "bnb", "w4a16", "w8a8", "fp8"] = "gptq"
    """How; gptq, awq, w4a16 and w8a8 need `calibration`."""
    bits: Literal[2, 3, 4, 8] = 4
    """Bits a weight; w8a8 and fp8 have 8."""
    group_size: Literal[-1, 32, 64, 128] = 128
    """Weights that share one scale (gptq, awq, w4a16); smaller is more exact and larger on disk; -1: a whole row."""
    desc_act: bool = False
    """gptq: round the columns with the largest activations first; more exact, slower, and refused by vLLM."""
    sym: bool = True
    """gptq: scales symmetric about zero; vLLM reads no others."""
    format: Literal["nf4", "fp4"] = "nf4"
    """bnb with 4 bits: values spaced as a normal distribution has them, or as 4-bit floats."""
    double_quant: bool = False
    """bnb with 4 bits: store the scales in 8 bits too, which saves 0.37 bits a weight."""
    keep: dict[str, Literal[3, 4, 8, 16]] = Field(default_factory=dict)
    """Layers that keep more bits, by regular expression, e.g. { "down_proj" = 8 }; 16: left as they are."""
    search: Search | None = None
    """Choose method and bits for each group of layers, by measuring: { max_kl = 0.02 } or { max_bytes = "2.5MB" }."""
    max_kl: float | None = Field(None, gt=0)
    """Fail above this KL to the parent (nats a token); by default 0.05 for 8 bits, 0.5 for 4, 1 for 3, 3 for 2."""
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

    @model_validator(mode="before")
    @classmethod
    def _only_width(cls, values: Any) -> Any:
        """A method without the default width needs no `bits`."""
        method = METHODS.get(str(values.get("method"))) if isinstance(values, dict) else None
        default = cls.model_fields["bits"].default
        if method is None or "bits" in values or default in method.bits:
            return values
        return {**values, "bits": method.bits[0]}

    def makes(self) -> ArtifactType:
        """A quantized model folder."""
        return "quantized"

    def environments(self) -> tuple[str, ...]:
        """llm-compressor's for compressed-tensors."""
        return tuple(filter(None, [METHODS[self.method].environment]))

    def check(self, inputs: Mapping[str, list[Artifact | None]]) -> None:
        """Whether method, bits, calibration data and the model's shapes fit together."""
        self._check_settings()
        data.check([found.path for found in inputs.get("calibration", ()) if found], self.fill)
        if model := next(iter(inputs.get("model", ())), None):
            self._check_model(model.path)

    def _check_settings(self) -> None:
        method = METHODS[self.method]
        if self.bits not in method.bits:
            known = " or ".join(map(str, method.bits))
            raise SuiteError(f"{self.method} has no {self.bits}-bit form", where="bits", hint=f"bits = {known}")
        if not self.calibration and (method.calibrated or self.search):
            raise SuiteError(
                f"{'search' if self.search else self.method} needs calibration data",
                where="calibration",
                hint='calibration = "data/chat.jsonl", e.g. the data that the model was trained on',
            )
        for name in ("format", "double_quant"):
            if self._given(name) and (self.method, self.bits) != ("bnb", 4):
                raise SuiteError(f"{name} is for bnb with 4 bits", where=name, hint="method = 'bnb', or leave it out")
        for name in ("desc_act", "sym"):
            if self._given(name) and self.method != "gptq":
                raise SuiteError(f"{name} is for gptq", where=name, hint="method = 'gptq', or leave it out")
        if self.search and (chosen := [n for n in ("method", "bits", "keep", "max_kl") if self._given(n)]):
            raise SuiteError(f"search chooses {chosen[0]} itself", where=chosen[0], hint="leave it out")
        for rule, bits in self.keep.items():
            if bits not in method.keep or bits <= self.bits:
                known = " or ".join(str(b) for b in method.keep if b > self.bits)
                raise SuiteError(
                    f"{self.method} with {self.bits} bits keeps no layer at {bits}, as '{rule}' asks",
                    where="keep",
                    hint=f"it keeps them at {known}; 16 is as they are",
                )

    def _given(self, name: str) -> bool:
        """Whether a setting differs from its default."""
        return bool(getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True))

    def _check_model(self, folder: Path) -> None:
        config = read_config(folder)
        if quantized.settings(folder) is not None:
            raise SuiteError(
                "the model is quantized already", where=str(folder), hint="give the model that it was made from"
            )
        if self.keep or self.search:
            found = layers.linear_layers(folder)
            if len([bits for bits in layers.kept(found, self.keep).values() if bits == layers.WHOLE]) == len(found):
                raise SuiteError("keep leaves no layer to quantize", where="keep")
        methods = self.search.methods if self.search else [self.method]
        if failing := next((m for m in methods if config.get("model_type") in METHODS[m].fails_on), None):
            raise SuiteError(
                f"{failing} of {config['model_type']} is more than GPTQModel can make",
                where="search.methods" if self.search else "method",
                hint="gptq, bnb and w4a16 can be made",
            )
        if any(METHODS[method].grouped for method in methods):
            self._check_widths(config, folder)
        if self.calibration:
            _check_template(folder)

    def _check_widths(self, config: dict[str, Any], folder: Path) -> None:
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

    def run(self, job: Job) -> dict[str, Any]:
        """Quantize, then measure the result against its parent, on conversations that calibration has not seen too."""
        from export import parity

        source = job.input("model").path
        linear = layers.linear_layers(source)
        drawn = self._draw(job, max((inputs for _, inputs in linear.values()), default=0))
        metrics: dict[str, Any] = {}
        if drawn:
            metrics["calibration"] = calibration.account(drawn, job.inputs["calibration"], self.length, self.seed)
        blocks = drawn.blocks if drawn else []

        def measure(folder: Path) -> dict[str, Any]:
            return parity.measure(
                lambda: parity.load(source),
                lambda: parity.load(folder, dtype="auto"),  # as it will be served
                parity.probes(folder, drawn.held_out if drawn else (), parent=source),
                job.progress,
            )

        if self.search:
            metrics |= self._search(job, source, blocks, measure)
        else:
            recipe = replace(self._recipe(linear), python=next(iter(job.pythons.values()), None))
            if parts := layers.torn(linear, dict.fromkeys(linear, self.bits) | dict(recipe.widths)):
                job.warn(f"parts of {parts[0]} have different widths: engines that fuse them will not load this model")
            recipe.make(source, job.out, blocks, job.progress)
            if left := [name for name in layers.untouched(linear, job.out) if name not in recipe.whole]:
                job.warn(f"{self.method} leaves {len(left)} of {len(linear)} layers as they are, such as {left[0]}")
            metrics["parity"] = measure(job.out)
            parity.require(metrics["parity"], Limits(kl=self.max_kl or MAX_KL[self.bits], cure=CURE))
        if unread := quantized.unread(job.out):
            job.warn(
                f"it has {unread}, which plain transformers does not read: load it with GPTQModel, or serve it here"
            )
        return {**metrics, "bytes": weight_bytes(job.out), "parent_bytes": weight_bytes(source)}

    def _draw(self, job: Job, widest: int) -> Drawn | None:
        """The calibration samples, if there are any; says what may be wrong with them."""
        files = job.inputs.get("calibration", [])
        if not files:
            return None
        model = job.input("model")
        drawn = calibration.draw(
            model.path,
            [file.path for file in files],
            self.fill,
            samples=self.samples,
            length=self.length,
            seed=self.seed,
            widest=widest if METHODS[self.method].calibrated else 0,
            trained_on=calibration.training_data(model),
        )
        for warning in drawn.warnings:
            job.warn(warning)
        if not drawn.compared:
            job.say("no training data is known of this model: the languages of the calibration data were not compared")
        return drawn

    def _recipe(self, linear: Mapping[str, layers.Shape]) -> Recipe:
        """These settings, with the layers that `keep` means."""
        return Recipe(
            method=self.method,
            bits=self.bits,
            group_size=self.group_size,
            desc_act=self.desc_act,
            sym=self.sym,
            format=self.format,
            double_quant=self.double_quant,
            widths=layers.kept(linear, self.keep),
        )

    def _search(
        self, job: Job, source: Path, blocks: Blocks, measure: Callable[[Path], dict[str, Any]]
    ) -> dict[str, Any]:
        from export.quantizers import search

        assert self.search is not None
        size = self.search.max_bytes
        limit = search.Limit(kl=self.search.max_kl, bytes=parse_size(size) if size else None)
        looked = search.Search(source, job.scratch, self._recipe({}), limit, blocks, measure, job.progress)
        best, account = looked.run(self.search.methods, self.search.bits)
        for file in best.folder.iterdir():
            shutil.move(file, job.out / file.name)
        (job.out / "search.md").write_text(search.table(account), "utf-8")
        return {"parity": best.parity, "search": account}


def _check_template(folder: Path) -> None:
    templates = [folder / "chat_template.jinja", folder / "tokenizer_config.json"]
    if not templates[0].is_file() and "chat_template" not in (
        read_json(templates[1]) if templates[1].is_file() else {}
    ):
        raise SuiteError(
            "the model has no chat template, with which to render calibration data",
            where=str(folder),
            hint="put its family's chat_template.jinja beside tokenizer.json; method = 'bnb' needs no calibration",
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
