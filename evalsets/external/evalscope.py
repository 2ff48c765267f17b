"""EvalScope's data sets. What it does silently is undone or said here:

- it sends no limit of tokens and no seed: both are always sent;
- a question without an answer ends the run or leaves the denominator: it is kept, with its reason, and counts as wrong;
- what an endpoint refuses (a prompt that is too long) becomes an answer: it counts as failed;
- a metric that cannot be computed is 0, as English BLEU without NLTK's punkt_tab: it is not available;
- its cache knows neither the data nor the weights: it is never used, and each run has a new folder;
- replies that it cannot read, or that run on after the answer, are not counted: they are, and where the answer is a
  letter our own reading of the reply stands beside its own;
- its report loads a script from another site: it is removed.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evalsets.external.harness import Found, Row, Run

TITLE = "EvalScope"
OPTIONS = (
    "subset_list", "few_shot_num", "prompt_template", "system_prompt", "filters", "metric_list", "extra_params",
)  # fmt: skip
LONGEST = 120
"""Characters of a reason."""
SPLITS = ("dev", "val", "test")


def job(work: Run) -> dict[str, Any]:
    """The fields of EvalScope's TaskConfig."""
    settings, task = work.settings, work.asked.task
    arguments: dict[str, Any] = dict(work.options)
    if work.asked.folder:
        arguments["local_path"] = str(_data(work))
        arguments.setdefault("subset_list", _subsets(work.asked.folder))
    generation = {
        "max_tokens": settings.max_tokens, "temperature": settings.temperature, "seed": settings.seed,
        "timeout": work.client.timeout, "retries": 1,
    }  # fmt: skip
    return {
        "model": work.model, "api_url": work.client.root, "eval_type": "openai_api", "datasets": [task],
        "dataset_args": {task: arguments}, "limit": work.limit, "seed": settings.seed,
        "eval_batch_size": work.client.concurrency, "ignore_errors": True,
        "generation_config": generation | ({"stop_seqs": settings.stop} if settings.stop else {}),
        # of the two that would retry, the one that waits longer each time and heeds Retry-After
        "model_args": {"max_retries": work.client.attempts - 1},
        "work_dir": str(work.folder / "run"), "no_timestamp": True, "collect_perf": False,
    }  # fmt: skip


def prepare(work: Run) -> None:
    """Copy C-Eval's layout into one that EvalScope reads from a folder, with each value as the text that it is.

    It would take `1.10` in a .csv file for a number and `NA` for nothing, and wants a README.md with a list of files.
    """
    source, target = work.asked.folder, _data(work)
    if source is None or source == target:
        return
    listed = ["---", "configs:"]
    for subset in _subsets(source):
        listed += [f"- config_name: {subset}", "  data_files:"]
        for split in SPLITS:
            if (path := source / split / f"{subset}_{split}.csv").is_file():
                listed += [f"  - split: {split}", f"    path: {split}/{subset}.jsonl"]
                (target / split).mkdir(parents=True, exist_ok=True)
                with path.open(encoding="utf-8-sig", newline="") as file:
                    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in csv.DictReader(file)]
                (target / split / f"{subset}.jsonl").write_text("".join(lines), "utf-8")
    (target / "README.md").write_text("\n".join([*listed, "---", ""]), "utf-8")


def _data(work: Run) -> Path:
    """Where EvalScope reads the local data."""
    folder = work.asked.folder
    assert folder is not None
    layout = any((folder / split).is_dir() for split in SPLITS) and not (folder / "README.md").exists()
    return work.folder / "data" if layout else folder.resolve()


def _subsets(folder: Path) -> list[str]:
    """The names of the tables that a folder holds, in the layout of C-Eval, `general_mcq` or `general_qa`."""
    validation = [*folder.glob("*_val.*"), *folder.glob("val/*_val.*")]
    return sorted({p.stem.removesuffix("_val") for p in validation} or {p.stem for p in folder.glob("*.jsonl")})


def found(work: Run) -> Found:
    """Read what a finished run left."""
    folder, task = work.folder / "run", work.asked.task
    (folder / "reports" / "report.html").unlink(missing_ok=True)
    found = Found([], "score", None)
    for path in folder.glob(f"reviews/*/{task}_*.jsonl"):
        subset = path.stem.removeprefix(f"{task}_")
        outputs = {line["index"]: line["model_output"] for line in _lines(_beside(path, "predictions"))}
        for review in _lines(path):
            found.rows.append(_row(subset, review, outputs[review["index"]], found))
    found.rows += [_failed(lost) for lost in _lines(folder / "failures.jsonl")]
    if report := next(folder.glob(f"reports/*/{task}.json"), None):
        content = json.loads(report.read_text("utf-8"))
        identity = content["primary_metric_identity"]
        found.reported = next((m["score"] for m in content["metrics"] if m["identity"] == identity), None)
    return found


def _beside(review: Path, kind: str) -> Path:
    return review.parents[2] / kind / review.parent.name / review.name


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            yield from map(json.loads, file)


def _row(subset: str, review: dict[str, Any], output: dict[str, Any], found: Found) -> Row:
    score = review["sample_score"]["score"]
    values = {name: float(value) for name, value in score["value"].items() if isinstance(value, int | float)}
    metric = score["main_score_name"] or next(iter(values), "score")
    found.metric = metric
    for name, why in score["metadata"].get("metric_errors", {}).items():
        found.unavailable |= {v: _one_line(why) for v in values if v.lower().startswith(name.lower())}
    choice, reply = output["choices"][0], str(score["prediction"])
    prompt = [{"role": m["role"], "content": m["content"]} for m in review["messages"] if m["role"] != "assistant"]
    # an answer that EvalScope made of a refusal took no time
    refused = output["time"] is None
    finish = {"max_tokens": "length"}.get(choice["stop_reason"], choice["stop_reason"])
    expected = review["target"]
    return {
        "id": f"{subset}/{review['index']:05d}", "subset": subset, "language": "",
        "prompt": prompt, "reply": "" if refused else reply, "finish": "" if refused else finish,
        "tokens": (output["usage"] or {}).get("output_tokens", 0),
        "error": f"refused: {_one_line(reply)}" if refused else "",
        "expected": expected[0] if isinstance(expected, list) and len(expected) == 1 else expected,
        "parsed": None if refused else score["extracted_prediction"] or None,
        "score": values.get(metric), "metrics": values,
    }  # fmt: skip


def _failed(lost: dict[str, Any]) -> Row:
    return {
        "id": f"{lost['subset']}/{lost['index']:05d}", "subset": lost["subset"], "language": "",
        "prompt": lost["prompt"], "reply": "", "finish": "", "tokens": 0, "error": _one_line(lost["error"]),
        "expected": lost["target"], "parsed": None, "score": None, "metrics": {},
    }  # fmt: skip


def _one_line(text: str) -> str:
    return " ".join(text.replace("*", " ").split())[:LONGEST] or "no reason given"
