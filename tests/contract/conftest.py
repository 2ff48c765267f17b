"""One server for all contract tests and each backend: torch, and others where `suite env install NAME` has made them.

LMDeploy has no engine for processors: without a GPU its server runs above another one (`tests/lmdeploy_stub.py`), which
shows its protocol and nothing of how it computes. Where there is one, tests over both carry the marker `gpu`.

Files named test_own_* and classes named Own* are about what only our engine has.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from serve.backends import Endpoint, endpoint
from suite import envs
from tests import lmdeploy_engine
from tests.tiny.tiny_models import tiny_adapter, tiny_model

NANO = Path(__file__).parents[2] / "examples/nano/model"
OTHERS = {name: envs.get(name) for name in ("vllm", "lmdeploy")}  # before each test gets a store of its own
MARKS = [pytest.mark.gpu] if envs.device() == "cuda" else []
BACKENDS = ["torch", *(pytest.param(name, marks=MARKS) for name, found in OTHERS.items() if found.installed)]
VOCABULARY = {"lmdeploy": 480}
"""Tokens of the model; by default it has some that are no tokens of its tokenizer, on which LMDeploy's server fails."""
DIFFERENT = {
    "vllm": {
        "test_chat_is_the_models_own_greedy_answer": "leaves half a character out at the end of an answer",
        "test_bad_bodies[vllm-chat/completions-body10-logit_bias]": "takes any bias",
        "test_a_schema_is_kept_to_in_every_sample_and_streamed": "lets a random model write any white space",
        "test_a_schema_from_pydantic_is_parsed_by_the_client": "lets a random model write any white space",
        "test_logprobs_are_the_models_own": "gives those of the allowed tokens",
        "test_fields[vllm-more9]": "reads a number in quotes",
        "test_fields[vllm-more10]": "takes true for 1",
        "test_fields[vllm-more14]": "takes stop strings of any length",
        "test_fields[vllm-more26]": "leaves out what its own call of the template says",
        "test_odd_and_yet_right[vllm-more0]": "takes four stop strings at most",
        "test_a_context_that_is_a_little_too_long": "names the field max_tokens",
        "test_what_is_not_heeded_is_named": "does not name the fields that it ignores",
        "test_an_adapter_has_tokens_too_and_no_model_is_the_base": "is always asked by name",
    },
    "lmdeploy": {
        "test_chat_is_the_models_own_greedy_answer": "leaves half a character out at the end of an answer",
        "test_echo_scores_the_prompt": "gives no log probabilities of texts: 400 says so",
        "test_log_likelihoods": "gives no log probabilities of texts: 400 says so",
        "test_a_schema_is_kept_to_in_every_sample_and_streamed": "lets a random model write control characters",
        "test_structured_outputs": "goes on with a text in any form, and takes no grammars: 400 says so",
        "test_fields_that_change_the_answer": "has no presence and frequency penalty: 400 says so",
        "test_logprobs_are_the_models_own": "has no presence and frequency penalty: 400 says so",
        "test_tokens_that_end_an_answer": "takes no further end tokens: 400 says so",
        "test_min_tokens_hold_back_the_end_and_stop_strings": "has no least length of a text: 400 says so",
        "test_a_context_that_is_a_little_too_long": "does not name the field",
        "test_what_is_not_heeded_is_named": "does not name the fields that it ignores",
        "test_a_prompt": "has no /tokenize",
        "test_messages_are_what_a_chat_is_asked": "has no /tokenize",
        "test_an_adapter_has_tokens_too_and_no_model_is_the_base": "has no /tokenize",
        "test_bad_bodies[lmdeploy]": "has no /tokenize",
    },
}
"""What another engine does otherwise, in tests that say what ours does."""


def options(backend: str, scratch: Path) -> dict[str, Any]:
    """What its server is started with."""
    if backend == "torch":
        return {}
    found = OTHERS[backend]
    python = lmdeploy_engine.interpreter(found, scratch / "bin") if backend == "lmdeploy" else found.python
    return {"env_python": str(python), "max_length": 2048}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what a backend other than ours does not have, or does otherwise."""
    for item in items:
        backend = getattr(item, "callspec", None) and item.callspec.params.get("served")
        if backend in DIFFERENT:
            if reason := DIFFERENT[backend].get(item.originalname) or DIFFERENT[backend].get(item.name):
                item.add_marker(pytest.mark.skip(reason=f"{backend} {reason}"))
            elif item.path.name.startswith("test_own_") or any(n.name.startswith("Own") for n in item.listchain()):
                item.add_marker(pytest.mark.skip(reason=f"{backend} has nothing like it"))


@dataclass(frozen=True)
class Served:
    """A running endpoint, the folders behind it, and clients for it."""

    backend: str
    endpoint: Endpoint
    base: Path
    adapters: dict[str, Path]
    offered: Path
    """A folder from which adapters may be loaded: copies of a and b lie deeper in it."""
    openai: openai.OpenAI
    http: httpx.Client


@pytest.fixture(scope="session", params=BACKENDS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("served")
    base = tiny_model(root / "base", vocab=VOCABULARY.get(request.param, 512))
    adapters = {name: tiny_adapter(base, root / name, rank=4 * i, seed=i) for i, name in enumerate(("a", "b"), 1)}
    offered = root / "offered"
    for name, folder in adapters.items():
        shutil.copytree(folder, offered / "later" / name)
    more = {"lora_dir": [str(offered)], **options(request.param, root)}
    with (
        endpoint(base, adapters, backend=request.param, **more) as running,
        httpx.Client(base_url=running.url, timeout=60) as http,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        yield Served(request.param, running, base, adapters, offered, client, http)


@pytest.fixture(scope="session")
def client() -> Iterator[openai.OpenAI]:
    """A client of nano, which has learnt to answer and to call tools."""
    with (
        endpoint(NANO, name="nano") as running,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client
