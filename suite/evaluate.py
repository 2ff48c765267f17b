"""The `eval` stage: start the served endpoint of an artifact, ask it over HTTP, score what it says.

What is evaluated is what users will talk to, with its server, its chat template and its adapters.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from evalsets import leakage, named, report
from evalsets.compare import Report, compare
from evalsets.external import harness
from evalsets.external.harness import External
from evalsets.sets import EvalSet
from suite import envs, processes
from suite.config import ArtifactType, Config, Launch, ModelRef, Names, Takes
from suite.errors import StageFailed, SuiteError
from suite.lineage import training_data
from suite.stages import Artifact, Job, Stage

if TYPE_CHECKING:
    from evalsets import evaluation

__all__ = ["DEFAULT_SETS", "Evaluate", "compare", "evaluate_url"]

DEFAULT_SETS = ["ceval-mini", "summaries", "perplexity"]


class Judge(Config):
    """The table `judge`: a model that grades replies, for sets whose metrics name it."""

    url: str
    """Its endpoint, any that speaks OpenAI's API."""
    model: str
    """The name to ask for."""
    api_key_env: str = ""
    """Environment variable that holds the API key."""

    def client(self, concurrency: int, timeout: float) -> evaluation.Judge:
        """What asks it; raises SuiteError where the variable with the key is empty."""
        from evalsets.ask import Client
        from evalsets.evaluation import Judge as Asked

        key = os.environ.get(self.api_key_env) if self.api_key_env else None
        if self.api_key_env and not key:
            raise SuiteError(f"{self.api_key_env} is not set", where="judge", hint=f"export {self.api_key_env}=...")
        return Asked(Client(self.url, key, concurrency, timeout), self.model)


class Evaluate(Stage):
    """Score a model, a quantized model or an adapter through its served endpoint."""

    version: ClassVar[int] = 2
    libraries: ClassVar[tuple[str, ...]] = (
        "torch", "transformers", "rouge-score", "rouge-chinese", "jieba", "sacrebleu",
    )  # fmt: skip
    preload: ClassVar[tuple[str, ...]] = ("torch", "transformers", "serve.torch.engine", "serve.gateway")

    model: Annotated[str, Takes("model", "quantized", "adapter")]
    """What to evaluate; an adapter is served on its base and asked by its own name."""
    base: ModelRef | None = None
    """The model under an adapter; the one it was trained on when left out."""
    sets: Annotated[list[str], Names()] = DEFAULT_SETS
    """Question sets: names of shipped ones, paths of folders with a set.toml or with data in a published layout,
    `evalscope:NAME`, `lmeval:TASK`; the last two with `=FOLDER` where their data is local."""
    external: harness.Settings = harness.Settings()
    """How the sets of other programs are asked."""
    judge: Judge | None = None
    """Who grades replies, for sets whose metrics name a judge."""
    shots: int | None = Field(default=None, ge=0)
    """Solved examples before each question of choice and numeric sets; what each set says when left out."""
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
        """The settings, with the content of each set and how it is asked in place of where it lies."""
        sets = named.load(self.sets, self.shots)
        whole = super().recipe() | {"sets": {asked.name: asked.digest for asked in sets}}
        del whole["shots"]
        if not any(isinstance(asked, External) for asked in sets):
            del whole["external"]
        return {key: value for key, value in whole.items() if (key, value) != ("judge", None)}

    def environment(self) -> str:
        """The one of an engine that is another program's."""
        return self.backend if self.backend in envs.BUILT_IN else ""

    def check(self, inputs: Mapping[str, list[Artifact | None]]) -> None:
        from serve.backends import check_backend

        with _at("backend"):
            check_backend(self.backend)
        with _at("sets"):
            for asked in named.load(self.sets, self.shots):
                _check(asked, self.external, self.judge)
                if not isinstance(asked, External):
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
        import psutil

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
            sets = named.load(self.sets, self.shots)
            journals = job.scratch / "answers"
            found = evaluate(
                client, name, sets, job.out, journals,
                limit=self.limit, external=self.external, progress=job.progress,
                judge=self.judge.client(self.concurrency, self.timeout) if self.judge else None,
            )  # fmt: skip
            memory = processes.peak_memory(child.pid for child in psutil.Process().children(recursive=True))
        find_leaks(job, name, found.sets)
        for asked_name, set_found in found.sets.items():
            for text in _doubts(asked_name, set_found["total"]):
                job.warn(text)
        if found.failed:
            first = next(p for s in found.sets.values() for p in s["problems"] if p["what"] == "failed")
            text = f"{found.failed} questions failed, the first is {first['id']}: {first['text']}"
            if found.failed > self.max_failed:
                hint = f"the server's log is {log}; run again to ask only these, or raise max_failed"
                raise StageFailed(text, hint=hint)
            job.warn(text)
        return found.metrics | ({"memory": memory} if memory else {})


