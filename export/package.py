"""The `export` stage: an artifact as others take it, a folder for a model hub or for Ollama."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from export import card, gguf, hf, hub, lineage, modelfile, ollama
from export.folder import read_config, read_json, write_json
from export.gguf_tokenizer import pre_tokenizer
from export.push import Push
from suite.config import ArtifactType, Launch, Takes
from suite.errors import SuiteError
from suite.stages import Artifact, Job, Stage

HF_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto", device_map="auto")
chat = [{{"role": "user", "content": "Hi"}}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs.to(model.device), max_new_tokens=64)[0]))
```"""
ADAPTER_USE = """```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{name}", dtype="auto", device_map="auto")
```"""
OLLAMA_USE = """```sh
ollama create {name} -f Modelfile
ollama run {name}
```"""


class Export(Stage):
    """Write a folder ready to publish (`hf`), or a GGUF file with a Modelfile that Ollama can create from (`ollama`).

    Weights are proved equal to the artifact's; the Ollama template is proved to give the same prompts as the model's
    own. The model card names base, data, settings, scores, keys and versions.
    """

    version: ClassVar[int] = 2
    libraries: ClassVar[tuple[str, ...]] = ("transformers", "huggingface_hub", "gguf")
    preload: ClassVar[tuple[str, ...]] = ("torch", "transformers")

    model: Annotated[str, Takes("model", "quantized", "adapter")]
    """What to export, e.g. "@merge"."""
    to: Literal["hf", "ollama"] = "hf"
    """For whom: a hub folder, or Ollama."""
    weights: gguf.Weights = "f16"
    """ollama: the type of the weights in the GGUF."""
    template: Literal["go", "jinja"] = "go"
    """ollama: write a Go template that is proved equal, or leave it to Ollama to render the model's Jinja."""
    name: str = Field("", pattern=r"^[A-Za-z0-9._/-]*$")
    """What to call it; left out: the artifact's name."""
    license: str = ""
    """Its licence, as hubs name it: "apache-2.0", "mit", "other"."""
    license_name: str = ""
    """The name of an "other" licence, e.g. "qwen-research"."""
    license_link: str = ""
    """Where an "other" licence can be read: an https:// address, or LICENSE for the file in the model's folder."""
    base_model: str = ""
    """The base's name on the hub, e.g. "Qwen/Qwen3-0.6B"; left out: the name of its folder, in the text only."""
    description: str = ""
    """A paragraph for the model card."""
    languages: list[str] = Field(default_factory=list)
    """Languages, as codes: ["en", "zh"]."""
    datasets: list[str] = Field(default_factory=list)
    """Names on the hub of the datasets that it was tuned on, for the card's metadata."""
    reports: list[Annotated[str, Takes("report")]] = Field(default_factory=list)
    """Evaluations whose scores go into the model card, e.g. ["@eval"]."""
    sbom: bool = False
    """Add a bill of materials (CycloneDX): the files, and the data, models and libraries that made them."""
    push: str = Field("", pattern=rf"{hub.ADDRESS}|^$")
    """Upload it afterwards: "hf:org/name" or "ms:org/name", "@branch" behind it if it is not the main one."""
    public: Annotated[bool, Launch()] = False
    """push: let everybody see it; otherwise a new repository is private, and a public one is refused."""

    def makes(self) -> ArtifactType:
        """A package."""
        return "package"

    def accepts(self) -> dict[str, Takes]:
        """Ollama quantizes itself and takes no adapter of this form: it gets the merged model."""
        narrowed = {"model": Takes("model")} if self.to == "ollama" else {}
        return {**self.takes(), **narrowed}

    def check(self, inputs: Mapping[str, list[Artifact | None]]) -> None:
        """Whether the artifact can be exported so, from its configuration and tokenizer; the card; the push."""
        card.check(
            license=self.license,
            license_name=self.license_name,
            license_link=self.license_link,
            base_model=self.base_model,
            languages=self.languages,
            datasets=self.datasets,
        )
        if self.sbom and not lineage.installed(["cyclonedx-python-lib"]):
            raise SuiteError("cyclonedx-python-lib is not installed", where="sbom", hint='pip install "suite[sbom]"')
        if self.push:
            try:
                self._push().check({})
            except SuiteError as error:
                raise SuiteError(error.message, where="push", hint=error.hint) from None
        model = next(iter(inputs.get("model", ())), None)
        if model is None:
            return
        if self.to == "ollama":
            _check_ollama(model)
        elif model.type == "adapter":
            read_json(model.path / "adapter_config.json")
        else:
            read_config(model.path)

    def followers(self) -> dict[str, tuple[str, Stage]]:
        """The push, if one is wanted: a stage of its own, for it must run also when the package is made already."""
        return {"push": ("package", self._push())} if self.push else {}

    def _push(self) -> Push:
        return Push(package="@", to=self.push, public=self.public)

    def run(self, job: Job) -> dict[str, Any]:
        """Write the folder; returns sizes and what was proved."""
        model = job.input("model")
        if self.to == "ollama":
            _check_ollama(model)
            metrics = self._ollama(job, model)
        elif model.type == "adapter":
            metrics = hf.write_adapter(model.path, job.out, self.base_model, job.progress)
        else:
            metrics = hf.write_model(model.path, job.out, job.progress)
        self._describe(job, model)
        hf.write_checksums(job.out)
        return metrics

    def _ollama(self, job: Job, model: Artifact) -> dict[str, Any]:
        template = ollama.go_template(ollama.reference(model.path)) if self.template == "go" else None
        file = job.out / f"model-{self.weights}.gguf"
        gguf.write(model.path, file, self.weights, self._name(model), job.progress)
        commands = modelfile.commands(model.path, file.name, template=template.text if template else None)
        (job.out / "Modelfile").write_text(modelfile.write(commands), "utf-8")
        proved = template.as_json() if template else {}
        return {"bytes": file.stat().st_size, "weights": gguf.verify(model.path, file), "template": proved}

    def _describe(self, job: Job, model: Artifact) -> None:
        """Lineage, model card, and the bill of materials if one is wanted."""
        steps, name = lineage.walk(model), self._name(model)
        used = lineage.installed((*self.libraries, "suite"))
        described = {"artifacts": [step.as_json() for step in steps], "exported_with": used}
        write_json(job.out / "lineage.json", described)
        ollama_, adapter = self.to == "ollama", model.type == "adapter"
        use = OLLAMA_USE if ollama_ else ADAPTER_USE if adapter else HF_USE
        text = card.Card(
            name=name,
            subject=model,
            steps=steps,
            use=use.format(name=name),
            library="gguf" if ollama_ else "peft" if adapter else "transformers",
            license=self.license,
            license_name=self.license_name,
            license_link=self.license_link,
            base_model=self.base_model,
            root=lineage.root(steps),
            quantized=model.type == "quantized" or (ollama_ and self.weights not in ("f32", "f16", "bf16")),
            description=self.description,
            languages=self.languages,
            datasets=self.datasets,
            tags=["gguf", "ollama"] if ollama_ else [],
            reports=job.inputs.get("reports", []),
        ).text()
        (job.out / "README.md").write_text(text, "utf-8")
        if self.sbom:
            from export import sbom

            files = {file.name: hf.sha256(file) for file in job.out.iterdir() if file.is_file()}
            sbom.write(job.out, name, self.license, steps, files, used)

    def _name(self, model: Artifact) -> str:
        return (
            self.name or hub.parts(self.push)[1] or re.sub(r"[^A-Za-z0-9._-]+", "-", model.name).strip("-") or "model"
        )


def _check_ollama(model: Artifact) -> None:
    if model.type == "quantized":
        raise SuiteError(
            "a quantized model cannot be exported to Ollama, which quantizes itself",
            where=model.name,
            hint="give it the model that this one was made from, and weights = 'q8_0' for 8 bits",
        )
    if model.type == "adapter":
        raise SuiteError(
            "an adapter alone cannot be exported to Ollama",
            where=model.name,
            hint="put a merge stage between them, and export that",
        )
    gguf.Model.read(model.path)
    ollama.check(model.path)
    tokenizer = read_json(model.path / "tokenizer.json")
    if not tokenizer["model"].get("byte_fallback"):
        pre_tokenizer(tokenizer, model.path)
