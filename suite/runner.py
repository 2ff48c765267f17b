"""Runs a plan: what is in the store is taken from there, the rest is made by worker processes, gates are judged."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from suite.errors import GateFailed, Interrupted, StageFailed, SuiteError
from suite.evidence import evidence
from suite.gate import Verdict
from suite.pipeline import check_stage
from suite.plan import Node, Plan
from suite.pool import Process, WorkerPool
from suite.references import External
from suite.runs import safe_name
from suite.stages import Artifact, kind_name
from suite.store import Store, make_key

State = Literal["waiting", "running", "cached", "done", "failed", "blocked"]
GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL


@dataclass
class Outcome:
    """What became of one stage."""

    name: str
    kind: str
    makes: str
    state: State = "waiting"
    key: str | None = None
    artifact: Artifact | None = None
    seconds: float = 0.0
    error: SuiteError | None = None
    verdicts: list[Verdict] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Its artifact exists and every gate held: what depends on it may run."""
        return self.artifact is not None and self.state in ("cached", "done") and all(v.held for v in self.verdicts)


class View(Protocol):
    """What shows a run to a person or a machine."""

    def event(self, stage: str, event: Mapping[str, Any]) -> None:
        """Something happened in `stage`: state, progress, say, warn, error, gate."""

    def tick(self) -> None:
        """Called a few times a second."""


def libraries(node: Node) -> dict[str, str]:
    """Installed versions of the distributions that decide a stage's result, and those of its environments."""
    found = {}
    for name in (*node.stage.libraries, *node.stage.optional):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name in node.stage.libraries:
                hint = "run 'suite doctor' to see what is missing"
                raise SuiteError(f"{node.name}: the library {name} is not installed", hint=hint) from None
    for environment in node.environments.values():
        found |= environment.libraries
    return found


def resolve(node: Node, outcomes: Mapping[str, Outcome], store: Store) -> dict[str, list[Artifact]] | None:
    """The artifacts of a node's inputs, or None while one of them is not made."""
    inputs: dict[str, list[Artifact]] = {}
    for name, sources in node.inputs.items():
        inputs[name] = []
        for source in sources:
            artifact = _external(source, store) if isinstance(source, External) else outcomes[source].artifact
            if artifact is None:
                return None
            inputs[name].append(artifact)
    return inputs


def _external(source: External, store: Store) -> Artifact:
    artifact = source.artifact
    try:
        return Artifact(artifact.path, artifact.type, store.digest(artifact.path))
    except OSError as error:
        raise SuiteError(f"{error.filename}: {error.strerror}", hint=f"it is part of '{source.name}'") from None


def key_of(node: Node, inputs: Mapping[str, list[Artifact]]) -> str:
    """The store key of what `node` makes from these inputs."""
    return _key(node, inputs, node.stage.recipe())


def _key(node: Node, inputs: Mapping[str, list[Artifact]], recipe: Mapping[str, Any]) -> str:
    stage = node.stage
    digests = {name: [a.digest for a in artifacts] for name, artifacts in inputs.items()}
    return make_key(kind_name(stage), stage.version, recipe, digests, libraries(node))


def preview(plan: Plan, store: Store) -> dict[str, Outcome]:
    """What a run would find: each stage cached, or to be made ('waiting'); runs nothing."""
    outcomes = {n: Outcome(n, kind_name(node.stage), node.stage.makes()) for n, node in plan.nodes.items()}
    for name, node in plan.nodes.items():
        inputs = resolve(node, outcomes, store)
        if inputs is not None:
            outcomes[name].key = key_of(node, inputs)
            outcomes[name].artifact = None if node.stage.target() else store.get(outcomes[name].key or "")
            outcomes[name].state = "cached" if outcomes[name].artifact else "waiting"
    return outcomes


