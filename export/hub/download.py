"""The `download` stage: a model, an adapter or data at a hub becomes an artifact of the store.

A pipeline rarely names it: `base = "hf:org/name"` is this stage too, and so is `sets = ["hf:org/name"]`. Which commit
an address means is decided while planning and enters the key, so that a moved branch is downloaded again and a commit
never is.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from export import hub
from export.hf import sha256
from suite import quantized, store
from suite.config import ArtifactType
from suite.errors import SuiteError
from suite.stages import Job, Stage

COMMIT = re.compile(r"[0-9a-f]{40}")
LOOK_SECONDS = 0.5
"""How often the progress is read off the folder."""
NEEDED = re.compile(
    r"(config|generation_config|adapter_config|quantize_config|quant_config|preprocessor_config|"
    r"tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template)\.json"
    r"|[^/]*\.(jinja|model|tiktoken)|additional_chat_templates/[^/]*\.jinja|merges\.txt|vocab\.txt"
    r"|(README|LICENSE|NOTICE|USE_POLICY)[^/]*"
)
"""Files that a model is read with, or that say what one may do with it."""
WEIGHTS = re.compile(r"(?!consolidated)[^/]*\.safetensors(\.index\.json)?")
PICKLED = re.compile(r"pytorch_model[^/]*\.bin(\.index\.json)?")
"""Read where there is nothing better; a merge reads them weights-only."""

DATA = re.compile(r"[^.].*\.(csv|tsv|jsonl|parquet)")
"""Files of data that are read as they lie there; what says how to read them, or runs, is never fetched."""
LEGAL = re.compile(r"(README|LICENSE|NOTICE)[^/]*")

Holds = Literal["model", "quantized", "adapter", "data"]


class Download(Stage):
    """Fetch a model, an adapter or data from a hub; interrupted, the same command continues.

    Of a model only what it is read with: safetensors (pickled weights where there are none), settings, tokenizer,
    license. Of data the tables and the license.
    """

    address: str = Field(pattern=f"{hub.ADDRESS}|{hub.DATA_ADDRESS}")
    """Where it lies: "hf:org/name" or "ms:org/name", for data "hf:datasets/org/name" and perhaps a folder in it, with
    "@commit", a branch or a tag if it is not the main one."""
    commit: str = ""
    """The commit that the address means; looked up when left out."""
    holds: Holds | Literal[""] = ""
    """model, quantized, adapter or data; looked up when left out."""

    def makes(self) -> ArtifactType:
        return self.holds or ("data" if hub.parts(self.address).holding == "dataset" else "model")

    def pinned(self) -> Download:
        """With commit and type, as the hub says now; what an address with a commit means is asked once."""
        if self.commit and self.holds:
            return self
        noted = store.home() / "hubs" / f"{hashlib.sha256(self.address.encode()).hexdigest()[:16]}.json"
        if COMMIT.fullmatch(hub.parts(self.address).revision) and noted.is_file():
            return self.model_copy(update=json.loads(noted.read_text("utf-8")))
        at = hub.at(self.address)
        try:
            found = at.listing(self.commit)
            known = {"commit": found.commit, "holds": self.holds or self._holding(at, found)}
        except hub.Temporary as error:
            hint = "is there a network? What was downloaded by its commit (hf:org/name@COMMIT) needs none"
            raise SuiteError(f"{self.address} cannot be looked up: {error}", hint=hint) from None
        noted.parent.mkdir(parents=True, exist_ok=True)
        noted.write_text(json.dumps(known), "utf-8")
        return self.model_copy(update=known)

    def recipe(self) -> dict[str, Any]:
        """Whatever branch or tag led there, a commit is the same."""
        asked = hub.parts(self.address)
        whole = {"repository": f"{asked.hub}:{asked.repository}", "commit": self.commit, "holds": self.holds}
        return whole | ({"folder": asked.folder} if asked.folder else {})

    def _holding(self, at: hub.Hub, found: hub.Listing) -> Holds:
        asked = hub.parts(self.address)
        if asked.holding == "model":
            return _holds(at, found)
        data(found.files, asked.folder)
        return "data"

    def _chosen(self, files: Mapping[str, hub.Listed]) -> dict[str, hub.Listed]:
        asked = hub.parts(self.address)
        return data(files, asked.folder) if asked.holding == "dataset" else chosen(files)

    def run(self, job: Job) -> dict[str, Any]:
        """Fetch, look whether all of it is what the hub says; returns what came from where."""
        at = hub.at(self.address)

        def fetch() -> Mapping[str, hub.Listed]:
            found = at.listing(self.commit)
            wanted = self._chosen(found.files)
            with _progress(job, sum(file.size for file in wanted.values())):
                at.fetch(job.out, found.commit, wanted)
            return wanted

        wanted = hub.patiently(fetch, job.say, f"{self.address} cannot be downloaded")
        _keep_only(job.out, wanted)
        for name, file in wanted.items():
            _verify(job.out / name, file)
        url = f"{at.url} at {self.commit}"
        job.say(f"{len(wanted)} files of {url}")
        size = sum(file.size for file in wanted.values())
        return {"downloaded": {"from": at.url, "commit": self.commit, "files": len(wanted), "bytes": size}}


def chosen(files: Mapping[str, hub.Listed]) -> dict[str, hub.Listed]:
    """Those of a repository's files that are needed; raises SuiteError where there are no weights among them."""
    for weights in (WEIGHTS, PICKLED):
        if any(weights.fullmatch(name) for name in files):
            return {n: file for n, file in files.items() if NEEDED.fullmatch(n) or weights.fullmatch(n)}
    some = ", ".join(sorted(files)[:8])
    raise SuiteError(f"the repository has no weights as safetensors, but {some or 'nothing'}")


