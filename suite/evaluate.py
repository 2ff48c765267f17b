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
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from evalsets import leakage, named, report
from evalsets.compare import Report, compare
from evalsets.external import harness
from evalsets.external.harness import External
from evalsets.identity import identity, scoring, word
from evalsets.sets import EvalSet, Remote, at_hub
from suite import envs, processes
from suite.config import ArtifactType, Config, Launch, ModelRef, Names, Takes
from suite.errors import StageFailed, SuiteError
from suite.lineage import training_data
from suite.serving import Foreign, foreign
from suite.stages import Artifact, Job, Stage

if TYPE_CHECKING:
    from evalsets import evaluation
    from evalsets.ask import Client

__all__ = ["DEFAULT_SETS", "Evaluate", "compare", "evaluate_url"]

AUTO, GGUF = "auto", "llamacpp"
DEFAULT_SETS = ["ceval-mini", "summaries", "perplexity"]
UNFINISHED = "unfinished"
"""Folder of answers that nobody uses again once all of them are there."""
NOT_SAID = "an endpoint does not say what its model learnt from: name the files with --leakage"


class Judge(Config):
    """The table `judge`: a model that grades replies, for sets whose metrics name it."""

    url: str
    """Its endpoint, any that speaks OpenAI's API."""
    model: str
    """The name to ask for."""
    api_key_env: str = ""
    """Environment variable that holds the API key."""

    def client(self, concurrency: int, timeout: float) -> Client:
        """What asks it; raises SuiteError where the variable with the key is empty."""
        from evalsets.ask import Client

        key = os.environ.get(self.api_key_env) if self.api_key_env else None
        if self.api_key_env and not key:
            raise SuiteError(f"{self.api_key_env} is not set", where="judge", hint=f"export {self.api_key_env}=...")
        return Client(self.url, key, concurrency, timeout)

    def asked(self, concurrency: int, timeout: float, folder: Path) -> evaluation.Judge:
        """The same with a place for its grades in `folder`; raises SuiteError where its endpoint does not know it."""
        from evalsets.evaluation import Judge as Asked

        client = self.client(concurrency, timeout)
        return Asked(client, self.model, _journals(folder, client, self.model))


class Served(Foreign):
    """The table `engine`: how the engine serves what is evaluated."""

    max_length: int | None = Field(default=None, ge=2)
    """Most tokens of prompt and answer together; by default what the model was made for."""


