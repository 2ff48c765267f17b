"""What a stage is: settings, what it takes, what it makes, and `run()`; and the table of all kinds.

A stage turns artifacts into one artifact, in a process of its own (`suite.worker`). Kinds are named by strings and
imported when used, so the command starts fast; the module of a kind imports torch inside `run()` only.
"""

from __future__ import annotations

import importlib
import json
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from suite.config import ArtifactType, Config, Launch, Takes, marker
from suite.errors import SuiteError, near

RECORD = "artifact.json"

# where each kind lives; imported when used
KINDS: dict[str, str] = {
    "pretrain": "suite.train.pretrain:Pretrain",
    "train": "suite.train.stage:Train",
    "merge": "export.merge:Merge",
    "quantize": "export.quantize:Quantize",
    "export": "export.package:Export",
    "download": "export.hub.download:Download",
    "push": "export.hub.push:Push",
    "eval": "suite.evaluate:Evaluate",
}


@dataclass(frozen=True)
class Artifact:
    """A finished directory (or a data file), and what is known of it.

    `digest` is the hash of its content; `record` is its artifact.json: key, kind, type, settings, inputs, metrics,
    files, libraries. A folder that no stage of ours made has an empty record.
    """

    path: Path
    type: ArtifactType
    digest: str = ""

    @cached_property
    def record(self) -> dict[str, Any]:
        file = self.path / RECORD
        return json.loads(file.read_text("utf-8")) if file.is_file() else {}

    @property
    def metrics(self) -> dict[str, Any]:
        """What the stage that made this measured, e.g. `{"parity": {"kl": 1e-5}}`; empty for a foreign folder."""
        return dict(self.record.get("metrics", {}))

    @property
    def name(self) -> str:
        """What to call it in front of people: the stage's name, or the folder's."""
        return str(self.record.get("name") or (self.path.parent.name if self.path.name == "model" else self.path.name))

    def input(self, field: str) -> Artifact | None:
        """The artifact this one was made from under `field`, if it was recorded and still exists."""
        for made_from in self.record.get("inputs", {}).get(field, ()):
            if Path(made_from["path"]).exists():
                return Artifact(Path(made_from["path"]), made_from["type"], made_from["digest"])
        return None


Emit = Callable[[dict[str, Any]], None]


@dataclass
class Job:
    """What a running stage is given: its inputs, a directory to fill, and a way to say how far it is.

    `out` may hold what an earlier attempt with the same key left there (checkpoints): continue from it.
    `scratch` is beside it, survives a crash too, and is not part of the artifact. `pythons` are the interpreters of the
    environments that the stage asked for, by name.
    """

    name: str
    inputs: Mapping[str, list[Artifact]]
    out: Path
    scratch: Path
    emit: Emit = field(default=lambda _: None)
    pythons: Mapping[str, Path] = field(default_factory=dict)
    _last: float = 0.0

    def input(self, name: str) -> Artifact:
        """The one artifact under field `name`."""
        return self.inputs[name][0]

    def optional(self, name: str) -> Artifact | None:
        """The artifact under field `name`, or None when the field was left out."""
        return next(iter(self.inputs.get(name, ())), None)

    def progress(self, step: float, total: float, what: str = "", **values: float) -> None:
        """Report `step` of `total` with values such as loss or tokens_per_s; calls within 50 ms are folded."""
        now = time.monotonic()
        if step < total and now - self._last < 0.05:
            return
        self._last = now
        self.emit({"event": "progress", "step": step, "total": total, "what": what, "values": values})

    def say(self, text: str) -> None:
        """One line a person should see, e.g. '3 of 999 rows left out: no answer'."""
        self.emit({"event": "say", "text": text})

    def warn(self, text: str) -> None:
        """Like `say`, for what may be a mistake; repeated in the report."""
        self.emit({"event": "warn", "text": text})


