"""Small stage kinds for tests of the pipeline, the runner and the store; no torch, made in milliseconds."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from suite.config import ArtifactType, Config, Launch, ModelRef, Takes
from suite.errors import SuiteError
from suite.stages import Artifact, Job, Stage


class Inner(Config):
    """A table inside the settings."""

    rank: int = Field(4, ge=1)
    """Inner width."""
    name: str = "x"
    """A name."""


class Make(Stage):
    """Writes a file; the start of every chain."""

    text: str = "hello"
    """What to write."""
    data: Annotated[str | None, Takes("dataset")] = None
    """A file to copy."""
    inner: Inner = Inner()
    """A table."""
    score: float = 0.5
    """What to claim as measured."""
    threads: Annotated[int, Launch()] = 1
    """How to run; not part of the result."""

    def makes(self) -> ArtifactType:
        return "model"

    def check(self, inputs: Mapping[str, list[Artifact | None]]) -> None:
        if self.text == "refused":
            raise SuiteError("this text is refused", where="text", hint="write another")

    def run(self, job: Job) -> dict[str, Any]:
        (job.out / "config.json").write_text(f'{{"text": "{self.text}", "rank": {self.inner.rank}}}')
        if data := job.optional("data"):
            (job.out / "data").write_bytes(data.path.read_bytes())
        job.progress(1, 1, "writing", loss=0.5)
        return {"quality": {"score": self.score}}


class Tune(Stage):
    """Makes an adapter of a model, in steps that survive a crash; it can be told to die."""

    base: ModelRef
    """The model."""
    steps: int = 3
    """How many steps."""
    most: int = 99
    """Steps beyond which the result is refused."""
    die_at: Annotated[int | None, Launch()] = None
    """Step at which the process kills itself, the first time."""
    fail: Annotated[str, Launch()] = ""
    """Raise this message."""
    seconds: Annotated[float, Launch()] = 0.0
    """How long a step takes."""

    def makes(self) -> ArtifactType:
        return "adapter"

    def work(self) -> dict[str, Any]:
        return {key: value for key, value in self.recipe().items() if key != "most"}

    def run(self, job: Job) -> dict[str, Any]:
        if self.fail:
            raise RuntimeError(self.fail)
        state = job.scratch / "steps"
        done = state.read_text().split() if state.exists() else []
        for step in range(len(done), self.steps):
            if step == self.die_at and not (job.scratch / "died").exists():
                (job.scratch / "died").write_text("once")
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(self.seconds)
            done.append(f"{step}")
            state.write_text(" ".join(done))
            job.progress(step + 1, self.steps, "tune")
        if len(done) > self.most:
            raise RuntimeError("too many steps")
        (job.out / "adapter_config.json").write_text('{"steps": "' + " ".join(done) + '"}')
        if (job.scratch / "died").exists():
            job.warn("died once")
        return {"steps": len(done)}


class Fold(Stage):
    """Takes an adapter, makes a model."""

    adapter: Annotated[str, Takes("adapter")]
    """The adapter."""

    def makes(self) -> ArtifactType:
        return "model"

    def run(self, job: Job) -> dict[str, Any]:
        (job.out / "config.json").write_bytes((job.input("adapter").path / "adapter_config.json").read_bytes())
        return {"parity": {"kl": 0.0}}


class Meet(Stage):
    """Ends only when another stage of this kind runs at the same time."""

    place: str
    """A directory of both."""
    name: str
    """What this one is called."""
    other: str
    """What the other is called."""

    def makes(self) -> ArtifactType:
        return "model"

    def run(self, job: Job) -> dict[str, Any]:
        Path(self.place, self.name).touch()
        deadline = time.monotonic() + 20
        while not Path(self.place, self.other).exists():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.other} never came")
            time.sleep(0.005)
        (job.out / "config.json").write_text("{}")
        return {}


class Pack(Stage):
    """Takes any number of models."""

    models: Annotated[list[str], Takes("model", "quantized")]
    """The models."""

    def makes(self) -> ArtifactType:
        return "package"

    def run(self, job: Job) -> dict[str, Any]:
        for number, model in enumerate(job.inputs["models"]):
            (job.out / f"{number}.json").write_bytes((model.path / "config.json").read_bytes())
        return {}


def pipeline_file(folder: Path, text: str) -> Path:
    """A pipeline file whose `make`, `tune`, `fold`, `meet`, `pack` stand for the kinds above."""
    file = folder / "pipeline.toml"
    for name in ("make", "tune", "fold", "meet", "pack"):
        text = text.replace(f'use = "{name}"', f'use = "tests.unit.kinds:{name.capitalize()}"')
        text = text.replace(f"[defaults.{name}]", f'[defaults."tests.unit.kinds:{name.capitalize()}"]')
    file.write_text(text, "utf-8")
    return file