def data(files: Mapping[str, hub.Listed], folder: str = "") -> dict[str, hub.Listed]:
    """The files of data in a repository, or in a folder of it, and its license; raises SuiteError without any."""
    inside = [name for name in files if DATA.fullmatch(name) and name.startswith(f"{folder}/" if folder else "")]
    if inside:
        return {name: files[name] for name in (*inside, *filter(LEGAL.fullmatch, files))}
    place, some = f"'{folder}' of the repository" if folder else "the repository", ", ".join(sorted(files)[:8])
    hint = "the hub's own tables of it may be at @refs/convert/parquet; or unpack it, and give the folder"
    raise SuiteError(f"{place} has no csv, tsv, jsonl or parquet; it has {some or 'nothing'}", hint=hint)


def _holds(at: hub.Hub, found: hub.Listing) -> Holds:
    if "adapter_config.json" in found.files:
        return "adapter"
    if "config.json" not in found.files:
        raise SuiteError(f"{at.url} holds no model: it has no config.json")
    with tempfile.TemporaryDirectory() as folder:
        small = {n: file for n, file in found.files.items() if n in ("config.json", *quantized.OLDER)}
        at.fetch(Path(folder), found.commit, small)
        return "quantized" if quantized.settings(Path(folder)) else "model"


@contextmanager
def _progress(job: Job, total: int) -> Iterator[None]:
    """Reports the bytes that lie in the folder: libraries show progress only to people at a terminal."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(LOOK_SECONDS):
            job.progress(min(_bytes(job.out), total), total, "bytes")

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join()
    job.progress(total, total, "bytes")


def _bytes(folder: Path) -> int:
    size = 0
    for path in folder.rglob("*"):
        try:
            size += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # renamed meanwhile
            continue
    return size


def _keep_only(folder: Path, wanted: Iterable[str]) -> None:
    """Remove what the hub's library noted beside the files."""
    names = {*wanted}
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file() and path.relative_to(folder).as_posix() not in names:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _verify(path: Path, file: hub.Listed) -> None:
    if not path.is_file():
        raise SuiteError(f"{path.name} did not arrive", hint="run the same command again")
    differs = path.stat().st_size != file.size or (
        file.digest and file.digest != (sha256(path) if len(file.digest) == 64 else hub.git_hash(path))
    )
    if differs:
        path.unlink()
        raise SuiteError(f"{path.name} is not what the hub says it is", hint="run the same command again")