class Stage(Config):
    """Base class of every kind.

    Fields marked with `Takes` hold references: `@stage`, a path, or a list of them. At run time their content is in
    `job.inputs`, by field name; the strings in the settings then mean nothing any more.
    """

    version: ClassVar[int] = 1
    """Raise it when the same settings and inputs would now give another result."""
    libraries: ClassVar[tuple[str, ...]] = ()
    """Distributions whose installed versions decide the result; they enter the cache key."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Distributions that do so where they are installed, and are not needed."""
    preload: ClassVar[tuple[str, ...]] = ()
    """Modules that the warm server imports once, before it forks a process for this stage."""

    @abstractmethod
    def makes(self) -> ArtifactType:
        """The type of the artifact that these settings give."""

    def check(self, inputs: Mapping[str, list[Artifact | None]]) -> None:
        """Raise SuiteError for what is wrong before anything runs; torch-free, within milliseconds.

        An input is None while the stage that makes it has not run.
        """

    def pinned(self) -> Stage:
        """These settings with everything decided that they leave to the world outside, such as what a branch holds.

        Asked once while planning. Raises SuiteError where it cannot be known.
        """
        return self

    def environments(self) -> tuple[str, ...]:
        """The names of the environments (`suite.envs`) whose interpreters these settings need beside ours."""
        return ()

    def check_in(self, pythons: Mapping[str, Path], inputs: Mapping[str, list[Artifact | None]]) -> None:
        """As `check`, for what programs of its environments refuse, whose interpreters are there by now.

        What was found to be in order is to be kept: a plan that is made again takes no seconds.
        """

    def target(self) -> str:
        """What this stage changes outside the store, e.g. "hf:org/name"; empty for all that only make their artifact.

        The store cannot know what became of it there. So a stage with a target runs each time and must see itself what
        is done already; and no two stages of a plan may share one.
        """
        return ""

    def followers(self) -> dict[str, tuple[str, Stage]]:
        """Stages that a setting of this one asks for, by suffix: `{"push": ("package", Push(...))}` becomes the stage
        `<name>.push`, which takes this one's artifact in its field `package`."""
        return {}

    @abstractmethod
    def run(self, job: Job) -> dict[str, Any]:
        """Fill `job.out`; return the metrics to store with the artifact (JSON values only)."""

    @classmethod
    def takes(cls) -> dict[str, Takes]:
        """Which fields hold references, and to what."""
        found = {name: marker(info, Takes) for name, info in cls.model_fields.items()}
        return {name: takes for name, takes in found.items() if takes}

    def accepts(self) -> dict[str, Takes]:
        """Like `takes`, narrowed by what these settings allow."""
        return self.takes()

    def references(self) -> dict[str, list[str]]:
        """The references in these settings by field; fields left out are absent."""
        values = {name: getattr(self, name) for name in self.takes()}
        return {n: v if isinstance(v, list) else [v] for n, v in values.items() if v is not None}

    def recipe(self) -> dict[str, Any]:
        """The settings that decide the result: all but references and launch settings."""
        skip = {*self.takes(), *(n for n, f in type(self).model_fields.items() if marker(f, Launch))}
        return {k: v for k, v in self.model_dump(mode="json").items() if k not in skip}

    def work(self) -> dict[str, Any]:
        """What of the recipe must be the same for a run to continue what another left; all of it as a rule."""
        return self.recipe()


def kind(name: str) -> type[Stage]:
    """The class of a stage kind: a name in KINDS, or a person's own as `package.module:Class`; raises SuiteError."""
    if name not in KINDS and ":" not in name:
        raise SuiteError(f"unknown stage kind '{name}'", hint=near(name, KINDS))
    module, _, attribute = KINDS.get(name, name).partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise SuiteError(
            f"stage kind '{name}' cannot be imported: {error}", hint="its module must be on PYTHONPATH"
        ) from None
    if not (isinstance(found, type) and issubclass(found, Stage)):
        raise SuiteError(f"'{name}' is no stage", hint="it must be a subclass of suite.stages.Stage")
    return found


def kind_name(stage: Stage) -> str:
    """The name under which `kind` finds a stage's class."""
    path = f"{type(stage).__module__}:{type(stage).__qualname__}"
    return next((name for name, listed in KINDS.items() if listed == path), path)
