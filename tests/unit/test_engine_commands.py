"""How engines are started on machines with GPUs, which CI has none of: their command lines, and who gets which device."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from serve.engines.kind import Kind, gpus
from serve.engines.lmdeploy import Lmdeploy
from serve.engines.process import Launch
from serve.engines.remote import upstreams
from serve.engines.vllm import Vllm
from serve.settings import Settings
from suite import envs
from suite.envs import Environment
from suite.references import nano
from tests.unit.test_serve_folders import adapter

HERE = Environment("here", Path("envs"), interpreter=Path(sys.executable))


@pytest.fixture(autouse=True)
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envs, "device", lambda: "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 5,6,7")


def launched(kind: Kind, replica: int = 0, **options: object) -> Launch:
    return kind.launch(Settings(model=nano(), name="nano", **options), HERE, 9000, "secret", replica)  # type: ignore[arg-type]


def value(words: Sequence[str], option: str) -> str:
    return words[[*words].index(option) + 1]


@pytest.mark.parametrize(
    ("replica", "count", "devices"),
    [
        (0, 1, ["4"]),
        (3, 1, ["7"]),
        (4, 1, ["4"]),  # more replicas than devices: they share
        (0, 2, ["4", "5"]),
        (1, 2, ["6", "7"]),
        (0, 4, ["4", "5", "6", "7"]),
        (1, 4, ["4", "5", "6", "7"]),
        (0, 8, ["4", "5", "6", "7"]),  # the engine says that there are too few
    ],
)
def test_replicas_get_devices_in_turn(replica: int, count: int, devices: list[str]) -> None:
    assert gpus(replica, count) == devices


def test_without_a_list_the_devices_are_numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert gpus(1, 1) in (["1"], ["0"])  # the latter where the machine has but one


@pytest.mark.parametrize("kind", [Vllm(), Lmdeploy()])
def test_several_gpus_hold_one_model(kind: Kind) -> None:
    flag = {"vllm": "--tensor-parallel-size", "lmdeploy": "--tp"}[kind.name]
    launch = launched(kind, 1, tensor_parallel=2)
    assert value(launch.command, flag) == "2"
    assert launch.variables["CUDA_VISIBLE_DEVICES"] == "6,7"
    alone = launched(kind)
    assert flag not in alone.command
    assert alone.variables["CUDA_VISIBLE_DEVICES"] == "4"
    assert not any("secret" in word for word in alone.command)


def test_vllm_on_gpus_takes_its_own_share_and_compiles() -> None:
    launch = launched(Vllm(), memory=0.5, cache_memory=2**30)
    assert value(launch.command, "--gpu-memory-utilization") == "0.5"
    assert value(launch.command, "--kv-cache-memory-bytes") == str(2**30)
    assert value(launch.command, "--dtype") == "auto"
    assert "--enforce-eager" not in launch.command
    assert not any(name.startswith(("VLLM_CPU", "TORCHDYNAMO")) for name in launch.variables)


def test_on_a_cpu_vllm_leaves_the_output_layer_as_it_is_unless_an_adapter_changes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(module: str) -> Sequence[str]:
        return launched(Vllm(), adapters={"a": adapter(tmp_path / module, module=f"base_model.model.{module}")}).command

    assert "--lora-target-modules" not in command("model.layers.0.mlp.up_proj")
    monkeypatch.setattr(envs, "device", lambda: "cpu")
    said = command("model.layers.0.self_attn.q_proj")
    first = said.index("--lora-target-modules") + 1
    layers = said[first : said.index("--lora-modules")]
    assert layers == [f"{name}_proj" for name in ("down", "gate", "k", "o", "q", "up", "v")]
    assert "--lora-target-modules" not in command("lm_head")


def test_models_behind_one_gateway_share_no_device() -> None:
    def model(name: str, **options: int) -> Settings:
        return Settings(model=nano(), name=name, backend="vllm", env_python=sys.executable, **options)

    found = upstreams([model("wide", tensor_parallel=2), model("small"), model("last")])
    taken = [gpus(fleet._first, fleet.settings.tensor_parallel) for fleet in found.values()]  # type: ignore[attr-defined]
    assert taken == [["4", "5"], ["6"], ["7"]]
