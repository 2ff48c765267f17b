"""Requests made from the OpenAPI document, right ones and wrong ones: no answer is a 5xx, or other than documented."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.contract.conftest import Served

PATHS = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/tokenize", "/detokenize"]


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("path", PATHS)
def test_what_the_document_says(served: Served, path: str, mode: GenerationMode) -> None:
    operation = schemathesis.openapi.from_url(f"{served.endpoint.url}/openapi.json")[path]["post"]

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
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "base"  # an unknown one would be refused before all else
            case.body.setdefault("max_output_tokens" if "responses" in path else "max_tokens", 2)
        response = case.call(timeout=60)
        # what a schema allows may still mean nothing: a template refuses roles, a vocabulary has an end
        case.validate_response(response, excluded_checks=[positive_data_acceptance])

    ask()
