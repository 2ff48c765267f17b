"""README.md of a published folder: a model card with the metadata that hubs read, and where everything came from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from export.lineage import Step
from suite.stages import Artifact

RELATION = {"model": "finetune", "adapter": "adapter", "quantized": "quantized"}


@dataclass(frozen=True)
class Card:
    """What a card says; `use` is Markdown that shows how to load it."""

    name: str
    subject: Artifact
    steps: Sequence[Step]
    use: str
    license: str = ""
    base_model: str = ""
    description: str = ""
    languages: Sequence[str] = ()
    tags: Sequence[str] = ()
    reports: Sequence[Artifact] = field(default_factory=list)

    def text(self) -> str:
        """The whole file; the same for the same lineage."""
        from huggingface_hub import ModelCardData

        kinds = [step.kind for step in self.steps]
        scores = _scores(self.reports)
        data = ModelCardData(
            base_model=self.base_model or None,
            base_model_relation=RELATION[self.subject.type] if self.base_model else None,
            license=self.license or None,
            language=list(self.languages) or None,
            library_name="peft" if self.subject.type == "adapter" else "transformers",
            pipeline_tag="text-generation",
            datasets=None,
            tags=sorted({*self.tags, *(["lora"] if "train" in kinds else [])}) or None,
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
        return "\n".join(part for part in parts if part)

    def _origin(self) -> str:
        base = f"Base model: `{self.base_model}`. " if self.base_model else ""
        datasets = [step.name for step in self.steps if step.type == "dataset"]
        data = f"Data: {', '.join(f'`{name}`' for name in dict.fromkeys(datasets))}." if datasets else ""
        return f"{base}{data}\n" if base or data else ""

    def _parity(self) -> str:
        parity = self.subject.metrics.get("parity")
        if not parity:
            return ""
        return (
            "## Against its parent\n\n"
            f"Measured on fixed probes when it was made: mean KL {parity['kl']:.2g} nats a token, "
            f"the same next token at {parity['top1']:.1%} of positions, largest logit difference "
            f"{parity['max_dlogit']:.2g}, perplexity {parity['ppl_child']:.2f} (parent {parity['ppl_parent']:.2f}).\n"
        )

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
        libraries = {name: version for step in self.steps for name, version in (step.libraries or {}).items()}
        versions = ", ".join(f"{name} {version}" for name, version in sorted(libraries.items()))
        table = "\n".join(["| artifact | made by | key | content |", "|---|---|---|---|", *rows])
        text = f"## Lineage\n\n{table}\n\nFull keys and digests are in `lineage.json`.\n"
        return text + (f"\nMade with {versions}.\n" if versions else "")


Score = tuple[str, str, float, dict[str, Any]]
"""Question set, metric, value, and the set's other numbers."""
HEADLINES = {"acc": "accuracy", "rougeL": "rougeL", "bleu": "bleu", "ppl": "perplexity"}


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
