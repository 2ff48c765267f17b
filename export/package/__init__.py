"""The `export` stage: an artifact as others take it: a folder for a model hub, a GGUF file, a package for Ollama."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from export import hf, hub, ollama
from export.ends import ends
from export.folder import read_config, read_json, write_json
from export.gguf import adapter as gguf_adapter
from export.gguf import llamacpp
from export.gguf.model import Model
from export.gguf.tokenizer import chat_template
from export.hub.push import Push
from export.merge import base_of
from export.ollama import modelfile
from export.ollama import server as ollama_server
from export.ollama.create import Create
from export.package import card, lineage
from suite import quantized
from suite.chat import Chat
from suite.config import ArtifactType, Config, Launch, ModelRef, Takes
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
UNREAD_USE = """It has UNREAD, which plain transformers does not read; GPTQModel does:

```python
from gptqmodel import GPTQModel

model = GPTQModel.load("{name}")
chat = [{{"role": "user", "content": "Hi"}}]
ids = model.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False, return_tensors="pt")
print(model.tokenizer.decode(model.generate(ids.to(model.device), max_new_tokens=64)[0]))
```"""
ADAPTER_USE = """```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{name}", dtype="auto", device_map="auto")
```"""
GGUF_USE = """```sh
llama-server -m {file}{lora}
```"""
OLLAMA_USE = """```sh
ollama create {name} -f Modelfile
ollama run {name}
```"""
ADAPTER_FILE = "adapter.gguf"


class Message(Config):
    """A turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    """Who speaks."""
    content: str
    """What is said."""


