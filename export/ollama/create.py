"""Making a model with the `ollama` command from an exported package, as a stage that follows the export."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from export.folder import write_json
from export.ollama import server as ollama_server
from suite.config import ArtifactType, Takes
from suite.errors import SuiteError
from suite.stages import Artifact, Job, Stage


class Create(Stage):
    """Make a model with the `ollama` command, and ask it a question: it must read the prompt that the package means.

    Without the command, the stage says what to type where there is one.
    """

    package: Annotated[str, Takes("package")]
    """The package, with its Modelfile."""
    name: str = Field("", pattern=r"^[A-Za-z0-9._/:-]*$")
    """What to call the model; left out: the package's name. One that Ollama has already is never replaced."""

    def makes(self) -> ArtifactType:
        """A receipt."""
        return "receipt"

    def check(self, inputs: Mapping[str, list[Artifact | None]]) -> None:
        """Whether the package is one for Ollama."""
        package = next(iter(inputs.get("package", ())), None)
        if package and not (package.path / "Modelfile").is_file():
            raise SuiteError(
                "the package has no Modelfile", where=str(package.path), hint='export it with to = "ollama"'
            )

    def recipe(self) -> dict[str, Any]:
        """What was only said counts no more once there is an `ollama` command."""
        return {**super().recipe(), "installed": ollama_server.installed()}

    def run(self, job: Job) -> dict[str, Any]:
        """Make it; returns the answer and how many tokens were read, or what to type."""
        package = job.input("package")
        name = self.name or str(package.metrics.get("name") or package.name)
        if ollama_server.installed():
            found = ollama_server.create(package.path, name, job.say, package.metrics.get("prompt_tokens"))
        else:
            found = {"name": name, "typed": ollama_server.typed(package.path, name)}
            job.warn(f"no ollama command was found; the package is made. Where there is one: {found['typed']}")
        write_json(job.out / "receipt.json", found)
        return found
