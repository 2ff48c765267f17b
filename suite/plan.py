"""A checked pipeline: stages in an order, and where each one's inputs come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from suite import envs
from suite.config import Where
from suite.gate import Gate
from suite.references import External
from suite.serve_table import Serve
from suite.stages import Stage

Source = str | External
"""Where an input comes from: the name of a stage of this plan, or an artifact that exists already."""


@dataclass(frozen=True)
class Node:
    """One stage of a plan: its settings, where its inputs come from, and what must have passed before."""

    name: str
    stage: Stage
    inputs: dict[str, list[Source]]
    needs: tuple[str, ...]
    gates: tuple[Gate, ...]
    where: Where
    environments: Mapping[str, envs.Environment] = field(default_factory=dict)

    @property
    def after(self) -> set[str]:
        """Names of all stages that must be done first; gates are judged when this one is, so they may name it too."""
        read = (s for g in self.gates for s in g.stages if s != self.name)
        return {s for sources in self.inputs.values() for s in sources if isinstance(s, str)} | {*self.needs, *read}


@dataclass(frozen=True)
class Plan:
    """Stages in an order in which each comes after what it needs."""

    name: str
    file: Path | None
    text: str
    nodes: dict[str, Node]
    serve: Serve | None = None
    serve_sources: Mapping[tuple[str, ...], Source] | None = None
    """Where what `[serve]` names comes from, by its place there."""