def find_leaks(job: Job, name: str, sets: dict[str, dict[str, Any]]) -> None:
    """Look for the questions in what the model learnt from; the report in `job.out` and `sets` get what was found."""
    known = training_data(job.input("model"))
    answers = {asked: Report.read(job.out).answers(asked) for asked in sets}
    leakage.annotate(sets, answers, known.files, known.unknown, job.progress)
    report.write(job.out, name, sets)


def _check(asked: EvalSet | External, settings: harness.Settings, judge: Judge | None) -> None:
    """Raise SuiteError where a set needs what is not there."""
    if isinstance(asked, External):
        asked.check(settings)
    elif "judge" in asked.file.metrics:
        if judge is None:
            hint = 'give one: judge = {url = "...", model = "..."}, or --judge url=... --judge model=...'
            raise SuiteError(f"a judge grades the replies to '{asked.name}', and there is none", hint=hint)
        judge.client(1, 1)


def _doubts(name: str, total: Mapping[str, Any]) -> Iterator[str]:
    """What a person should know before believing the figures of a set."""
    if "not_available" in total:
        yield f"{name} is not available: {total['not_available']}"
    if "not_available" in (likelihood := total.get("likelihood", {})):
        yield f"{name}: the options' likelihoods are not available: {likelihood['not_available']}"
    if total.get("unparsed", 0) > total.get("n", 0) / 10:
        yield f"{name}: {total['unparsed']} of {total['n']} replies hold no answer that can be read, and count as wrong"
    if (second := total.get("second", {})).get("differ"):
        yield f"{name}: we read {second['differ']} replies otherwise; accuracy by our reading: {second['acc']:.3f}"
    for metric, why in total.get("unavailable", {}).items():
        yield f"{name}: {metric} is not available: {why}"


@contextlib.contextmanager
def _at(field: str) -> Iterator[None]:
    """Errors raised inside that name no place are about this setting."""
    try:
        yield
    except SuiteError as error:
        raise SuiteError(error.message, where=error.where or field, hint=error.hint) from None


def evaluate_url(
    url: str, model: str, sets: list[str], out: Path | None = None, *, concurrency: int = 16, limit: int | None = None,
    api_key: str | None = None, timeout: float = 120.0, external: harness.Settings | None = None,
    judge: Judge | None = None, shots: int | None = None, show: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Score `model` behind any OpenAI endpoint; returns the same metrics as the stage.

    `out` gets answers and report. An interrupted run, or one in which questions failed, is continued there by the next.
    A finished one is asked anew, but at a server of ours, which says which files it serves: while they are the same,
    their answers are used again. `show` prints progress to stderr and a table to stdout. Raises SuiteError when nothing
    answers there or the model is unknown.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from evalsets.ask import Client
    from evalsets.evaluation import evaluate
    from evalsets.report import table

    client = Client(url, api_key=api_key, concurrency=concurrency, timeout=timeout)
    loaded = named.load(sets, shots)
    external = external or harness.Settings()
    for asked in loaded:
        _check(asked, external, judge)
    known = client.models().get(model, {}).get("fingerprint")
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
        journals = folder / "asked" / known if known else folder / "unfinished"
        found = evaluate(
            client, model, loaded, folder, journals, limit=limit, external=external, progress=progress,
            judge=judge.client(concurrency, timeout) if judge else None,
        )  # fmt: skip
        if not known and not found.failed:
            shutil.rmtree(journals)
    if out:
        (out / report.MEASURED).write_text(json.dumps(found.metrics, indent=2, ensure_ascii=False) + "\n", "utf-8")
    if show:
        Console().print(table(model, found.sets))
        for name, asked_found in found.sets.items():
            for text in _doubts(name, asked_found["total"]):
                print(f"warning: {text}")
    return found.metrics
