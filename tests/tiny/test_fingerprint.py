"""What a model's card says of its files: the same for the same files in any server, another one for others."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from serve.catalog import Catalog
from serve.families import Family
from serve.settings import Settings
from tests.tiny.tiny_models import tiny_adapter, tiny_model


def fingerprints(base: Path, adapters: dict[str, Path], **engine: Any) -> dict[str, str]:
    async def never(*_: object) -> None:
        raise AssertionError

    family = Family(Settings(model=base, adapters=adapters, **engine), never, never)
    catalog = Catalog([family], {"half": {"a": 0.5, "b": 0.5}})
    return {card["id"]: card["fingerprint"] for card in catalog.listing()["data"]}


def test_fingerprints_tell_files_apart(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base")
    adapters = {name: tiny_adapter(base, tmp_path / name, seed=seed) for seed, name in enumerate("ab")}
    first = fingerprints(base, adapters)
    assert len(set(first.values())) == 4
    assert fingerprints(base, adapters) == first
    for engine in ({"dtype": "bfloat16"}, {"backend": "vllm"}):
        assert not set(fingerprints(base, adapters, **engine).values()) & set(first.values())
    weights = adapters["a"] / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes())
    second = fingerprints(base, adapters)
    assert {name for name in first if first[name] != second[name]} == {"a", "half"}
    shutil.rmtree(adapters["b"])
    third = fingerprints(base, adapters)
    assert {name for name in second if second[name] != third[name]} == {"b", "half"}
