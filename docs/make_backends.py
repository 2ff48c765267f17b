"""Writes docs/backends.md: what the tests of the API found over each backend, from results that are kept beside it.

python -m pytest tests/contract -k "[vllm" --junit-xml vllm.xml
python docs/make_backends.py vllm.xml        # keeps what was found of the backends in the file, and writes the page
python docs/make_backends.py --check         # only says whether the page is what the kept results make
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections import Counter
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from suite import envs

ROOT = Path(__file__).parents[1]
KEPT, PAGE = ROOT / "docs" / "backends.json", ROOT / "docs" / "backends.md"
BACKENDS = {"torch": "torch", "vllm": "vLLM", "lmdeploy": "LMDeploy (protocol)"}
ABSENT = "has nothing like it"
INTRODUCTION = """\
# What each backend answers

Made by `docs/make_backends.py` from runs of `tests/contract`; do not edit by hand. Each row is a test that was run over
every backend behind the same gateway, over real HTTP: **passed**, with the number of its cases where it has several;
*different*, with what the engine does instead (such tests say what ours does, and are not run); or — where there is
nothing like it. {counts}

{versions}

The LMDeploy column is about its protocol and nothing more: its real command line, server, parsers and guided decoding
ran above another engine (`tests/lmdeploy_stub.py`), because it has none for processors. None of its kernels was run.
With a CUDA device the same tests run over the real one and over CUDA's vLLM: `tox -e gpu`, never seen to run.
"""

Case = dict[str, int]
"""How many cases ended in which way: "passed", "failed", or the reason why they were left out."""


def read(file: Path) -> dict[str, dict[str, dict[str, Case]]]:
    """Results in a JUnit file, by backend, file of tests and test."""
    found: dict[str, dict[str, dict[str, Case]]] = {}
    for case in ElementTree.parse(file).iter("testcase"):
        name, _, parameters = case.attrib["name"].partition("[")
        backend = re.split(r"[-\]]", parameters)[0]
        if backend not in BACKENDS:
            continue
        skipped = case.find("skipped")
        if skipped is not None:
            about, _, reason = skipped.attrib["message"].partition(" ")
            outcome = reason if about == backend else ABSENT  # other tests are about ours alone
        else:
            outcome = "passed" if case.find("failure") is None and case.find("error") is None else "failed"
        tests = found.setdefault(backend, {}).setdefault(case.attrib["classname"].split(".")[2], {})
        counts = tests.setdefault(name, {})
        counts[outcome] = counts.get(outcome, 0) + 1
    return found


def versions(backend: str) -> str:
    """Of the libraries that answered."""
    if backend == "torch":
        return ", ".join(f"{name} {metadata.version(name).partition('+')[0]}" for name in ("torch", "transformers"))
    pins = dict(pin.split("==") for pin in envs.get(backend).requirements)
    return ", ".join(f"{name} {pins[name]}" for name in (backend, f"{backend}-cpu", "torch") if name in pins)


def page(kept: Mapping[str, Any]) -> str:
    """The whole page."""
    total: Counter[str] = Counter()
    lines: list[str] = []
    files = sorted({file for backend in BACKENDS for file in kept["results"].get(backend, {})})
    for file in files:
        by_backend = {backend: kept["results"].get(backend, {}).get(file, {}) for backend in BACKENDS}
        lines += [f"## {_subject(file)}", "", f"`tests/contract/{file}.py`", ""]
        lines += [f"| what is tested | {' | '.join(BACKENDS.values())} |", "| --- |" + " --- |" * len(BACKENDS)]
        for test in dict.fromkeys(test for tests in by_backend.values() for test in tests):
            cases = [by_backend[backend].get(test, {}) for backend in BACKENDS]
            total.update({b: case.get("passed", 0) for b, case in zip(BACKENDS, cases, strict=True)})
            lines.append(f"| {_in_words(test)} | {' | '.join(map(_cell, cases))} |")
        lines.append("")
    counts = ", ".join(f"{total[backend]} cases over {title}" for backend, title in BACKENDS.items())
    shown = "\n".join(f"- {title}: {kept['versions'].get(b, 'not run')}" for b, title in BACKENDS.items())
    return INTRODUCTION.format(counts=f"Passed: {counts}.", versions=shown) + "\n" + "\n".join(lines).rstrip() + "\n"


def _cell(case: Case) -> str:
    said = [f"{n} **failed**" for outcome, n in case.items() if outcome == "failed"]
    if passed := case.get("passed"):
        said.append(f"passed ({passed})" if sum(case.values()) > 1 else "passed")
    reasons = {outcome: n for outcome, n in case.items() if outcome not in ("passed", "failed", ABSENT)}
    said += [f"*different*: {reason}" + (f" ({n})" if passed and n > 1 else "") for reason, n in reasons.items()]
    return "; ".join(said).replace("|", "\\|") or "—"


def _in_words(test: str) -> str:
    words = test.removeprefix("test_").replace("_", " ")
    return words[:1].upper() + words[1:]


def _subject(file: str) -> str:
    """The first sentence of what the tests say of themselves."""
    said = ast.get_docstring(ast.parse((ROOT / "tests" / "contract" / f"{file}.py").read_text("utf-8"))) or file
    return said.splitlines()[0].rstrip(".")


def main(arguments: list[str]) -> int:
    """Keep what the files hold, and write or check the page."""
    kept: dict[str, Any] = json.loads(KEPT.read_text("utf-8")) if KEPT.is_file() else {"versions": {}, "results": {}}
    if arguments == ["--check"]:
        stale = PAGE.read_text("utf-8") != page(kept)
        print("docs/backends.md is out of date: python docs/make_backends.py" if stale else "up to date")
        return int(stale)
    for file in arguments:
        for backend, results in read(Path(file)).items():
            kept["results"][backend], kept["versions"][backend] = results, versions(backend)
    KEPT.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", "utf-8")
    PAGE.write_text(page(kept), "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
