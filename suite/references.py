"""References to artifacts that no stage makes: folders, files, and the model that comes with the suite."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from suite import quantized
from suite.config import ArtifactType, Takes
from suite.errors import SuiteError
from suite.stages import RECORD, Artifact

NANO = "nano"
HUBS = ("hf:", "ms:")
"""How addresses at model hubs begin."""


@dataclass(frozen=True)
class External:
    """An artifact that exists already; `name` is how the person called it."""

    name: str
    artifact: Artifact


def nano() -> Path:
    """The folder of the embedded model: beside the package when installed, under examples/ in a checkout."""
    here = Path(__file__).parent
    installed, checkout = here / "nano", here.parent / "examples" / "nano" / "model"
    return installed if installed.is_dir() else checkout


def external(reference: str, takes: Takes, folder: Path) -> External | SuiteError:
    """The artifact at a path relative to `folder`; an error says what is missing and the cure."""
    if reference.startswith(HUBS):
        hint = (
            "download it first, and give the file"
            if takes.types == ("dataset",)
            else "suite download makes it a folder"
        )
        return SuiteError(f"'{reference}': no hub address can stand here", hint=hint)
    path = (folder / Path(reference).expanduser()).resolve()
    if reference == NANO and not any((path / name).is_file() for name in ("config.json", RECORD)):
        path = nano()
    if not path.exists():
        return SuiteError(f"no such file or folder: {reference}", hint=f"looked for {path}")
    if "package" in takes.types and path.suffix == ".gguf" and (path.parent / RECORD).is_file():
        only = len([*path.parent.glob("*.gguf")]) == 1
        path = path.parent if only else path  # where it stands what the file was made from
    try:
        found = detect(path, takes)
    except OSError as error:
        return SuiteError(f"{reference}: {error.strerror}", hint="check the permissions of that path")
    if isinstance(found, SuiteError):
        return SuiteError(f"{reference}: {found.message}", hint=found.hint)
    return External(reference, Artifact(path, found))


def detect(path: Path, takes: Takes) -> ArtifactType | SuiteError:
    """The type of what lies at `path`, if it is one that the field takes."""
    wanted = " or ".join(takes.types)
    if takes.types == ("dataset",):
        return "dataset"
    if path.is_file() and path.suffix == ".gguf" and "package" in takes.types:
        return "package"
    if path.is_file():
        return SuiteError(f"this is a file, and a folder with {wanted} is expected")
    if (path / RECORD).is_file():
        found: ArtifactType = json.loads((path / RECORD).read_text("utf-8"))["type"]
    elif takes.types == ("package",) and (path / "checksums.txt").is_file():
        found = "package"
    elif (path / "adapter_config.json").is_file():
        found = "adapter"
    elif (path / "config.json").is_file():
        try:
            found = "quantized" if quantized.settings(path) else "model"
        except SuiteError as error:
            return error
    elif "report" in takes.types and (path / "report.json").is_file():
        found = "report"
    elif "package" in takes.types and any(path.glob("*.gguf")):
        found = "package"
    else:
        names = {"adapter": "adapter_config.json", "report": "report.json", "package": "checksums.txt"}
        files = " or ".join(dict.fromkeys(names.get(t, "config.json") for t in takes.types))
        return SuiteError(f"this folder has no {files}, so it holds no {wanted}", hint="give the folder that holds it")
    if found not in takes.types:
        hint = "merge it first (suite merge)" if found == "adapter" else ""
        return SuiteError(f"this folder holds {found}, and {wanted} is expected", hint=hint)
    return found
