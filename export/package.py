"""The `export` stage: an artifact as others take it, a folder for a model hub or for Ollama."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from export import gguf, hf, lineage, ollama
from export.card import Card
from export.folder import read_config, read_json, write_json
from export.gguf_tokenizer import pre_tokenizer
from suite.config import ArtifactType, Takes
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
    base_model: str = ""
    """The base's name on the hub, e.g. "Qwen/Qwen3-0.6B"; left out: the name of its folder."""
    description: str = ""
    """A paragraph for the model card."""
    languages: list[str] = Field(default_factory=list)
    """Languages, as codes: ["en", "zh"]."""
    reports: list[Annotated[str, Takes("report")]] = Field(default_factory=list)
    """Evaluations whose scores go into the model card, e.g. ["@eval"]."""

    def makes(self) -> ArtifactType:
        """A package."""
        return "package"

    def accepts(self) -> dict[str, Takes]:
        """Ollama quantizes itself and takes no adapter of this form: it gets the merged model."""
        narrowed = {"model": Takes("model")} if self.to == "ollama" else {}
        return {**self.takes(), **narrowed}

    def check(self, inputs: Mapping[str, list[Artifact | None]]) -> None:
        """Whether the artifact can be exported so, from its configuration and tokenizer."""
        model = next(iter(inputs.get("model", ())), None)
        if model is None:
            return
        if self.to == "ollama":
            _check_ollama(model)
        elif model.type == "adapter":
            read_json(model.path / "adapter_config.json")
        else:
            read_config(model.path)

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
        steps = lineage.walk(model)
        write_json(job.out / "lineage.json", {"artifacts": [step.as_json() for step in steps]})
        (job.out / "README.md").write_text(self._card(job, model, steps).text(), "utf-8")
        hf.write_checksums(job.out)
        return metrics

    def _ollama(self, job: Job, model: Artifact) -> dict[str, Any]:
        render = ollama.jinja(model.path)
        template = ollama.derive(render) if self.template == "go" else None
        file = job.out / f"model-{self.weights}.gguf"
        gguf.write(model.path, file, self.weights, self._name(model), job.progress)
        text = ollama.modelfile(model.path, file.name, template)
        (job.out / "Modelfile").write_text(text, "utf-8")
        proved = {"dialogues": len(ollama.dialogues())} if template is not None else {}
        return {"bytes": file.stat().st_size, "weights": gguf.verify(model.path, file), "template": proved}

    def _card(self, job: Job, model: Artifact, steps: list[lineage.Step]) -> Card:
        name = self._name(model)
        use = OLLAMA_USE if self.to == "ollama" else ADAPTER_USE if model.type == "adapter" else HF_USE
        return Card(
            name=name,
            subject=model,
            steps=steps,
            use=use.format(name=name),
            license=self.license,
            base_model=self.base_model or lineage.root(steps),
            description=self.description,
            languages=self.languages,
            tags=["gguf", "ollama"] if self.to == "ollama" else [],
            reports=job.inputs.get("reports", []),
        )

    def _name(self, model: Artifact) -> str:
        return self.name or re.sub(r"[^A-Za-z0-9._-]+", "-", model.name).strip("-") or "model"


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
