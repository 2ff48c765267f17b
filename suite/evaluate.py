"""The `eval` stage: start the served endpoint of an artifact, ask it over HTTP, score what it says.

What is evaluated is what users will talk to, with its server, its chat template and its adapters.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from evalsets import sets as question_sets
from evalsets.compare import compare
from suite.config import ArtifactType, Launch, ModelRef, Names, Takes
from suite.errors import StageFailed, SuiteError
from suite.stages import Artifact, Job, Stage

__all__ = ["DEFAULT_SETS", "Evaluate", "compare", "evaluate_url"]

DEFAULT_SETS = ["ceval-mini", "summaries", "perplexity"]


class Evaluate(Stage):
    """Score a model, a quantized model or an adapter through its served endpoint."""

    version: ClassVar[int] = 1
    libraries: ClassVar[tuple[str, ...]] = (
        "torch", "transformers", "rouge-score", "rouge-chinese", "jieba", "sacrebleu",
    )  # fmt: skip
    preload: ClassVar[tuple[str, ...]] = ("torch", "transformers", "serve.torch.engine", "serve.gateway")

    model: Annotated[str, Takes("model", "quantized", "adapter")]
    """What to evaluate; an adapter is served on its base and asked by its own name."""
    base: ModelRef | None = None
    """The model under an adapter; the one it was trained on when left out."""
    sets: Annotated[list[str], Names()] = DEFAULT_SETS
    """Question sets: names of shipped ones, or paths of folders with a set.toml."""
    limit: int | None = Field(default=None, ge=1)
    """Questions of each set, for a quick look; all when left out."""
    backend: str = "torch"
    """Engine that serves the artifact."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the served weights; auto is float32 on a CPU and what the artifact says on a GPU."""
    concurrency: Annotated[int, Launch()] = Field(default=16, ge=1)
    """Requests at the same time."""
    timeout: Annotated[float, Launch()] = Field(default=120.0, gt=0)
    """Seconds after which a question counts as failed."""
    max_failed: int = Field(default=0, ge=0)
    """Questions that may fail before the stage fails; they score 0 either way."""

    def makes(self) -> ArtifactType:
        return "report"

    def recipe(self) -> dict[str, Any]:
        """The settings, with the content of each set in place of where it lies."""
        return super().recipe() | {"sets": {s.name: s.digest for s in question_sets.load_all(self.sets)}}

    def environment(self) -> str:
        """The one of an engine that is another program's."""
        from serve.backends import BACKENDS

        return self.backend if self.backend != "torch" and BACKENDS.get(self.backend) else ""

    def check(self, inputs: Mapping[str, list[Artifact | None]]) -> None:
        from serve.backends import check_backend

        with _at("backend"):
            check_backend(self.backend)
        with _at("sets"):
            for asked in question_sets.load_all(self.sets):
                asked.questions(self.limit)
        subject = next(iter(inputs.get("model", ())), None)
        if subject is None:
            return
        if subject.type != "adapter" and self.base:
            hint = "base is what an adapter is served on; remove it"
            raise SuiteError(f"'{subject.name}' is no adapter", where="base", hint=hint)
        if subject.type == "adapter" and not self.base and subject.input("base") is None:
            hint = "give the model that it was trained on as 'base'"
            raise SuiteError(f"the adapter '{subject.name}' does not say where its base is", where="model", hint=hint)

    def run(self, job: Job) -> dict[str, Any]:
        from evalsets.ask import Client
        from evalsets.evaluation import evaluate
        from serve.backends import endpoint

        subject = job.input("model")
        model, adapters, name = subject, {}, "model"
        if subject.type == "adapter":
            base = job.optional("base") or subject.input("base")
            if base is None:
                raise SuiteError(f"the base of the adapter '{subject.name}' is gone", hint="give it as 'base'")
            model, adapters, name = base, {"adapter": subject.path}, "adapter"
        log = job.scratch / "server.log"
        options = {"env_python": str(job.python)} if self.environment() else {}
        with endpoint(
            model.path, adapters, name="model", backend=self.backend, log=log, dtype=self.dtype, **options
        ) as served:
            client = Client(served.url, concurrency=self.concurrency, timeout=self.timeout)
            sets = question_sets.load_all(self.sets)
            journals = job.scratch / "answers"
            found = evaluate(client, name, sets, job.out, journals, limit=self.limit, progress=job.progress)
        for asked_name, scores in found.metrics.items():
            if "not_available" in scores:
                job.warn(f"{asked_name} is not available: {scores['not_available']}")
            if scores.get("unparsed", 0) > scores.get("n", 0) / 10:
                job.warn(
                    f"{asked_name}: {scores['unparsed']} of {scores['n']} replies name no option, and count as wrong"
                )
        if found.failed:
            first = next(p for s in found.sets.values() for p in s["problems"] if p["what"] == "failed")
            text = f"{found.failed} questions failed, the first is {first['id']}: {first['text']}"
            if found.failed > self.max_failed:
                hint = f"the server's log is {log}; run again to ask only these, or raise max_failed"
                raise StageFailed(text, hint=hint)
            job.warn(text)
        return found.metrics


@contextlib.contextmanager
def _at(field: str) -> Iterator[None]:
    """Errors raised inside that name no place are about this setting."""
    try:
        yield
    except SuiteError as error:
        raise SuiteError(error.message, where=error.where or field, hint=error.hint) from None


def evaluate_url(
    url: str, model: str, sets: list[str], out: Path | None = None, *, concurrency: int = 16, limit: int | None = None,
    api_key: str | None = None, timeout: float = 120.0, show: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Score `model` behind any OpenAI endpoint; returns the same metrics as the stage.

    `out` gets answers and report. An interrupted run, or one in which questions failed, is continued there by the next;
    a finished one is asked anew, because nobody can see which weights stand behind a URL today. `show` prints progress
    to stderr and a table to stdout. Raises SuiteError when nothing answers there or the model is unknown.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from evalsets.ask import Client
    from evalsets.evaluation import evaluate
    from evalsets.report import table

    client = Client(url, api_key=api_key, concurrency=concurrency, timeout=timeout)
    loaded = question_sets.load_all(sets)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with (
        tempfile.TemporaryDirectory() as scratch,
        Progress(*columns, console=Console(file=sys.stderr), transient=True, disable=not show) as bars,
    ):
        tasks = {asked.name: bars.add_task(asked.name, total=None) for asked in loaded}

        def progress(step: float, total: float, what: str = "", **values: float) -> None:
            failed = f", {values['failed']:.0f} failed" if values["failed"] else ""
            bars.update(tasks[what], completed=step, total=total, description=what + failed)

        folder = out or Path(scratch)
        journals = folder / "unfinished"
        found = evaluate(client, model, loaded, folder, journals, limit=limit, progress=progress)
        if not found.failed:
            shutil.rmtree(journals)
    if show:
        Console().print(table(model, found.sets))
    return found.metrics