class Evaluate(Stage):
    """Score a model, a quantized model, an adapter or a package such as a GGUF file through its served endpoint."""

    version: ClassVar[int] = 3
    libraries: ClassVar[tuple[str, ...]] = (
        "torch", "transformers", "rouge-score", "rouge-chinese", "jieba", "sacrebleu",
    )  # fmt: skip
    optional: ClassVar[tuple[str, ...]] = ("llama-cpp-python",)
    preload: ClassVar[tuple[str, ...]] = ("torch", "transformers", "serve.torch.engine", "serve.gateway")

    model: Annotated[str, Takes("model", "quantized", "adapter", "package")]
    """What to evaluate, a .gguf file too; an adapter is served on its base and asked by its own name."""
    base: ModelRef | None = None
    """The model under an adapter; the one it was trained on when left out."""
    sets: Annotated[list[str], Names()] = DEFAULT_SETS
    """Question sets: names of shipped ones, paths of folders with a set.toml or with data in a published layout, such
    data at a hub (`hf:org/name`, `ms:org/name`, with a folder in it and `@commit` if need be), `evalscope:NAME`,
    `lmeval:TASK`; the last two with `=FOLDER` where their data is local."""
    external: harness.Settings = harness.Settings()
    """How the sets of other programs are asked."""
    judge: Judge | None = None
    """Who grades replies, for sets whose metrics name a judge."""
    shots: int | None = Field(default=None, ge=0)
    """Solved examples before each question of choice and numeric sets; what each set says when left out."""
    limit: int | None = Field(default=None, ge=1)
    """Questions of each set, for a quick look; all when left out."""
    backend: str = "auto"
    """Engine that serves the artifact; auto is llamacpp for a GGUF file and torch for all else."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the served weights; auto is float32 on a CPU and what the artifact says on a GPU."""
    engine: Served = Served()
    """How the engine is started, in the words of `suite serve`."""
    concurrency: Annotated[int, Launch()] = Field(default=16, ge=1)
    """Requests at the same time; llama.cpp takes one."""
    timeout: Annotated[float, Launch()] = Field(default=120.0, gt=0)
    """Seconds after which a question counts as failed."""
    max_failed: int = Field(default=0, ge=0)
    """Questions that may fail before the stage fails; they score 0 either way."""

    def makes(self) -> ArtifactType:
        return "report"

    def references(self) -> dict[str, list[str]]:
        """Data of sets that lies at hubs is fetched by stages before this one."""
        addresses = [*dict.fromkeys(filter(None, map(at_hub, self.sets)))]
        return super().references() | ({"sets": addresses} if addresses else {})

    def accepts(self) -> dict[str, Takes]:
        return super().accepts() | {"sets": Takes("data")}

    def _fetched(self, inputs: Mapping[str, Sequence[Artifact | None]]) -> dict[str, Path]:
        """The folders of what lay at hubs, by address, as far as it is here."""
        found = zip(self.references().get("sets", ()), inputs.get("sets", ()), strict=False)
        return {address: artifact.path for address, artifact in found if artifact}

    def recipe(self) -> dict[str, Any]:
        """The settings, and how we score, with the content of each set and how it is asked in place of where it is."""
        sets = named.planned(self.sets, self.shots)
        whole = super().recipe() | {"sets": {asked.name: asked.digest for asked in sets}, "scoring": scoring()}
        del whole["shots"]
        if not any(isinstance(asked, External) for asked in sets):
            del whole["external"]
        whole["engine"] = self.engine.model_dump(mode="json", exclude_defaults=True)
        unsaid: dict[str, Any] = {"judge": None, "engine": {}}
        return {key: value for key, value in whole.items() if value != unsaid.get(key, ...)}

    def work(self) -> dict[str, Any]:
        """Answers are used again whoever reads them, and however many may fail."""
        return {key: value for key, value in self.recipe().items() if key not in ("scoring", "max_failed")}

    def environments(self) -> tuple[str, ...]:
        """Those of an engine and of sets that are other programs'."""
        programs = [self.backend, *(asked.harness for asked in map(harness.parse, self.sets) if asked)]
        return tuple(dict.fromkeys(name for name in programs if name in envs.BUILT_IN))

    def check(self, inputs: Mapping[str, list[Artifact | None]]) -> None:
        from serve.backends import check_backend

        with _at("backend"):
            if self.backend != AUTO:
                check_backend(self.backend)
        if self.backend not in envs.BUILT_IN and (name := foreign(self.engine)):
            hint = 'name one: backend = "vllm"'
            raise SuiteError("this is for engines of other programs", where=f"engine.{name}", hint=hint)
        with _at("sets"):
            for asked in named.planned(self.sets, self.shots, self._fetched(inputs)):
                _check(asked, self.external, self.judge)
                if isinstance(asked, EvalSet):
                    asked.questions(self.limit)
        subject = next(iter(inputs.get("model", ())), None)
        if subject is None:
            return
        if _is_gguf(subject) or self.backend == GGUF:
            self._check_gguf(subject)
        if not _is_adapter(subject) and self.base:
            hint = "base is what an adapter is served on; remove it"
            raise SuiteError(f"'{subject.name}' is no adapter", where="base", hint=hint)
        if _is_adapter(subject) and not self.base and subject.input("base") is None:
            hint = "give the model that it was trained on as 'base'"
            raise SuiteError(f"the adapter '{subject.name}' does not say where its base is", where="model", hint=hint)

    def check_in(self, pythons: Mapping[str, Path], inputs: Mapping[str, list[Artifact | None]]) -> None:
        if self.backend not in pythons:
            return
        from serve.engines import remote
        from serve.settings import Settings

        subject = next(iter(inputs.get("model", ())), None)
        model = subject.path if subject else Path(self.model)  # of what a stage makes nothing is known yet
        options = self.engine.model_dump() | {"env_python": str(pythons[self.backend])}
        try:
            remote.check(Settings(model=model, backend=self.backend, dtype=self.dtype, **options))
        except SuiteError as error:
            table = "engine." if error.where in Served.model_fields else ""
            raise SuiteError(error.message, where=table + (error.where or "backend"), hint=error.hint) from None

    def _check_gguf(self, subject: Artifact) -> None:
        """That llama.cpp serves it, which serves nothing else, and is there to do so."""
        from serve.settings import Settings

        if self.backend not in (AUTO, GGUF):
            hint = f"leave backend out: {GGUF} serves it"
            raise SuiteError(
                f"'{subject.name}' is a GGUF file, which {self.backend} does not serve", where="backend", hint=hint
            )
        with _at("model"):
            Settings(model=subject.path, backend=GGUF).check()

    def run(self, job: Job) -> dict[str, Any]:
        import psutil

        from evalsets.ask import Client
        from evalsets.evaluation import evaluate
        from serve.backends import endpoint

        subject = job.input("model")
        model, adapters, name = subject, {}, "model"
        backend = self._backend(subject)
        if _is_adapter(subject):
            base = job.optional("base") or subject.input("base")
            if base is None:
                raise SuiteError(f"the base of the adapter '{subject.name}' is gone", hint="give it as 'base'")
            model, adapters, name = base, {"adapter": subject.path}, "adapter"
        log = job.scratch / "server.log"
        options = self.engine.model_dump()
        if backend in job.pythons:
            options["env_python"] = str(job.pythons[backend])
        with endpoint(
            model.path, adapters, name="model", backend=backend, log=log, dtype=self.dtype, **options
        ) as served:
            # what waits for its turn would be timed as if it were answered
            client = Client(served.url, concurrency=1 if backend == GGUF else self.concurrency, timeout=self.timeout)
            loaded = named.load(self.sets, self.shots, self._fetched(job.inputs))
            sets = [replace(s, python=job.pythons[s.harness]) if isinstance(s, External) else s for s in loaded]
            journals = job.scratch / "answers"
            found = evaluate(
                client, name, sets, job.out, journals,
                limit=self.limit, external=self.external, progress=job.progress,
                judge=self.judge.asked(self.concurrency, self.timeout, job.scratch) if self.judge else None,
            )  # fmt: skip
            memory = processes.peak_memory(child.pid for child in psutil.Process().children(recursive=True))
        known = training_data(subject)
        find_leaks(job.out, name, found.sets, known.files, known.unknown, job.progress)
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
        return found.metrics | {"backend": backend} | ({"memory": memory} if memory else {})

    def _backend(self, subject: Artifact) -> str:
        if self.backend != AUTO:
            return self.backend
        return GGUF if _is_gguf(subject) else "torch"


