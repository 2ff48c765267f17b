"""README.md of a published folder: a model card with the metadata that hubs read, and where everything came from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from export.package.lineage import Step
from suite.errors import SuiteError, near
from suite.stages import Artifact

_LISTED = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0
eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community h-research
intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit
mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openmdw-1.1 openrail openrail++ osl-3.0 other pddl postgresql
unknown unlicense wtfpl zlib
"""
LICENSES = frozenset(_LISTED.split())
"""What huggingface.co/docs/hub/repositories-licenses lists; the hub refuses cards with another."""
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|code|multilingual")
Relation = Literal["finetune", "adapter", "quantized", "merge"]


@dataclass(frozen=True)
class Card:
    """What a card says; `use` is Markdown that shows how to load it, `library` what loads it.

    `root` names the model that everything began with, where `base_model`, its name on the hub, is not given;
    `run_by_llamacpp` is the parity of a GGUF file.
    """

    name: str
    subject: Artifact
    steps: Sequence[Step]
    use: str
    library: Literal["transformers", "peft", "gguf"] = "transformers"
    license: str = ""
    license_name: str = ""
    license_link: str = ""
    base_model: str = ""
    root: str = ""
    quantized: bool = False
    description: str = ""
    languages: Sequence[str] = ()
    datasets: Sequence[str] = ()
    tags: Sequence[str] = ()
    reports: Sequence[Artifact] = field(default_factory=list)
    run_by_llamacpp: Mapping[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """The whole file; the same for the same lineage. Raises SuiteError when huggingface_hub cannot read it back."""
        from huggingface_hub import ModelCard, ModelCardData

        scores = _scores(self.reports)
        data = ModelCardData(
            base_model=self.base_model or None,
            base_model_relation=self.relation() if self.base_model else None,
            license=self.license or None,
            license_name=self.license_name or None,
            license_link=self.license_link or None,
            language=list(self.languages) or None,
            library_name=self.library,
            pipeline_tag="text-generation",
            datasets=list(self.datasets) or None,
            tags=self._tags() or None,
            model_name=self.name if scores else None,
            eval_results=[_result(*score) for score in scores] or None,
        )
        parts = [
            f"---\n{data.to_yaml()}\n---\n\n# {self.name}\n",
            f"{self.description.strip()}\n" if self.description else "",
            self._origin(),
            f"## Use\n\n{self.use.strip()}\n",
            _score_table(scores),
            self._parity(),
            self._training(),
            self._lineage(),
        ]
        text = "\n".join(part for part in parts if part)
        if ModelCard(text).data.to_yaml() != data.to_yaml():
            raise SuiteError("the model card's metadata is not read as it was written", where="README.md")
        return text

    def relation(self) -> Relation:
        """How the model comes from its base, in the hub's words.

        What was tuned is a finetune of the base, also when it is stored quantized: a `quantized` one would claim to
        answer as the base does.
        """
        if self.subject.type == "adapter":
            return "adapter"
        adapters = {digest for step in self.steps for digest in step.inputs.get("adapter", ()) if step.kind == "merge"}
        if len(adapters) > 1:
            return "merge"
        tuned = any(step.kind == "train" or step.type == "adapter" for step in self.steps)
        return "quantized" if self.quantized and not tuned else "finetune"

    def _tags(self) -> list[str]:
        lora = any(step.type == "adapter" for step in self.steps)
        methods = [str(step.settings.get("method")) for step in self.steps if step.kind == "quantize"]
        return sorted({*self.tags, *(["lora"] if lora else []), *methods})

    def _origin(self) -> str:
        base = f"Base model: `{name}`. " if (name := self.base_model or self.root) else ""
        datasets = [step.name for step in self.steps if step.type == "dataset"]
        data = f"Data: {', '.join(f'`{name}`' for name in dict.fromkeys(datasets))}." if datasets else ""
        return f"{base}{data}\n" if base or data else ""

    def _parity(self) -> str:
        made, run = self.subject.metrics.get("parity"), self.run_by_llamacpp
        parts = [f"Measured on fixed probes when it was made: {_compared(made)}\n" if made else ""]
        if run:
            parts.append(f"The GGUF file, run by llama.cpp, against that model: {_compared(run)}\n")
        text = "\n".join(part for part in parts if part)
        return f"## Against its parent\n\n{text}" if text else ""

    def _training(self) -> str:
        rows = []
        for step in self.steps:
            if step.kind and step.settings:
                settings = ", ".join(
                    f"{key} {_plain(value)}" for key, value in step.settings.items() if value not in ({}, [])
                )
                rows.append(f"- **{step.kind}** ({step.name}): {settings}")
        return "## Settings\n\n" + "\n".join(rows) + "\n" if rows else ""

    def _lineage(self) -> str:
        rows = [
            f"| {step.name} | {step.kind or step.type} | `{step.key[:12] or '-'}` | `{step.digest[:12] or '-'}` |"
            for step in self.steps
        ]
        libraries = {name: version for step in self.steps for name, version in step.libraries.items()}
        named = ((name, version) for name, version in sorted(libraries.items()) if not name.startswith("env."))
        versions = ", ".join(f"{name} {version}" for name, version in named)
        table = "\n".join(["| artifact | made by | key | content |", "|---|---|---|---|", *rows])
        text = f"## Lineage\n\n{table}\n\nFull keys and digests are in `lineage.json`.\n"
        return text + (f"\nMade with {versions}.\n" if versions else "")


Score = tuple[str, str, float, dict[str, Any]]
"""Question set, metric, value, and the set's other numbers."""
HEADLINES = {"acc": "accuracy", "rougeL": "rougeL", "bleu": "bleu", "ppl": "perplexity"}


def _compared(parity: Mapping[str, Any]) -> str:
    return (
        f"mean KL {parity['kl']:.2g} nats a token, the same next token at {parity['top1']:.1%} of positions, "
        f"largest logit difference {parity['max_dlogit']:.2g}, perplexity {parity['ppl_child']:.2f} "
        f"(parent {parity['ppl_parent']:.2f})."
    )


def _scores(reports: Iterable[Artifact]) -> list[Score]:
    found = []
    for report in reports:
        for name, values in report.metrics.items():
            if isinstance(values, dict):
                for key, metric in HEADLINES.items():
                    if isinstance(values.get(key), int | float):
                        found.append((name, metric, float(values[key]), values))
    return found


def _result(dataset: str, metric: str, value: float, _: dict[str, Any]) -> Any:
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type="text-generation",
        dataset_type=dataset,
        dataset_name=dataset,
        metric_type=metric,
        metric_value=round(value, 4),
    )


