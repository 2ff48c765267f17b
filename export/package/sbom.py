"""A bill of materials of a package, as CycloneDX 1.6: the model, its files, its data, and the libraries that made it.

Written by `cyclonedx-python-lib`, an optional extra. The same package has the same bill: its serial number is derived
from the files' digests, and it carries no time.
"""

from __future__ import annotations

import importlib.metadata
import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from export.folder import write_json
from export.package.lineage import Step

FILE = "sbom.cdx.json"
TYPES = {"dataset": ComponentType.DATA}


def write(
    out: Path, name: str, license: str, steps: Sequence[Step], files: Mapping[str, str], used: Mapping[str, str]
) -> None:
    """Write the bill of the package in `out`.

    `files` has the sha256 of what it holds, `steps` ends with its subject, `used` are the libraries that exported it.
    """
    subject = Component(
        name=name,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="package",
        licenses=[LicenseFactory().make_from_string(license)] if license else (),
        components=[_file(path, digest) for path, digest in sorted(files.items())],
        properties=_properties(steps[-1]),
    )
    sources = [_source(step) for step in steps[:-1]]
    pairs = {pair for step in steps for pair in step.libraries.items()} | set(used.items())
    libraries = [_library(*pair) for pair in sorted(pairs) if not pair[0].startswith("env.")]
    serial = uuid.uuid5(uuid.NAMESPACE_OID, json.dumps([name, sorted(files.items())]))
    bom = Bom(components=[*sources, *libraries], serial_number=serial)
    bom.metadata.component = subject
    bom.register_dependency(subject, [*sources, *libraries])
    content = json.loads(JsonV1Dot6(bom).output_as_string())
    del content["metadata"]["timestamp"]
    write_json(out / FILE, content)


def _file(path: str, digest: str) -> Component:
    hashes = [HashType(alg=HashAlgorithm.SHA_256, content=digest)]
    return Component(name=path, type=ComponentType.FILE, bom_ref=f"file:{path}", hashes=hashes)


def _source(step: Step) -> Component:
    """Data and models that it was made from. Their digests cover whole folders, so they are no hashes of a file."""
    kind = TYPES.get(step.type, ComponentType.MACHINE_LEARNING_MODEL)
    return Component(
        name=step.name, type=kind, bom_ref=f"{step.type}:{step.name}:{step.digest}", properties=_properties(step)
    )


def _properties(step: Step) -> list[Property]:
    named = {"digest": step.digest, "key": step.key, "kind": step.kind}
    return [Property(name=f"suite:{name}", value=value) for name, value in named.items() if value]


def _library(name: str, version: str) -> Component:
    return Component(
        name=name,
        version=version,
        type=ComponentType.LIBRARY,
        bom_ref=f"library:{name}:{version}",
        purl=PackageURL("generic" if name == "suite" else "pypi", name=name.lower().replace("_", "-"), version=version),
        licenses=[LicenseFactory().make_from_string(text)] if (text := _license(name, version)) else (),
    )


def _license(name: str, version: str) -> str:
    """What the installed distribution says of its licence, if it is the version that was used."""
    try:
        metadata = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
    classified = [c.rpartition(" :: ")[2] for c in metadata.get_all("Classifier", []) if c.startswith("License :: OSI")]
    given = next(
        (metadata[key] for key in ("License-Expression", "License") if key in metadata), "".join(classified[:1])
    )
    return given if metadata["Version"] == version and "\n" not in given else ""
