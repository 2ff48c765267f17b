"""Content-addressed artifacts: a directory that exists is complete, and never changes.

artifacts/KEY/   finished: its files are read-only, artifact.json says where it came from
partial/WORK/    out/ and scratch/ of a stage that runs or was interrupted; WORK is the key, or what several keys share
locks/WORK       held by the process that works there
runs/NAME/TIME/  what each `suite run` did
digests.json     hashes of files outside the store, by path, size and time
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from suite.errors import SuiteError
from suite.stages import RECORD, Artifact

FORMAT = 1  # part of every key: raise it when the meaning of a key changes
ARTIFACT_READ_ONLY = 0o444


def home() -> Path:
    """The store's directory: SUITE_HOME, or ~/.cache/suite."""
    return Path(os.environ.get("SUITE_HOME") or Path.home() / ".cache" / "suite").expanduser().absolute()


def make_key(
    kind: str, version: int, recipe: Mapping[str, Any], inputs: Mapping[str, list[str]], libraries: Mapping[str, str]
) -> str:
    """The name of what a stage will make: the hash of all that decides it (32 hex digits)."""
    whole = [FORMAT, kind, version, recipe, inputs, libraries]
    text = json.dumps(whole, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def tree_files(path: Path) -> list[Path]:
    """The files that a digest covers, sorted: all of them, but for the record itself."""
    if path.is_file():
        return [path]
    return sorted(p for p in path.rglob("*") if p.is_file() and p != path / RECORD)


def combine(hashes: Mapping[str, str]) -> str:
    """One digest for a tree, from the digest of each file by its relative path; times and modes do not count."""
    return hashlib.sha256(json.dumps(dict(sorted(hashes.items()))).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def locked(file: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock `file`; `waiting` is called once while another process has it."""
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        waiting()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@dataclass
class Store:
    """The artifacts under one directory; raises SuiteError when that directory cannot be used."""

    root: Path
    _digests: dict[str, list[Any]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        try:
            for name in ("artifacts", "partial", "locks", "runs"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            raise disk_error(error, self.root) from None
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):  # only a cache: a torn one is made again
            self._digests = json.loads((self.root / "digests.json").read_text("utf-8"))

    def get(self, key: str) -> Artifact | None:
        """The finished artifact of that key, if there is one."""
        path = self.root / "artifacts" / key
        if not (path / RECORD).is_file():
            return None
        record = json.loads((path / RECORD).read_text("utf-8"))
        return Artifact(path, record["type"], record["digest"])

    def find(self, prefix: str) -> list[Artifact]:
        """Artifacts whose key starts with `prefix`."""
        found = (self.get(p.name) for p in sorted((self.root / "artifacts").iterdir()) if p.name.startswith(prefix))
        return [artifact for artifact in found if artifact]

    def digest(self, path: Path) -> str:
        """The digest of a file or folder outside the store; unchanged files are not read again."""
        known = (path / RECORD).is_file() and path.parent == self.root / "artifacts"
        if known:
            return str(json.loads((path / RECORD).read_text("utf-8"))["digest"])
        hashes, changed = {}, False
        for file in tree_files(path):
            stat, name = file.stat(), str(file.absolute())
            stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
            if self._digests.get(name, [None])[:-1] != stamp:
                self._digests[name], changed = [*stamp, hash_file(file)], True
            hashes[file.relative_to(path).as_posix()] = self._digests[name][-1]
        if changed:
            self._write(self.root / "digests.json", self._digests)
        return combine(hashes)

    def _write(self, path: Path, value: Any) -> None:
        try:
            with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
                json.dump(value, file)
            Path(file.name).replace(path)
        except OSError as error:
            raise disk_error(error, path) from None

    @contextlib.contextmanager
    def make(
        self,
        key: str,
        record: Mapping[str, Any],
        *,
        work: str = "",
        force: bool = False,
        waiting: Callable[[], None] = lambda: None,
    ) -> Iterator[Making | None]:
        """Give a directory to fill, or None when the artifact is there already; commit it on leaving.

        One process at a time makes a key; others wait (`waiting` is called once) and then find it made. The directory
        survives a crash under partial/, so a training stage finds its checkpoints again. It becomes the artifact by
        one rename, after everything in it reached the disk. `work` is a name under which several keys continue what any
        of them left, in turns; the key itself when left out. `force` starts afresh and replaces what is there.
        """
        final, place = self.root / "artifacts" / key, self.root / "partial" / (work or key)
        with locked(self.root / "locks" / place.name, waiting):
            if final.exists() and not force:
                yield None
                return
            if force and place.exists():
                shutil.rmtree(place)
            making = Making(place / "out", place / "scratch")
            making.out.mkdir(parents=True, exist_ok=True)
            making.scratch.mkdir(exist_ok=True)
            started = time.time()
            yield making
            seconds = round(time.time() - started, 3)
            self._commit(making, final, {**record, "key": key, "seconds": seconds, "metrics": making.metrics})
            shutil.rmtree(place)

    def _commit(self, making: Making, final: Path, record: dict[str, Any]) -> None:
        out = making.out
        # a record left by a commit that was killed is not content
        (out / RECORD).unlink(missing_ok=True)
        files = {p.relative_to(out).as_posix(): p for p in tree_files(out)}
        hashes = {name: hash_file(path) for name, path in files.items()}
        sizes = {name: path.stat().st_size for name, path in files.items()}
        record |= {"digest": combine(hashes), "files": hashes, "bytes": sum(sizes.values())}
        (out / RECORD).write_text(json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")
        for path in [*files.values(), out / RECORD]:
            path.chmod(ARTIFACT_READ_ONLY)
            sync(path)
        for folder in {out, *(p for p in out.rglob("*") if p.is_dir())}:
            sync(folder)
        if final.exists():  # replaced on request; a crash between the renames leaves no artifact, never half of one
            old = making.scratch / "replaced"
            final.rename(old)
        out.rename(final)
        sync(final.parent)


@dataclass
class Making:
    """An artifact that is being made: fill `out`, keep checkpoints in `scratch`, and leave `metrics`."""

    out: Path
    scratch: Path
    metrics: dict[str, Any] = field(default_factory=dict)


def sync(path: Path) -> None:
    """Wait until a file's bytes or a folder's names are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_error(error: OSError, path: Path) -> SuiteError:
    """What a person should read when `path` cannot be written."""
    place = str(error.filename or path)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SuiteError(
            f"the disk is full: {place}",
            hint="free some space, or set SUITE_HOME to a larger disk; nothing is lost, the same command continues",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return SuiteError(f"no permission to write: {place}", hint="set SUITE_HOME to a directory that you may write")
    return SuiteError(f"{error.strerror or error}: {place}", hint="set SUITE_HOME to a directory that you may write")
