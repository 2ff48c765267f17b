"""What a model hub holds, and what a push would change there; the hubs themselves are the modules beside this one."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, TypeVar

from export.hf import CHECKSUMS, sha256
from suite.errors import SuiteError

NAME, REVISION = r"[\w.-]+/[\w.-]+", r"(@[\w./-]+)?"
ADDRESS = rf"^(hf|ms):{NAME}{REVISION}$"
DATA_ADDRESS = rf"^(hf|ms):datasets/{NAME}(/[\w./-]+)?{REVISION}$"
"""A repository of data, or one folder of it, in the form of the hubs' own addresses: `hf:datasets/org/name/folder`."""
TITLE = "suite: "
"""How the title of each commit of ours begins: what such a commit brought is ours to replace."""
WAITS = (1, 2, 4, 8)
"""Seconds between attempts, on top of those that the hub's library makes for each request."""

T = TypeVar("T")


class Temporary(Exception):
    """The hub was busy, unreachable, or changed meanwhile: the same may go well a little later."""


Holding = Literal["model", "dataset"]
"""What a repository is for; the hubs keep the two apart, and one name may stand for both."""


class Address(NamedTuple):
    """An address taken apart; an empty revision is the hub's default, an empty folder the whole repository."""

    hub: str
    repository: str
    revision: str
    holding: Holding = "model"
    folder: str = ""


def patiently(attempt: Callable[[], T], say: Callable[[str], None], failure: str) -> T:
    """What `attempt` returns; `Temporary` trouble is told to `say`, waited out, and `attempt` made again.

    Raises SuiteError, which begins with `failure`, where it does not pass.
    """
    waits = iter(WAITS)
    while True:
        try:
            return attempt()
        except Temporary as error:
            wait = next(waits, None)
            if wait is None:
                hint = "nothing is lost, the same command continues"
                raise SuiteError(f"{failure}: {error}", hint=hint) from None
            say(f"{error}; trying again")
            time.sleep(wait)


@dataclass(frozen=True)
class RemoteFile:
    """A file at the hub: the sha256 of its bytes, or the id that git gives them; `ours` when a push brought it."""

    digest: str
    ours: bool


@dataclass(frozen=True)
class Remote:
    """What one branch of a repository holds now."""

    commit: str
    private: bool
    files: Mapping[str, RemoteFile]


@dataclass(frozen=True)
class Listed:
    """A file that can be fetched: its size in bytes, and a digest as in `RemoteFile` or "" where the hub has none."""

    size: int
    digest: str


@dataclass(frozen=True)
class Listing:
    """What one commit of a repository holds, by path; where a hub has no commits, `commit` is a hash of the list."""

    commit: str
    files: Mapping[str, Listed]


@dataclass(frozen=True)
class Changes:
    """What makes a branch hold a package: files to send, and earlier ones of ours to remove.

    `foreign` are those to send in whose place something lies that no push of ours brought.
    """

    send: list[str]
    remove: list[str]
    foreign: list[str]


class Hub(Protocol):
    """One branch of one repository. Methods raise `Temporary`, or SuiteError for what waiting does not cure."""

    url: str

    def check(self) -> None:
        """Whether a push could begin, seen without the network: the name, a token."""

    def look(self) -> Remote | None:
        """What is there; None without the repository or the branch."""

    def create(self, *, public: bool) -> None:
        """Make the repository and the branch, as far as they are missing; hidden until `publish` where that exists."""

    def send(self, folder: Path, changes: Changes, there: Remote, title: str) -> None:
        """Commit `changes` on top of `there`; what an interrupted attempt has sent already is not sent again."""

    def publish(self) -> None:
        """Let everybody see the repository."""

    def listing(self, commit: str = "") -> Listing:
        """The files of that commit, or of the branch's newest."""

    def fetch(self, folder: Path, commit: str, files: Mapping[str, Listed]) -> None:
        """Put these files of a commit into `folder`; what an interrupted attempt left there is used."""


def at(address: str) -> Hub:
    """The hub, repository and branch of an address; raises SuiteError where its library is missing."""
    asked = parts(address)
    if asked.hub == "hf":
        from export.hub.huggingface import HuggingFace

        return HuggingFace(asked.repository, asked.revision, asked.holding)
    try:
        from export.hub.modelscope import ModelScope
    except ModuleNotFoundError:
        raise SuiteError("ModelScope's library is not installed", hint='pip install "suite[modelscope]"') from None
    return ModelScope(asked.repository, asked.revision, asked.holding)


def parts(address: str) -> Address:
    """`hf:org/name@branch` or `hf:datasets/org/name/folder@branch` taken apart."""
    hub, _, rest = address.partition(":")
    path, _, revision = rest.partition("@")
    if not re.match(DATA_ADDRESS, address):
        return Address(hub, path, revision)
    _, owner, name, *folder = path.split("/")
    return Address(hub, f"{owner}/{name}", revision, "dataset", "/".join(folder).strip("/"))


def listed(package: Path) -> dict[str, str]:
    """The sha256 of every file of a package by its name, as its list says, and of the list itself."""
    file = package / CHECKSUMS
    if not file.is_file():
        raise SuiteError(
            f"not a package: it has no {CHECKSUMS}", where=str(package), hint="make one with: suite export"
        )
    lines = (re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line) for line in file.read_text("utf-8").splitlines())
    return {match[2]: match[1] for match in lines if match} | {CHECKSUMS: sha256(file)}


def compare(package: Path, files: Mapping[str, str], there: Mapping[str, RemoteFile]) -> Changes:
    """What to change at a hub that holds `there`, so that it holds `files` (sha256 by name) of `package`.

    What others put there and the package lacks stays. What an earlier push brought and the package lacks goes: shards
    or quantized files of an older version beside the new ones would make readers load a mixture.
    """
    differing = [
        name for name, digest in files.items() if name in there and not _same(package / name, digest, there[name])
    ]
    return Changes(
        send=sorted([*differing, *(name for name in files if name not in there)]),
        remove=sorted(name for name, file in there.items() if file.ours and name not in files),
        foreign=sorted(name for name in differing if not there[name].ours),
    )


def _same(file: Path, digest: str, there: RemoteFile) -> bool:
    return there.digest == (digest if len(there.digest) == len(digest) else git_hash(file))


def git_hash(file: Path) -> str:
    """The id (SHA-1) that git gives the content of `file`."""
    hashed = hashlib.sha1(b"blob %d\0" % file.stat().st_size, usedforsecurity=False)
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            hashed.update(block)
    return hashed.hexdigest()


def verify(package: Path, files: Mapping[str, str]) -> None:
    """That the files are what the package's list says; raises SuiteError naming the first that is not."""
    for name, digest in files.items():
        if not (package / name).is_file():
            raise SuiteError(f"{name} is in {CHECKSUMS}, but not in the folder", where=str(package))
        if sha256(package / name) != digest:
            hint = f"if the change is meant, list it anew: sha256sum FILES > {CHECKSUMS}"
            raise SuiteError(f"{name} is not what {CHECKSUMS} says", where=str(package), hint=hint)
