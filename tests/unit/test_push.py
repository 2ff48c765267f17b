"""What a push changes at a hub, and what a model card may say: decided without any hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export import hub
from export.hub.push import Push
from export.package import Export, card
from export.package.lineage import Step
from suite.config import ArtifactType
from suite.errors import SuiteError
from suite.stages import Artifact

NAMES = st.sampled_from(["README.md", "config.json", "model.safetensors", "old.safetensors", "LICENSE"])
DIGESTS = st.sampled_from(["a" * 64, "b" * 64])
REMOTE = st.dictionaries(NAMES, st.builds(hub.RemoteFile, DIGESTS, st.booleans()))


@settings(max_examples=60)
@given(package=st.dictionaries(NAMES, DIGESTS), there=REMOTE)
def test_after_the_changes_the_hub_holds_the_package_and_what_others_added(
    package: dict[str, str], there: dict[str, hub.RemoteFile]
) -> None:
    changes = hub.compare(Path(), package, there)
    after = {name: file.digest for name, file in there.items() if name not in changes.remove}
    after |= {name: package[name] for name in changes.send}
    added = {name: file.digest for name, file in there.items() if not file.ours and name not in package}
    assert after == {**added, **package}
    replaced = {name for name in changes.send if name in there and there[name].digest != package[name]}
    assert set(changes.foreign) == {name for name in replaced if not there[name].ours}
    unchanged = {name for name, file in there.items() if package.get(name) == file.digest}
    assert not unchanged & {*changes.send, *changes.remove}


def test_small_files_are_known_by_the_id_that_git_gives_them(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"hello\n")
    there = {"file": hub.RemoteFile("ce013625030ba8dba906f756967f9e9ca394464a", ours=True)}  # git hash-object
    assert hub.compare(tmp_path, {"file": "0" * 64}, there) == hub.Changes([], [], [])


@pytest.mark.parametrize(
    ("to", "parts"),
    [
        ("hf:org/name", ("hf", "org/name", "")),
        ("ms:org/na.me-1@release/2", ("ms", "org/na.me-1", "release/2")),
        ("hf:name", None),
        ("s3:org/name", None),
        ("hf:org/name@", None),
        ("hf:datasets/org/name", None),
    ],
)
def test_addresses(to: str, parts: tuple[str, str, str] | None) -> None:
    if parts:
        assert hub.parts(Push(package="p", to=to).to) == (*parts, "model", "")
    else:
        with pytest.raises(ValueError, match="pattern"):
            Push(package="p", to=to)


def test_addresses_of_data() -> None:
    found = [hub.parts(f"ms:datasets/org/name{more}") for more in ("", "@v1", "/main/test@refs/convert/parquet")]
    assert found == [
        ("ms", "org/name", revision, "dataset", folder)
        for revision, folder in (("", ""), ("v1", ""), ("refs/convert/parquet", "main/test"))
    ]


def test_the_push_of_an_export_is_a_stage_and_whether_it_is_public_changes_no_bytes() -> None:
    export = Export(model="m", push="hf:org/name", public=True)
    (field, stage), *others = export.followers().values()
    assert (field, others) == ("package", [])
    assert isinstance(stage, Push)
    assert (stage.to, stage.public, stage.target()) == ("hf:org/name", True, "hf:org/name")
    assert export.recipe() == Export(model="m", push="hf:org/name").recipe()
    assert not Export(model="m").followers()


@pytest.mark.parametrize(
    ("given", "where", "message"),
    [
        ({"license": "apache2"}, "license", "did you mean 'apache-2.0'"),
        ({"license": "other"}, "license", "needs a license_name"),
        ({"license": "mit", "license_name": "mine"}, "license_name", 'goes with license = "other" only'),
        ({"license": "other", "license_name": "mine", "license_link": "mine.txt"}, "license_link", "https://"),
        ({"base_model": "/models/base"}, "base_model", "no name on the hub"),
        ({"languages": ["english"]}, "languages", "no language code"),
        ({"datasets": ["org/a/b"]}, "datasets", "no name on the hub"),
    ],
)
def test_metadata_that_the_hub_would_refuse_is_named(given: dict[str, Any], where: str, message: str) -> None:
    with pytest.raises(SuiteError) as error:
        Export(model="m", **given).check({})
    assert error.value.where == where
    assert message in str(error.value)


def test_a_push_that_cannot_begin_is_said_with_its_setting() -> None:
    with pytest.raises(SuiteError, match="HF_HUB_OFFLINE is set") as error:
        Export(model="m", push="hf:org/name").check({})
    assert error.value.where == "push"


BASE = Step("base", "model", "base-digest")
TRAIN = Step("tuned", "adapter", "adapter-1", kind="train")
OTHER = Step("other", "adapter", "adapter-2", kind="train")
MERGE = Step("merged", "model", "merged-digest", kind="merge", inputs={"adapter": ["adapter-1"]})
MIX = Step("mixed", "model", "mixed-digest", kind="merge", inputs={"adapter": ["adapter-1", "adapter-2"]})
SMALL = Step("small", "quantized", "small-digest", kind="quantize", settings={"method": "gptq"})


@pytest.mark.parametrize(
    ("made", "steps", "quantized", "relation"),
    [
        ("adapter", [BASE, TRAIN], False, "adapter"),
        ("model", [BASE, TRAIN, MERGE], False, "finetune"),
        ("model", [BASE, TRAIN, OTHER, MIX], False, "merge"),
        ("quantized", [BASE, SMALL], True, "quantized"),
        ("quantized", [BASE, TRAIN, MERGE, SMALL], True, "finetune"),
        ("model", [BASE], True, "quantized"),  # the base as GGUF, with 8 bits
    ],
)
def test_the_relation_to_the_base(made: ArtifactType, steps: list[Step], quantized: bool, relation: str) -> None:
    described = card.Card("x", Artifact(Path(), made), steps, "", base_model="org/base", quantized=quantized)
    assert described.relation() == relation