class Export(Stage):
    """Write a folder ready to publish (`hf`), a GGUF file for llama.cpp (`gguf`), or one with a Modelfile (`ollama`).

    Weights are proved equal to the artifact's, and a GGUF by what llama.cpp makes of it, where that is installed; the
    Ollama template is proved to give the same prompts as the model's own. An adapter is written unmerged, for `gguf`
    and `ollama` with its base beside it. The model card names base, data, settings, scores, keys and versions.
    """

    version: ClassVar[int] = 4
    libraries: ClassVar[tuple[str, ...]] = ("transformers", "huggingface_hub", "gguf")
    optional: ClassVar[tuple[str, ...]] = ("llama-cpp-python",)
    preload: ClassVar[tuple[str, ...]] = ("torch", "transformers")

    model: Annotated[str, Takes("model", "quantized", "adapter")]
    """What to export, e.g. "@merge"."""
    to: Literal["hf", "gguf", "ollama"] = "hf"
    """For whom: a hub folder, llama.cpp, or Ollama."""
    weights: llamacpp.Weights = "f16"
    """gguf, ollama: the type of the weights; q6_k to q2_k are made by llama.cpp."""
    base: ModelRef | None = None
    """gguf, ollama: the model that an adapter was trained on; left out: the one that its training recorded."""
    template: Literal["go", "jinja"] = "go"
    """ollama: write a Go template that is proved equal, or leave it to Ollama to render the model's Jinja."""
    unequal: ollama.Unequal = "stop"
    """ollama: stop where the Go template gives another prompt for a probe dialogue, or warn of each and go on."""
    system: str = ""
    """ollama: a system text for conversations that bring none."""
    messages: list[Message] = Field(default_factory=list)
    """ollama: turns that stand before every conversation, e.g. [{role = "user", content = "Hi"}]."""
    context: int | None = Field(None, ge=1)
    """ollama: tokens of the context; left out: the model's, at most 8192."""
    create: Annotated[bool, Launch()] = False
    """ollama: make the model with the `ollama` command afterwards, and ask it a question."""
    name: str = Field("", pattern=r"^[A-Za-z0-9._/-]*$")
    """What to call it; left out: the artifact's name."""
    license: str = ""
    """Its licence, as hubs name it: "apache-2.0", "mit", "other"."""
    license_name: str = ""
    """The name of an "other" licence, e.g. "qwen-research"."""
    license_link: str = ""
    """Where an "other" licence can be read: an https:// address, or LICENSE for the file in the model's folder."""
    base_model: str = ""
    """The base's name on the hub, e.g. "Qwen/Qwen3-0.6B"; left out: where it was downloaded from, or in the text only
    the name of its folder."""
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
        """llama.cpp quantizes by its own methods, from the whole weights."""
        narrowed = {} if self.to == "hf" else {"model": Takes("model", "adapter")}
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
        if self.create and self.to != "ollama":
            raise SuiteError(
                "only a package for Ollama can be made a model there", where="create", hint='to = "ollama"'
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
        if self.to != "hf":
            self._check_gguf(model, next(iter(inputs.get("base", ())), None))
        elif model.type == "adapter":
            read_json(model.path / "adapter_config.json")
        else:
            read_config(model.path)

    def _check_gguf(self, model: Artifact, base: Artifact | None) -> None:
        whole = model
        if model.type == "adapter":
            whole = base_of([model], base)
            gguf_adapter.check(model.path, whole.path)
            own, its = chat_template(model.path), chat_template(whole.path)
            if own and own != its and (self.to, self.template) != ("ollama", "go"):
                raise SuiteError(
                    "the adapter has a chat template of its own, and the GGUF of its base carries the base's",
                    where=str(model.path),
                    hint="merge them, and export that",
                )
        llamacpp.check(whole.path, self.weights)
        if self.to == "ollama":
            ollama.check(_speaker(model, whole))

    def followers(self) -> dict[str, tuple[str, Stage]]:
        """What changes something elsewhere is a stage of its own: it must run also when the package is made already."""
        found: dict[str, tuple[str, Stage]] = {}
        if self.create:
            found["create"] = ("package", Create(package="@", name=self.name))
        if self.push:
            found["push"] = ("package", self._push())
        return found

    def _push(self) -> Push:
        return Push(package="@", to=self.push, public=self.public)

    def run(self, job: Job) -> dict[str, Any]:
        """Write the folder; returns sizes and what was proved."""
        model = job.input("model")
        notes = list[str]()
        if self.to != "hf":
            metrics, notes = self._gguf(job, model)
            use = OLLAMA_USE if self.to == "ollama" else GGUF_USE
        elif model.type == "adapter":
            base = self.base_model or lineage.at_hugging_face(lineage.walk(model))
            metrics = hf.write_adapter(model.path, job.out, base, job.progress)
            use = ADAPTER_USE
        else:
            metrics = hf.write_model(model.path, job.out, job.progress)
            unread = quantized.unread(model.path)
            use = UNREAD_USE.replace("UNREAD", unread) if unread else HF_USE
        lora = f" --lora {ADAPTER_FILE}" if model.type == "adapter" else ""
        lines = [use.format(name=self._name(model), file=self._file(), lora=lora), *(f"- {note}" for note in notes)]
        self._describe(job, model, "\n\n".join(lines), metrics.get("llamacpp", {}).get("parity", {}))
        hf.write_checksums(job.out)
        return {"name": self._name(model), **metrics}

    def _gguf(self, job: Job, model: Artifact) -> tuple[dict[str, Any], list[str]]:
        """The GGUF, an adapter's beside it, and the Modelfile; returns metrics, and notes for the card."""
        adapter = model.type == "adapter"
        whole = base_of([model], job.optional("base")) if adapter else model
        file, name = job.out / self._file(), self._name(model)
        metrics = llamacpp.write(whole.path, file, self.weights, name, job.scratch, job.progress, job.warn)
        if adapter:
            own = job.out / ADAPTER_FILE
            gguf_adapter.write(model.path, whole.path, own, name, job.progress)
            metrics["adapter"] = gguf_adapter.verify(
                model.path, whole.path, own, file, self.weights, job.progress, job.warn
            )
        if self.to == "gguf":
            return metrics, []
        speaker = _speaker(model, whole)
        reference = ollama.reference(speaker)
        template = ollama.go_template(reference, self.unequal) if self.template == "go" else None
        notes = ollama.notes(speaker, template)
        messages = [message.model_dump() for message in self.messages]
        commands = modelfile.commands(
            whole.path,
            file.name,
            stops=filter(None, ends(whole.path, speaker).values()),
            longest=Model.read(whole.path).context,
            template=template.text if template else None,
            adapter=ADAPTER_FILE if adapter else "",
            system=self.system,
            messages=messages,
            license_name=self.license_name or self.license,
            context=self.context,
        )
        (job.out / "Modelfile").write_text(modelfile.write(commands, notes), "utf-8")
        for dialogue in template.differs if template else ():
            job.warn(f"the Go template gives another prompt for: {dialogue}")
        system = [{"role": "system", "content": self.system}] if self.system else []
        asked = ollama_server.prompt_tokens(Chat.load(speaker), [*system, *messages])
        proved = template.as_json() if template else {}
        return {**metrics, "template": proved, "prompt_tokens": asked}, notes

    def _file(self) -> str:
        return f"model-{self.weights}.gguf"

    def _describe(self, job: Job, model: Artifact, use: str, run_by_llamacpp: Mapping[str, Any]) -> None:
        """Lineage, model card, and the bill of materials if one is wanted."""
        steps, name = lineage.walk(model), self._name(model)
        used = lineage.installed((*self.libraries, *self.optional, "suite"))
        described = {"artifacts": [step.as_json() for step in steps], "exported_with": used}
        write_json(job.out / "lineage.json", described)
        text = card.Card(
            name=name,
            subject=model,
            steps=steps,
            use=use,
            library="gguf" if self.to != "hf" else "peft" if model.type == "adapter" else "transformers",
            license=self.license,
            license_name=self.license_name,
            license_link=self.license_link,
            base_model=self.base_model or lineage.at_hugging_face(steps),
            root=lineage.root(steps),
            quantized=model.type == "quantized" or (self.to != "hf" and self.weights not in ("f32", "f16", "bf16")),
            description=self.description,
            languages=self.languages,
            datasets=self.datasets,
            tags={"hf": [], "gguf": ["gguf"], "ollama": ["gguf", "ollama"]}[self.to],
            reports=job.inputs.get("reports", []),
            run_by_llamacpp=run_by_llamacpp,
        ).text()
        (job.out / "README.md").write_text(text, "utf-8")
        if self.sbom:
            from export.package import sbom

            files = {file.name: hf.sha256(file) for file in job.out.iterdir() if file.is_file()}
            sbom.write(job.out, name, self.license, steps, files, used)

    def _name(self, model: Artifact) -> str:
        return (
            self.name or hub.parts(self.push)[1] or re.sub(r"[^A-Za-z0-9._-]+", "-", model.name).strip("-") or "model"
        )


def _speaker(model: Artifact, whole: Artifact) -> Path:
    """The folder whose tokenizer and template are in force: an adapter may have its own."""
    return model.path if chat_template(model.path) else whole.path
