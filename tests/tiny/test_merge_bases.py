"""Bases of every form: sharded, tied, PyTorch's pickled ones, quantized; and new tokens through the whole stage."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from export.merge import Merge, merge
from export.package import Export
from export.tensors import read_checkpoint
from suite.errors import SuiteError
from suite.stages import Artifact
from suite.store import Store, home
from tests.tiny.export_jobs import run
from tests.tiny.merge_jobs import random_adapter, weights
from tests.tiny.tiny_models import tiny_model

ROOT = Path(__file__).resolve().parents[2]


def pickled(base: Path, folder: Path, shards: int = 1, **more: Any) -> Path:
    """The model in `base` as PyTorch saved models once, its head beside the embedding that it shares."""
    folder.mkdir()
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    state = dict(weights(base))
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    state |= more
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return folder
    weight_map = {name: f"pytorch_model-{i % shards + 1:05}-of-{shards:05}.bin" for i, name in enumerate(state)}
    for file_name in set(weight_map.values()):
        torch.save({n: state[n] for n, f in weight_map.items() if f == file_name}, folder / file_name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pickled_base_merges_to_the_same_numbers(tmp_path: Path, shards: int, dtype: str) -> None:
    base = tiny_model(tmp_path / "base", hidden=64, dtype=dtype)
    adapter = random_adapter(base, tmp_path / "adapter")
    for source, out in ((base, "one"), (pickled(base, tmp_path / "bin", shards), "two")):
        merge(source, [adapter], tmp_path / out, 10**9)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()  # the tied head is stored once
    assert all(one[name].equal(two[name]) for name in one)
    assert not list((tmp_path / "two").glob("*.bin*"))


def test_the_stage_merges_a_pickled_base_and_compares_it(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", hidden=64)
    adapter = random_adapter(base, tmp_path / "adapter")
    bin_base = pickled(base, tmp_path / "bin")
    metrics = run(Merge(adapter="a", base="b"), tmp_path / "out", adapter=adapter, base=bin_base)
    assert metrics["parity"]["kl"] < 1e-9


def test_views_of_one_storage_are_read_where_they_lie(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(6, 4)
    torch.save({"all": whole, "tail": whole[2:], "again": whole, "b": torch.ones(2, dtype=torch.int64)}, tmp_path / "x")
    (tmp_path / "x").rename(tmp_path / "pytorch_model.bin")
    found = read_checkpoint(tmp_path)
    assert found["tail"].start - found["all"].start == 2 * 4 * 4
    assert found["all"].start == found["again"].start
    assert (found["b"].dtype, found["b"].size) == ("I64", 16)
    data = b"".join(bytes(block) for block in found["tail"].blocks())
    assert torch.frombuffer(bytearray(data), dtype=torch.float32).view(4, 4).equal(whole[2:])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"a": torch.ones(2), "where": pathlib.PurePosixPath("x")}, "holds more than weights"),
        ({"model": {"a": torch.ones(2)}}, "not a table of weights"),
        ({"a": torch.ones(2, 3).T}, "'a' is not contiguous"),
        ({"a": torch.ones(2, dtype=torch.complex128)}, "'a' is torch.complex128"),
    ],
)
def test_a_pickle_of_something_else_is_refused_without_running_it(tmp_path: Path, content: Any, said: str) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(SuiteError, match=said) as caught:
        read_checkpoint(tmp_path)
    assert caught.value.where.endswith("pytorch_model.bin")
    assert caught.value.hint


def test_damaged_and_ancient_pickles_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(1000)}, file)
    good = file.read_bytes()
    for damaged in (b"", b"junk" * 100, good[:2000]):
        file.write_bytes(damaged)
        with pytest.raises(SuiteError, match=r"not a readable PyTorch file|more than weights"):
            read_checkpoint(tmp_path)
    torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(SuiteError, match=r"PyTorch before 1\.6"):
        read_checkpoint(tmp_path)


def test_a_pickled_model_is_exported_after_it_was_saved_again(tmp_path: Path) -> None:
    base = pickled(tiny_model(tmp_path / "base", hidden=64), tmp_path / "bin")
    with pytest.raises(SuiteError, match=r"the folder has no \*.safetensors") as caught:
        run(Export(model="m", to="hf"), tmp_path / "out", model=base)
    assert "save_pretrained(other)" in caught.value.hint


def test_an_adapter_is_exported_with_its_licence(tmp_path: Path) -> None:
    adapter = random_adapter(tiny_model(tmp_path / "base", hidden=64), tmp_path / "adapter", target_modules=["q_proj"])
    for name in ("LICENSE", "NOTICE.txt"):
        (adapter / name).write_text(f"terms in {name}")
    run(Export(model="a", to="hf", base_model="org/base"), tmp_path / "out", model=Artifact(adapter, "adapter"))
    assert (tmp_path / "out" / "LICENSE").read_text() == "terms in LICENSE"
    assert (tmp_path / "out" / "NOTICE.txt").is_file()


MEMORY = """
import re, sys
from pathlib import Path
from export import torchbin
from export.lora import blocks
from export.lora.fit import ALONE, Combination
from export.merge import merge
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
base, *adapters, out = map(Path, sys.argv[1:])
how = ALONE if len(adapters) == 1 else Combination((1.0,) * len(adapters), "ties", density=0.3)
before = peak()
merge(base, adapters, out, 10**9, how=how)
print(peak() - before)
"""
BIG = (4096, 8192)
"""128 MiB as float32."""


def beside(base: Path, folder: Path) -> Path:
    """The model in `base` with a large tensor more."""
    shutil.copytree(base, folder)
    save_file({**weights(base), "extra.weight": torch.ones(BIG)}, folder / "model.safetensors")
    return folder


def of_the_large_one(folder: Path, magnitude: bool = False, seed: int = 0) -> Path:
    """An adapter that changes that tensor."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    pair = {"A": torch.randn(2, BIG[1], generator=generator), "B": torch.randn(BIG[0], 2, generator=generator)}
    tensors = {f"base_model.model.extra.lora_{part}.weight": tensor for part, tensor in pair.items()}
    if magnitude:
        tensors["base_model.model.extra.lora_magnitude_vector"] = torch.ones(BIG[0])
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "use_dora": magnitude}))
    return folder


