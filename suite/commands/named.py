"""The artifacts that flags name: folders, `@stage` of the newest run, and the base that an adapter records."""

from __future__ import annotations

from pathlib import Path

from suite import store
from suite.commands.pipelines import execute
from suite.config import ArtifactType, Takes
from suite.edges import download
from suite.errors import SuiteError
from suite.pipeline import on_command_line, one_stage
from suite.references import HUBS
from suite.runner import preview
from suite.runs import link
from suite.stages import Artifact


def artifact(text: str, flag: str, *types: ArtifactType, folder: Path | None = None) -> Artifact:
    """What a flag's value, or a setting beside `folder`, names; raises SuiteError for what is missing or of another
    type."""
    if text.startswith(HUBS):
        return _downloaded(text, flag, types)
    found = on_command_line(text, Takes(*types), folder or Path.cwd())
    if isinstance(found, SuiteError):
        raise SuiteError(found.message, where=flag, hint=found.hint)
    return found.artifact


def _downloaded(address: str, flag: str, types: tuple[ArtifactType, ...]) -> Artifact:
    """What lies at a hub, from the store or fetched now."""
    name = address.partition("@")[0].rpartition("/")[2]
    plan = one_stage(name, download(address, flag), Path.cwd())
    made = plan.nodes[name].stage.makes()
    if made not in types:
        raise SuiteError(f"{address} holds {made}, and {' or '.join(types)} is expected", where=flag)
    found = preview(plan, store.Store(store.home()))[name].artifact
    if found is None:
        run_dir, error = execute(plan)
        if error:
            raise error
        found = Artifact(link(run_dir, name).resolve(), made)
    return found


def base_of(adapter: Artifact, flag: str) -> Artifact:
    """The model that an adapter was trained on; raises SuiteError, with a hint at `flag`, where it is not known."""
    recorded = adapter.input("base")
    if recorded is None:
        raise SuiteError(
            "the adapter's folder does not record where its base is", where=str(adapter.path), hint=f"{flag} MODEL"
        )
    if store.Store(store.home()).digest(recorded.path) != recorded.digest:
        raise SuiteError(
            f"{recorded.path} has changed since the adapter was trained on it",
            where=str(adapter.path),
            hint=f"name the model that it was trained on: {flag} MODEL",
        )
    return recorded
