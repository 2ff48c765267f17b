"""Tasks of lm-evaluation-harness: its prompts, filters and metrics, asked at our endpoint.

A task that generates is asked as a chat, one that chooses by likelihood as texts to continue. Its own clients end the
run with the first question that fails; here such a question is kept, with its reason, and counts as wrong.
"""

from __future__ import annotations

import json
from typing import Any

from evalsets.external.harness import Found, Row, Run

TITLE = "lm-evaluation-harness"
OPTIONS = ("num_fewshot", "system_instruction")
INVALID = ("[invalid]", "")
"""What the filters of tasks leave of a reply in which they find no answer."""


def job(work: Run) -> dict[str, Any]:
    """What the script is told."""
    settings, client, folder = work.settings, work.client, work.asked.folder
    return {
        "task": work.asked.task, "include": str(folder.resolve()) if folder else None,
        "url": client.root, "model": work.model, "limit": work.limit,
        "shots": work.options.get("num_fewshot"), "system": work.options.get("system_instruction"),
        "max_tokens": settings.max_tokens, "temperature": settings.temperature, "seed": settings.seed,
        "stop": settings.stop, "concurrency": client.concurrency, "attempts": client.attempts, "pause": client.pause,
        "timeout": client.timeout, "out": str(work.folder / "result.json"),
    }  # fmt: skip


def prepare(work: Run) -> None:
    """Nothing: tasks name their data themselves."""


def found(work: Run) -> Found:
    """Read what a finished run left."""
    content = json.loads((work.folder / "result.json").read_text("utf-8"))
    found = Found([], "score", None)
    for task, samples in content["samples"].items():
        # a task with several filters reads each reply several times; the first is the one it is known by
        first = samples[0]["filter"] if samples else "none"
        for sample in samples:
            if sample["filter"] == first:
                found.metric = sample["metrics"][0]
                reply = content["replies"].get(f"{task}/{sample['doc_id']}", {})
                found.rows.append(_row(task, sample, reply))
    reported = content["results"].get(work.asked.task, {})
    found.reported = next((value for name, value in reported.items() if name.startswith(f"{found.metric},")), None)
    return found


def _row(task: str, sample: dict[str, Any], reply: dict[str, Any]) -> Row:
    values = {m: float(sample[m]) for m in sample["metrics"] if isinstance(sample.get(m), int | float)}
    prompt, first = sample["arguments"][0][0], sample["resps"][0][0]
    generated = isinstance(first, str)
    expected, error = sample["target"], reply.get("error", "")
    parsed: Any = sample["filtered_resps"][0]
    if not generated:  # [log-likelihood, whether greedy] of each option
        likelihoods = [option[0] for option in sample["filtered_resps"]]
        parsed = likelihoods.index(max(likelihoods))
    return {
        "id": f"{task}/{sample['doc_id']:05d}", "subset": task, "language": "",
        "prompt": json.loads(prompt) if generated else prompt, "reply": first if generated else "",
        "finish": reply.get("finish", ""), "tokens": reply.get("tokens", 0), "error": error, "expected": expected,
        "parsed": None if error or parsed in INVALID else parsed,
        "score": values.get(sample["metrics"][0]), "metrics": values,
    }  # fmt: skip