class Runner:
    """Runs every stage of a plan that is not in the store, `jobs` at a time."""

    def __init__(
        self, plan: Plan, store: Store, run_dir: Path, view: View, *, jobs: int = 1, force: frozenset[str] = frozenset()
    ):
        self.plan, self.store, self.run_dir, self.view, self.jobs = plan, store, run_dir, view, jobs
        self.force = force | {name for name, node in plan.nodes.items() if node.stage.target()}
        self.outcomes = {n: Outcome(n, kind_name(node.stage), node.stage.makes()) for n, node in plan.nodes.items()}
        self.processes: dict[str, Process] = {}
        self.stopping = False
        self.events = (run_dir / "events.jsonl").open("a", encoding="utf-8")

    def run(self) -> dict[str, Outcome]:
        """Run to the end; raises Interrupted on Ctrl-C or SIGTERM after every process has ended."""
        previous = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            threads = max(1, (os.cpu_count() or 1) // self.jobs)
            with WorkerPool(threads, self.run_dir / "worker.log") as pool:
                try:
                    self._loop(pool)
                finally:
                    self._end_processes(pool)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            self.events.close()
        return self.outcomes

    def _stop(self, *_: object) -> None:
        self.stopping = True

    def _loop(self, pool: WorkerPool) -> None:
        while True:
            if self.stopping:
                raise Interrupted("stopped", hint="nothing is lost: the same command continues where this one was")
            self._start_ready(pool)
            if not self.processes:
                return
            for process, event in pool.wait(0.2):
                self._emit(process.name, event)
                if event["event"] == "exit":
                    self._finish(process, int(event["code"]))
            self.view.tick()

    def _start_ready(self, pool: WorkerPool) -> None:
        progressed = True
        while progressed:
            progressed = False
            for name, outcome in self.outcomes.items():
                if outcome.state != "waiting" or len(self.processes) >= self.jobs:
                    continue
                before = [self.outcomes[b] for b in self.plan.nodes[name].after]
                if any(b.state in ("failed", "blocked") or (b.artifact and not b.passed) for b in before):
                    self._state(outcome, "blocked")
                    progressed = True
                elif all(b.passed for b in before):
                    self._start(self.plan.nodes[name], outcome, pool)
                    progressed = True

    def _start(self, node: Node, outcome: Outcome, pool: WorkerPool) -> None:
        try:
            inputs = resolve(node, self.outcomes, self.store)
            if inputs is None:
                raise SuiteError(f"{node.name}: an input is not there")
            check_stage(node, {name: list(artifacts) for name, artifacts in inputs.items()})
            outcome.key = key_of(node, inputs)
        except SuiteError as error:
            self._fail(outcome, error)
            return
        cached = None if node.name in self.force else self.store.get(outcome.key)
        if cached:
            outcome.artifact = cached
            outcome.seconds = float(cached.record.get("seconds", 0.0))
            self._judge(node, outcome)
            self._state(outcome, "cached")
            return
        folder = self.run_dir / "stages" / safe_name(node.name)
        folder.mkdir(parents=True, exist_ok=True)
        spec = self._spec(node, inputs, outcome.key)
        (folder / "stage.json").write_text(json.dumps(spec, indent=2, ensure_ascii=False) + "\n", "utf-8")
        self.processes[node.name] = pool.start(node.name, folder, node.stage.preload)
        outcome.seconds = time.monotonic()
        self._state(outcome, "running")

    def _spec(self, node: Node, inputs: Mapping[str, list[Artifact]], key: str) -> dict[str, Any]:
        """Everything that a worker needs to make one artifact."""
        described = {
            field: [
                {"path": str(a.path), "type": a.type, "digest": a.digest, "name": a.name, "key": a.record.get("key")}
                for a in artifacts
            ]
            for field, artifacts in inputs.items()
        }
        return {
            "name": node.name, "kind": kind_name(node.stage), "key": key,
            "work": _key(node, inputs, node.stage.work()), "store": str(self.store.root),
            "settings": node.stage.model_dump(mode="json"), "inputs": described, "libraries": libraries(node),
            "force": node.name in self.force,
            "pythons": {name: str(environment.python) for name, environment in node.environments.items()},
        }  # fmt: skip

    def _finish(self, process: Process, code: int) -> None:
        outcome, node = self.outcomes[process.name], self.plan.nodes[process.name]
        del self.processes[process.name]
        outcome.seconds = time.monotonic() - outcome.seconds
        outcome.artifact = self.store.get(outcome.key or "") if code == 0 else None
        if outcome.artifact:
            self._judge(node, outcome)
            self._state(outcome, "done")
        else:
            self._fail(outcome, self._explain(process, code))

    def _explain(self, process: Process, code: int) -> SuiteError:
        if process.error:
            e = process.error
            return StageFailed(e["message"], where=e["where"] or process.name, hint=e["hint"] or f"log: {process.log}")
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = (
            "the system may have run out of memory (see 'suite doctor')"
            if code == -signal.SIGKILL
            else f"log: {process.log}"
        )
        return StageFailed(f"its process {how}", where=process.name, hint=hint)

    def _judge(self, node: Node, outcome: Outcome) -> None:
        assert outcome.artifact is not None
        others = {s: evidence(a) for g in node.gates for s in g.stages if (a := self.outcomes[s].artifact)}
        own = evidence(outcome.artifact)
        outcome.verdicts = [g.judge(own, others) for g in node.gates]
        for v in outcome.verdicts:
            self._emit(node.name, {"event": "gate", "gate": v.gate, "held": v.held, "reason": v.reason})

    def _fail(self, outcome: Outcome, error: SuiteError) -> None:
        outcome.error = error
        self._emit(
            outcome.name, {"event": "failed", "message": error.message, "where": error.where, "hint": error.hint}
        )
        self._state(outcome, "failed")

    def _state(self, outcome: Outcome, state: State) -> None:
        outcome.state = state
        key = outcome.key if state in ("cached", "done") else None
        seconds = 0.0 if state == "running" else round(outcome.seconds, 3)  # until its end it holds when it began
        self._emit(outcome.name, {"event": "state", "state": state, "key": key, "seconds": seconds})

    def _emit(self, stage: str, event: Mapping[str, Any]) -> None:
        if event["event"] == "warn":
            self.outcomes[stage].warnings.append(str(event["text"]))
        if event["event"] != "progress":
            print(
                json.dumps({"time": round(time.time(), 3), "stage": stage, **event}, ensure_ascii=False),
                file=self.events,
                flush=True,
            )
        self.view.event(stage, event)

    def _end_processes(self, pool: WorkerPool) -> None:
        """Leave nothing behind: ask, wait, then kill whole process groups."""
        for number, seconds in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, GRACE_SECONDS)):
            for process in self.processes.values():
                if process.pid:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.killpg(process.pid, number)
            deadline = time.monotonic() + seconds
            while any(p.pid for p in self.processes.values()) and time.monotonic() < deadline:
                for process, event in pool.wait(0.1):
                    if event["event"] == "exit":
                        self.processes.pop(process.name, None)


def verdict_error(outcomes: Mapping[str, Outcome]) -> SuiteError | None:
    """The error that a run ends with: a failed stage before a gate that did not hold; None when all is well."""
    for outcome in outcomes.values():
        if outcome.error:
            return outcome.error
    for outcome in outcomes.values():
        for v in outcome.verdicts:
            if not v.held:
                return GateFailed(
                    f"gate '{v.gate}' does not hold: {v.reason}",
                    where=outcome.name,
                    hint="see the report for all values",
                )
    return None
