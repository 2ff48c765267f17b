"""The `push` stage: a package goes to a model hub.

Pushing changes something outside the store, so the store cannot know whether it is done: the stage runs each time,
looks what the hub holds, and sends what differs, which is nothing after the first time. What it made is a receipt:
`suite show @push` says where the package lies and at which commit.

A package's own `push = "hf:org/name"` is this stage too, under the name `<stage>.push`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from export import hub
from export.folder import write_json
from export.hf import CHECKSUMS
from suite.config import ArtifactType, Takes
from suite.errors import SuiteError
from suite.stages import Artifact, Job, Stage


class Push(Stage):
    """Upload a package to a model hub: what is there already is not sent again, what others put there stays.

    Interrupted, the same command continues. Afterwards the hub is looked at again: it holds the package, whole.
    """

    package: Annotated[str, Takes("package")]
    """What to push, e.g. "@export"."""
    to: str = Field(pattern=hub.ADDRESS)
    """Where: "hf:org/name" or "ms:org/name", with "@branch" if it is not the main one."""
    public: bool = False
    """Let everybody see it; otherwise a new repository is private, and a public one is refused."""
    overwrite: bool = False
    """Replace files of the same names that something else than a push of ours put there."""

    def makes(self) -> ArtifactType:
        """A receipt."""
        return "receipt"

    def target(self) -> str:
        """The branch that it changes."""
        return self.to

    def check(self, inputs: Mapping[str, list[Artifact | None]]) -> None:
        """The name, a token and the library that are needed."""
        try:
            hub.at(self.to).check()
        except SuiteError as error:
            raise SuiteError(error.message, where="to", hint=error.hint) from None
        package = next(iter(inputs.get("package", ())), None)
        if package:
            hub.listed(package.path)

    def run(self, job: Job) -> dict[str, Any]:
        """Look, send what differs, look again, until nothing differs; returns what is where."""
        package = job.input("package")
        files = hub.listed(package.path)
        title = f"{package.name} {package.record.get('key') or files[CHECKSUMS][:32]}"
        at = hub.at(self.to)
        done: list[hub.Changes] = []

        def push() -> hub.Remote:
            while True:
                there, new = self._look(at)
                changes = hub.compare(package.path, files, there.files)
                if not changes.send and not changes.remove:
                    if self.public and there.private:
                        at.publish()
                    return there
                if changes in done[-1:]:
                    names = ", ".join(changes.send + changes.remove)
                    raise SuiteError(
                        f"{self.to} took changes that it does not show: {names}", hint="see its .gitignore"
                    )
                self._refuse_foreign([] if new else changes.foreign)
                hub.verify(package.path, {name: files[name] for name in changes.send})
                job.say(f"sending {len(changes.send)} files to {self.to}")
                at.send(package.path, changes, there, title)
                done.append(changes)

        there = hub.patiently(push, job.say, f"{self.to} cannot be pushed to")
        sent, removed = ({name for changes in done for name in getattr(changes, how)} for how in ("send", "remove"))
        return self._arrived(job, at, there, files, {"sent": len(sent), "removed": len(removed)})

    def _refuse_foreign(self, foreign: list[str]) -> None:
        if foreign and not self.overwrite:
            raise SuiteError(
                f"{self.to} has files that no push of the suite put there: {', '.join(foreign)}",
                hint="look at them; then push to another name or branch, or say overwrite = true",
            )

    def _look(self, at: hub.Hub) -> tuple[hub.Remote, bool]:
        """What is there, and whether it was made just now."""
        there, new = at.look(), False
        if there is None:
            at.create(public=self.public)
            there, new = at.look(), True
        if there is None:
            raise hub.Temporary("the repository was made, and is not to be seen yet")
        if not there.private and not self.public:
            hint = "say public = true if everybody may see this package; else push to another name"
            raise SuiteError(f"{self.to} is public", hint=hint)
        return there, new

    def _arrived(
        self, job: Job, at: hub.Hub, there: hub.Remote, files: Mapping[str, str], counts: Mapping[str, int]
    ) -> dict[str, Any]:
        what = f"took {counts['sent']} files" if counts["sent"] else "holds this package already"
        job.say(f"{self.to} {what}: {at.url}" + (f" at {there.commit}" if there.commit else ""))
        pushed = {"to": self.to, "url": at.url, "commit": there.commit, "public": self.public}
        write_json(job.out / "receipt.json", {**pushed, "files": dict(files)})
        return {"pushed": {**pushed, **counts}}
