"""JUnit XML, in the form that Jenkins, GitLab and GitHub's test reporters read.

<testsuites> <testsuite> <testcase> <failure/> | <error/> | <skipped/>, <system-out/>
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal
from xml.etree import ElementTree

UNWRITABLE = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 cannot hold, escaped or not."""


@dataclass(frozen=True)
class Case:
    """One thing that was checked; `problem` is why it did not pass.

    failure: it was measured and is not good enough; error: it could not be measured; skipped: nobody tried.
    """

    suite: str
    name: str
    problem: str = ""
    kind: Literal["failure", "error", "skipped"] = "failure"
    said: str = ""
    seconds: float = 0.0


def xml(name: str, cases: Sequence[Case]) -> str:
    """The file for some cases; those of one suite stand together."""
    root = ElementTree.Element("testsuites", {"name": _text(name), **_counts(cases)})
    for suite, group in groupby(sorted(cases, key=lambda case: case.suite), key=lambda case: case.suite):
        members = list(group)
        counts = _counts(members) | {"skipped": str(sum(bool(c.problem) and c.kind == "skipped" for c in members))}
        element = ElementTree.SubElement(root, "testsuite", {"name": _text(suite), **counts})
        for case in members:
            _add(element, name, case)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _counts(cases: Sequence[Case]) -> dict[str, str]:
    problems = [case.kind for case in cases if case.problem]
    return {
        "tests": str(len(cases)), "failures": str(problems.count("failure")), "errors": str(problems.count("error")),
        "time": f"{sum(case.seconds for case in cases):.3f}",
    }  # fmt: skip


def _add(suite: ElementTree.Element, name: str, case: Case) -> None:
    about = {"classname": _text(f"{name}.{case.suite}"), "name": _text(case.name), "time": f"{case.seconds:.3f}"}
    element = ElementTree.SubElement(suite, "testcase", about)
    if case.problem:
        problem = ElementTree.SubElement(element, case.kind, {"message": _text(case.problem.split("\n")[0])})
        if case.kind != "skipped":
            problem.set("type", case.kind)
            problem.text = _text(case.problem)
    if case.said:
        ElementTree.SubElement(element, "system-out").text = _text(case.said)


def _text(text: str) -> str:
    return UNWRITABLE.sub("\ufffd", text)