def _score_table(scores: Sequence[Score]) -> str:
    if not scores:
        return ""
    rows = ["| questions | metric | score | 95 % interval |", "|---|---|---|---|"]
    for dataset, metric, value, values in scores:
        known = metric == "accuracy" and "low" in values and "high" in values
        interval = f"{values['low']:.3f} to {values['high']:.3f}" if known else ""
        rows.append(f"| {dataset} | {metric} | {value:.3f} | {interval} |")
    return "## Scores\n\nMeasured through the served endpoint.\n\n" + "\n".join(rows) + "\n"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def check(
    *,
    license: str,
    license_name: str,
    license_link: str,
    base_model: str,
    languages: Iterable[str],
    datasets: Iterable[str],
) -> None:
    """Raise SuiteError, with the setting as its place, for metadata that the hub would refuse or misread."""
    if license and license not in LICENSES:
        hint = f'{near(license, sorted(LICENSES))}; any else: license = "other", license_name and license_link'
        raise SuiteError(f"the hub knows no licence '{license}'", where="license", hint=hint)
    if (license == "other") != bool(license_name):
        missing = "needs a license_name" if license == "other" else 'goes with license = "other" only'
        where = "license" if license == "other" else "license_name"
        raise SuiteError(f"{license!r} {missing}" if license else f"license_name {missing}", where=where)
    if license_link and not (license_link == "LICENSE" or license_link.startswith("https://")):
        raise SuiteError("must be an https:// address, or LICENSE, a file of the folder", where="license_link")
    for field_name, names in (("base_model", [base_model] if base_model else []), ("datasets", datasets)):
        for name in names:
            if not REPOSITORY.fullmatch(name):
                raise SuiteError(f"'{name}' is no name on the hub", where=field_name, hint='e.g. "org/name"')
    for code in languages:
        if not LANGUAGE.fullmatch(code):
            raise SuiteError(f"'{code}' is no language code", where="languages", hint='ISO 639: "en", "zh", "yue"')
