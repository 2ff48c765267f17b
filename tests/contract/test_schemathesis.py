"""Requests made from the OpenAPI document, right ones and wrong ones: no answer is a 5xx, or other than documented."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from serve.backends import endpoint
from serve.gateway import create_app
from serve.settings import Settings
from tests.contract.conftest import NANO
from tests.tiny.tiny_models import tiny_adapter, tiny_model

DOCUMENT = create_app(Settings(model=NANO)).openapi()
RIGHT, WRONG = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
OPERATIONS = [
    (path, method, mode)
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
    for mode in ([RIGHT, WRONG] if "requestBody" in operation else [RIGHT])  # any name may stand in a path
]
KNOWN = {"model": "base", "lora_name": "a", "lora_path": "a", "name": "prod"}
"""What the server has: unknown names would be refused before all else."""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("document")
    base = tiny_model(root / "base")
    tiny_adapter(base, root / "adapters" / "a")
    with endpoint(base, lora_dir=[str(root / "adapters")], alias={"prod": {"base": 1.0}}) as running:
        yield running.url


@pytest.mark.parametrize(("path", "method", "mode"), OPERATIONS)
def test_what_the_document_says(url: str, path: str, method: str, mode: GenerationMode) -> None:
    operation = schemathesis.openapi.from_url(f"{url}/openapi.json")[path][method]

    @settings(
        max_examples=20,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        if isinstance(case.body, dict) and not path.startswith("/v1/aliases"):
            case.body |= {name: there for name, there in KNOWN.items() if isinstance(case.body.get(name), str)}
            case.body.setdefault("max_output_tokens" if "responses" in path else "max_tokens", 2)
        if mode is RIGHT and "name" in (case.path_parameters or {}):
            case.path_parameters["name"] = KNOWN["name"]
        response = case.call(timeout=60)
        # what a schema allows may still mean nothing: a template refuses roles, a vocabulary has an end
        case.validate_response(response, excluded_checks=[positive_data_acceptance])

    ask()