def _is_gguf(subject: Artifact) -> bool:
    return subject.path.suffix == ".gguf" or (subject.type == "package" and any(subject.path.glob("*.gguf")))


def _is_adapter(subject: Artifact) -> bool:
    return subject.type == "adapter" or (subject.path / "adapter_config.json").is_file()


def find_leaks(
    out: Path, name: str, sets: dict[str, dict[str, Any]], files: Sequence[Path], unknown: Sequence[str],
    progress: leakage.Progress = lambda *_: None,
) -> None:  # fmt: skip
    """Look for questions in the `files` that a model learnt from; `sets` and the report in `out` get what was found.

    `unknown` are reasons why there may be more of them.
    """
    written = Report.read(out)
    leakage.annotate(sets, {asked: written.answers(asked) for asked in sets}, files, unknown, progress)
    report.write(out, name, sets)


def _check(asked: EvalSet | External | Remote, settings: harness.Settings, judge: Judge | None) -> None:
    """Raise SuiteError where a set needs what is not there."""
    if isinstance(asked, External):
        asked.check(settings)
    elif asked.file and "judge" in asked.file.metrics:
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
    judge: Judge | None = None, shots: int | None = None, fetched: Mapping[str, Path] | None = None,
    learnt: Sequence[Path] = (), show: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Score `model` behind any OpenAI endpoint; returns the same metrics as the stage.

    `out` gets answers and report. An interrupted run, or one in which questions failed, is continued there by the next,
    while the endpoint says the same of itself. A finished one is asked anew, but at a server of ours, which says which
    files it serves by which engine: while they are the same, their answers are used again. `fetched` are the
    folders of sets at hubs, by address, `learnt` files that the model was trained on. `show` prints progress to stderr
    and a table to stdout. Raises SuiteError when nothing answers there or the model is unknown.
    """
    from rich.console import Console

    from evalsets.ask import Client
    from evalsets.evaluation import evaluate
    from evalsets.report import table

    client = Client(url, api_key=api_key, concurrency=concurrency, timeout=timeout)
    loaded = named.load(sets, shots, fetched)
    external = external or harness.Settings()
    for asked in loaded:
        _check(asked, external, judge)
        if isinstance(asked, External):
            asked.environment.require()
    with tempfile.TemporaryDirectory() as scratch, _bars([asked.name for asked in loaded], show) as progress:
        folder = out or Path(scratch)
        journals = _journals(folder, client, model)
        grader = judge.asked(concurrency, timeout, folder) if judge else None
        places = [journals, *([grader.grades] if grader else [])]
        last = max((path.stat().st_mtime for place in places for path in place.glob("*.jsonl")), default=0.0)
        found = evaluate(
            client, model, loaded, folder, journals, limit=limit, external=external, progress=progress, judge=grader
        )
        if not found.failed:
            _forget(places)
        find_leaks(folder, model, found.sets, learnt, () if learnt else (NOT_SAID,))
    if out:
        (out / report.MEASURED).write_text(json.dumps(found.metrics, indent=2, ensure_ascii=False) + "\n", "utf-8")
    if found.kept:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(last))
        left = " and ".join(str(place) for place in places if place.exists())
        cure = f"; to ask anew, remove {left}" if left else ""
        print(f"{found.kept} answers of {when} were used again{cure}", file=sys.stderr)
    if show:
        Console().print(table(model, found.sets))
        for name, asked_found in found.sets.items():
            for text in _doubts(name, asked_found["total"]):
                print(f"warning: {text}")
    return found.metrics


def _journals(folder: Path, client: Client, model: str) -> Path:
    """Where answers of this very model lie, and no others; raises SuiteError where the endpoint does not know it."""
    known = identity(client.root, client.check_model(model))
    return folder / ("asked" if "fingerprint" in known else UNFINISHED) / word([model, known])


def _forget(places: Sequence[Path]) -> None:
    """Remove the answers that were good for one run only."""
    for place in places:
        if place.parent.name == UNFINISHED and place.is_dir():
            shutil.rmtree(place)
            with contextlib.suppress(OSError):  # another endpoint's lie there too
                place.parent.rmdir()


@contextlib.contextmanager
def _bars(names: Sequence[str], show: bool) -> Iterator[evaluation.Progress]:
    """A bar on stderr for each set, if they are shown, and what moves it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=sys.stderr), transient=True, disable=not show) as bars:
        tasks = {name: bars.add_task(name, total=None) for name in names}

        def progress(step: float, total: float, what: str = "", **values: float) -> None:
            failed = f", {values['failed']:.0f} failed" if values["failed"] else ""
            bars.update(tasks[what], completed=step, total=total, description=what + failed)

        yield progress