@pytest.mark.parametrize("kind", ["plain", "dora", "ties", "pickled"])
def test_memory_does_not_grow_with_a_tensor(tmp_path: Path, kind: str) -> None:
    base = tiny_model(tmp_path / "base", hidden=64, layers=1)
    source = pickled(base, tmp_path / "bin", **{"extra.weight": torch.ones(BIG)}) if kind == "pickled" else None
    source = source or beside(base, tmp_path / "large")
    count = 2 if kind == "ties" else 1
    adapters = [of_the_large_one(tmp_path / f"a{i}", kind == "dora", seed=i) for i in range(count)]
    given = [str(folder) for folder in (source, *adapters, tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", MEMORY, *given], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not weights(tmp_path / "out")["extra.weight"].equal(torch.ones(BIG))
    # far below the 150 MiB and the largest tensor that are promised: it is never held
    assert float(done.stdout) < 100


def quantized(folder: Path, parent: Path | None) -> Artifact:
    """A folder as the quantize stage records it; of a foreign one, without the record."""
    folder.mkdir()
    (folder / "config.json").write_text('{"quantization_config": {"bits": 4}}')
    if parent:
        made_from = {"path": str(parent), "type": "model", "digest": Store(home()).digest(parent)}
        (folder / "artifact.json").write_text(json.dumps({"name": "small", "inputs": {"model": [made_from]}}))
    return Artifact(folder, "quantized")


def test_an_adapter_of_a_quantized_model_goes_into_what_that_was_made_from(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", hidden=64)
    adapter = random_adapter(base, tmp_path / "adapter")
    small = quantized(tmp_path / "small", base)
    made_from = {"path": str(small.path), "type": "quantized", "digest": "q"}
    (adapter / "artifact.json").write_text(json.dumps({"inputs": {"base": [made_from]}}))
    events: list[dict[str, Any]] = []
    metrics = run(Merge(adapter="a"), tmp_path / "out", events, adapter=adapter)
    assert metrics["parity"]["kl"] < 1e-9
    said = [e["text"] for e in events if e["event"] == "say"]
    assert said == ["merging into 'base', the model that 'small' was quantized from"]
    merge(base, [adapter], tmp_path / "direct", 10**9)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "direct" / "model.safetensors"
    ).read_bytes()


def test_a_quantized_model_of_unknown_origin_says_why_not(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", hidden=64)
    adapter = random_adapter(base, tmp_path / "adapter")
    inputs: dict[str, list[Artifact | None]] = {
        "adapter": [Artifact(adapter, "adapter")],
        "base": [quantized(tmp_path / "small", None)],
    }
    with pytest.raises(SuiteError, match="the base is quantized") as caught:
        Merge(adapter="a", base="b").check(inputs)
    assert "quantize the result" in caught.value.hint


def trained_on(adapter: Path, base: Path, model: Path | None = None) -> Artifact:
    """The adapter with the record of its training: `base`, as `model` (or it itself) is now."""
    made_from = {"path": str(base), "type": "model", "digest": Store(home()).digest(model or base)}
    (adapter / "artifact.json").write_text(json.dumps({"name": "tuned", "inputs": {"base": [made_from]}}))
    return Artifact(adapter, "adapter")


@pytest.mark.parametrize("given", [True, False])
def test_another_base_of_the_same_shapes_is_refused(tmp_path: Path, given: bool) -> None:
    base = tiny_model(tmp_path / "base", hidden=64)
    other = tiny_model(tmp_path / "other", hidden=64, seed=7)
    adapter = random_adapter(base, tmp_path / "adapter")
    if given:
        inputs = {"adapter": [trained_on(adapter, base)], "base": [Artifact(other, "model")]}
    else:  # what is at the recorded place was changed after the training
        inputs = {"adapter": [trained_on(adapter, other, base)]}
    with pytest.raises(
        SuiteError, match="'other' is not the model that 'tuned' was trained on, or has changed"
    ) as caught:
        Merge(adapter="a", base="b" if given else None).check(dict(inputs))
    assert caught.value.where == str(other)
    assert "without artifact.json" in caught.value.hint
    with pytest.raises(SuiteError, match="is not the model that 'tuned' was trained on"):
        Export(model="a", base="b" if given else None, to="gguf").check(
            {"model": inputs["adapter"], "base": list(inputs.get("base", []))}
        )
    (adapter / "artifact.json").unlink()
    Merge(adapter="a", base="b").check({"adapter": [Artifact(adapter, "adapter")], "base": [Artifact(other, "model")]})


def test_the_same_base_at_another_place_is_the_same(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", hidden=64)
    adapter = trained_on(random_adapter(base, tmp_path / "adapter"), base)
    moved = base.rename(tmp_path / "moved")
    Merge(adapter="a", base="b").check({"adapter": [adapter], "base": [Artifact(moved, "model")]})


def test_new_tokens_pass_through_the_whole_stage(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", hidden=64)
    adapter = random_adapter(base, tmp_path / "adapter", tokens=530, target_modules=["q_proj"])
    metrics = run(Merge(adapter="a", base="b"), tmp_path / "out", adapter=adapter, base=base)
    assert metrics["parity"]["kl"] < 1e-9
    assert read_checkpoint(tmp_path / "out")["model.embed_tokens.weight"].shape == (530, 64)
