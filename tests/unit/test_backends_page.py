"""The page with what each backend answers says what the kept results say."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[2] / "docs" / "make_backends.py"
JUNIT = """
<testsuites><testsuite>
<testcase classname="tests.contract.test_endpoint" name="test_models[vllm]"/>
<testcase classname="tests.contract.test_endpoint" name="test_bad_bodies[vllm-chat-1]"/>
<testcase classname="tests.contract.test_endpoint" name="test_bad_bodies[vllm-chat-2]">
  <skipped message="vllm takes any bias|size" type="pytest.skip"/></testcase>
<testcase classname="tests.contract.test_endpoint" name="test_bad_bodies[torch-chat-2]">
  <failure message="x">y</failure></testcase>
<testcase classname="tests.contract.test_own_tools.TestOwn" name="test_calls[vllm]">
  <skipped message="vllm has nothing like it" type="pytest.skip"/></testcase>
<testcase classname="tests.contract.test_relay" name="test_a_stream"/>
</testsuite></testsuites>
"""


def made() -> Any:
    spec = importlib.util.spec_from_file_location("make_backends", FILE)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_kept_results_make() -> None:
    module = made()
    kept = json.loads(module.KEPT.read_text("utf-8"))
    assert module.PAGE.read_text("utf-8") == module.page(kept)
    assert set(kept["results"]) == set(kept["versions"]) == set(module.BACKENDS)


def test_results_of_a_run(tmp_path: Path) -> None:
    module, file = made(), tmp_path / "run.xml"
    file.write_text(JUNIT)
    found = module.read(file)
    assert found == {
        "vllm": {
            "test_endpoint": {"test_models": {"passed": 1}, "test_bad_bodies": {"passed": 1, "takes any bias|size": 1}},
            "test_own_tools": {"test_calls": {"has nothing like it": 1}},
        },
        "torch": {"test_endpoint": {"test_bad_bodies": {"failed": 1}}},
    }
    rows = module.page({"versions": {}, "results": found}).splitlines()
    assert "| Models | — | passed | — |" in rows
    assert "| Bad bodies | 1 **failed** | passed (1); *different*: takes any bias\\|size | — |" in rows
    assert "| Calls | — | — | — |" in rows
