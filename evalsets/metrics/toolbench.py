"""ToolBench's figures of one step (arXiv:2307.16789), as EvalScope's static evaluation defines them.

A step is text: `Action: NAME` and `Action Input: JSON`, of which the last ones count. The action `Finish` gives an
answer or gives up, any other is a call. Each figure is a mean over the steps that have it, as in EvalScope's evaluation
of whole files; that leaves out references that give up, unless the reply gave up too, and here they count.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from evalsets.metrics.overlap import rouge

Plan = Literal["call", "finish", "give up"]
INPUT = "Action Input:"


@dataclass(frozen=True)
class Step:
    """What a text does: its plan, for a call the action and its input, for an answer the `answer`."""

    plan: Plan
    action: str = "none"
    input: str = "{}"
    answer: str = "none"


def read(text: str) -> Step:
    """The last step in a text; one without an action is a call of none."""
    _, has_input, given = text.rpartition(INPUT)
    _, has_action, after = text.rpartition("Action:")
    action = after.partition(INPUT)[0].strip() if has_action else "none"
    given = given.strip() if has_input else "{}"
    if action != "Finish":
        return Step("call", action, given)
    try:
        found = json.loads(given)
        gives_answer = found["return_type"] == "give_answer"
    except (ValueError, KeyError, TypeError):
        return Step("give up")
    if not gives_answer:
        return Step("give up")
    answer = str(found.get("final_answer", "None"))
    return Step("finish", action, given, answer if answer.strip() not in ("", ".", ",") else "None")


FIGURES = ("act_em", "f1", "easy_f1", "hard_f1", "rougeL", "plan_em", "hallu_rate")


def figures(language: str, reply: str, target: str, tools: Collection[str]) -> dict[str, float | None]:
    """FIGURES of one step; None for what it does not have. `tools` are the names on offer.

    Act.EM and F1 are of references that call, ROUGE-L of those that answer; easy F1 of calls without arguments, hard F1
    of those with, and a wrong action is 0 in both. A made-up action counts for the hallucination rate. References that
    call what is not on offer have a plan only.
    """
    right, said = read(target), read(reply)
    found: dict[str, float | None] = dict.fromkeys(FIGURES)
    found["plan_em"] = float(said.plan == right.plan)
    found["hallu_rate"] = float(said.plan != "give up" and _made_up(said, tools))
    if right.plan == "finish":
        found["rougeL"] = rouge(language, said.answer, right.answer)["rougeL"]
    elif right.plan == "call" and not _made_up(right, tools):
        found |= _call(said, right)
    return found


def _call(said: Step, right: Step) -> dict[str, float | None]:
    if said.action != right.action:
        return dict.fromkeys(("act_em", "f1", "easy_f1", "hard_f1"), 0.0)
    arguments = _json(right.input)
    if not isinstance(arguments, dict):  # a reference that nobody can match
        return {"act_em": 1.0}
    f1 = argument_f1(said.input, arguments)
    return {"act_em": 1.0, "f1": f1, "hard_f1" if arguments else "easy_f1": f1}


def _made_up(step: Step, tools: Collection[str]) -> bool:
    return step.action not in tools and step.action not in ("none", "Finish")


def argument_f1(given: str, right: dict[str, Any]) -> float:
    """F1 over the keys of two JSON objects: a right key counts one half, with the right value one."""
    said = _json(given)
    if not isinstance(said, dict):
        return 0.0
    if not right:
        return float(not said)
    hits = sum(1.0 if said[key] == value else 0.5 for key, value in right.items() if key in said)
    return 2 * hits / (len(said) + len(right))


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
