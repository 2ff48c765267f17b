"""What the bridges to other programs share: names of their sets, what is sent to the endpoint, and the figures.

    evalscope:NAME            a data set of EvalScope, from a hub
    evalscope:NAME=FOLDER     the same with its data in a local folder
    lmeval:TASK               a task of lm-evaluation-harness, or of the .yaml files in FOLDER with `=FOLDER`

Both programs print one number. Here its denominator is all questions: one that got no answer, or one that the endpoint
refused, counts as wrong, is shown, and counts among the failed. The program's own figure is in `reported`.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from pydantic import Field

from evalsets.extract import letter, named, number, same
from evalsets.intervals import intervals
from evalsets.sets import LETTERS, Generation
from evalsets.statistics import are_shares, few, mean_interval
from suite import envs, processes
from suite.errors import SuiteError, near

if TYPE_CHECKING:
    from evalsets.ask import Client

HARNESSES = ("evalscope", "lmeval")
NAME = re.compile(rf"({'|'.join(HARNESSES)}):([^=]*)(?:=(.*))?", re.DOTALL)
OPTION = re.compile(rf"^\(?([{LETTERS}])[).．、:：]\s*(.*\S)", re.MULTILINE)
ANSWERS = "answers.jsonl"
"""To which the scripts append what they are answered."""
NUMERIC = re.compile(r"[-+]?[$¥€£]?\d[\d,]*(?:\.\d+)?\s*%?")
ROUNDED = 1e-3
"""The programs round what they report."""

Row = dict[str, Any]


class Settings(Generation):
    """What the programs send with each question; left to themselves they leave it to the endpoint."""

    max_tokens: int = Field(default=1024, ge=1)
    """Longest reply in tokens, where the set names none; a reply cut there is counted as truncated."""
    args: dict[str, dict[str, Any]] = Field(default={})
    """More options of one set, by its name: those of EvalScope's `dataset_args`, or `num_fewshot` of a task."""


@dataclass(frozen=True)
class External:
    """A set that another program knows: `evalscope:gsm8k`. `folder` holds its data or tasks, where they are local.

    `python` is an interpreter that has the program, where that is not the suite's own environment for it.
    """

    harness: str
    task: str
    folder: Path | None = None
    python: Path | None = None

    @property
    def name(self) -> str:
        """Its name in reports."""
        return f"{self.harness}:{self.task}"

    @property
    def environment(self) -> envs.Environment:
        """Where the program is installed, or would be."""
        return envs.get(self.harness)

    @property
    def digest(self) -> str:
        """Identity of the program with all it needs, the set's name and what is in `folder`.

        What a task names elsewhere, on this machine or on a hub, is not part of it.
        """
        whole = hashlib.sha256(f"{self.environment.digest} {self.name}".encode())
        for path in sorted(p for p in self.folder.rglob("*") if p.is_file()) if self.folder else ():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            whole.update(f"\n{path.relative_to(self.folder or path).as_posix()} {content}".encode())
        return whole.hexdigest()[:16]

    def check(self, settings: Settings) -> None:
        """Raise SuiteError for a folder that is not there, or options that are not known."""
        if self.folder and not self.folder.is_dir():
            raise SuiteError(f"{self.name}: no folder {self.folder}")
        known = _bridge(self).OPTIONS
        for option in settings.args.get(self.name, {}):
            if option not in known:
                raise SuiteError(f"{self.name} takes no option '{option}'", where="args", hint=near(option, known))


def parse(text: str) -> External | None:
    """The set of another program that a name means; None for a set of ours. Raises SuiteError for a name of none."""
    if not (match := NAME.fullmatch(text)):
        return None
    harness, task, folder = match.groups()
    if not task or folder == "":
        raise SuiteError(f"'{text}' names no set", hint=f"{harness}:NAME, or {harness}:NAME=FOLDER")
    return External(harness, task, Path(folder) if folder else None)


@dataclass
class Found:
    """What a program left: a row for each question, with its own score of it, and the figures that it reports.

    `metric` is what `score` in the rows is, None for a question that the program lost; `reported` is its figure of that
    metric over the questions it counts. `unavailable` says by metric why there is none.
    """

    rows: list[Row]
    metric: str
    reported: float | None
    unavailable: dict[str, str] = field(default_factory=dict)


Progress = Callable[[float, float, str], None]
"""Called with the questions that are done, all of them, and what is done."""


@dataclass(frozen=True)
class Run:
    """One set asked at one endpoint, in a folder that holds nothing else."""

    asked: External
    client: Client
    model: str
    settings: Settings
    limit: int | None
    folder: Path

    @property
    def options(self) -> Mapping[str, Any]:
        """What the user adds to this set's own settings."""
        return self.settings.args.get(self.asked.name, {})


def run(work: Run, progress: Progress) -> dict[str, Any]:
    """Ask and report; answers in `work.folder` from a run with nothing changed are used again, what failed is not.

    Returns the set's part of report.json with the rows in "rows". Raises StageFailed when the program fails.
    """
    bridge = _bridge(work.asked)
    job = bridge.job(work)
    # the endpoint's address changes from run to run, and how many requests are open decides nothing
    identity = json.dumps([work.asked.digest, work.model, work.limit, work.settings.model_dump()], sort_keys=True)
    done, key = work.folder / "done", hashlib.sha256(identity.encode()).hexdigest()
    if not (done.is_file() and done.read_text("utf-8") == key):
        _clear(work.folder, key)
        bridge.prepare(work)
        file = work.folder / "job.json"
        file.write_text(json.dumps(job), "utf-8")
        processes.run_script(
            work.asked.python or work.asked.environment.python,
            Path(bridge.__file__).with_name(f"{work.asked.harness}_script.py"),
            [str(file)], work.folder / "log", progress, {"OPENAI_API_KEY": work.client.api_key or "none"},
        )  # fmt: skip
    found: Found = bridge.found(work)
    rows = [_row(row) for row in sorted(found.rows, key=lambda r: str(r["id"]))]
    if not any(row["error"] for row in rows):
        done.write_text(key, "utf-8")
    return {
        "kind": "external", "title": f"{work.asked.task} of {bridge.TITLE}", "digest": work.asked.digest,
        "headline": "score", **figures(found, rows), "rows": rows,
    }  # fmt: skip


def _clear(folder: Path, key: str) -> None:
    """Make a folder ready for a run: nothing but the answers of one with the same `key` stays in it."""
    folder.mkdir(parents=True, exist_ok=True)
    identity = folder / "key"
    same = identity.is_file() and identity.read_text("utf-8") == key
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif not (same and path.name in (identity.name, ANSWERS)):
            path.unlink()
    identity.write_text(key, "utf-8")


def _bridge(asked: External) -> Any:
    from evalsets.external import evalscope, lmeval

    return {"evalscope": evalscope, "lmeval": lmeval}[asked.harness]


def _row(row: Row) -> Row:
    """A row with its digest and, where the answer is a letter or a number, our own reading beside theirs."""
    whole = json.dumps([row["prompt"], row["expected"]], ensure_ascii=False)
    row = {**row, "digest": hashlib.sha256(whole.encode()).hexdigest()[:16]}
    if row["error"]:
        row["score"] = 0.0
    if options := _options(row):
        second = letter(row["reply"], "".join(options)) or named(row["reply"], options)
        row |= {"second": second, "second_score": float(second == row["expected"])}
    elif (right := _number(row["expected"])) and not isinstance(row["parsed"], int):
        second, read = number(row["reply"]), number(str(row["parsed"] or ""))
        row |= {"second": second, "second_score": float(second is not None and same(second, right))}
        if second and read and same(second, read):  # however they write it
            row["second"] = row["parsed"]
    return row


def _number(expected: object) -> str | None:
    """The number that is expected, alone or at the end of a solution as in GSM8K; None for all else."""
    last = expected.rpartition("####")[2].strip() if isinstance(expected, str) else ""
    return number(last) if NUMERIC.fullmatch(last) else None


def _options(row: Row) -> dict[str, str]:
    """A question's options by letter, as its prompt lists them; empty where the answer is none of their letters."""
    prompt = row["prompt"]
    asked = prompt if isinstance(prompt, str) else prompt[-1]["content"] if prompt else ""
    listed = dict(sorted(OPTION.findall(asked)))
    letters = LETTERS.startswith("".join(listed))
    return listed if letters and isinstance(row["expected"], str) and row["expected"] in listed else {}


def figures(found: Found, rows: list[Row]) -> dict[str, Any]:
    """`total`, `subsets` and `problems` of report.json."""
    names = sorted({row["subset"] for row in rows})
    subsets = {name: _figures(found, [r for r in rows if r["subset"] == name]) for name in names}
    total = _figures(found, rows) | {"metric": found.metric}
    if found.reported is not None:
        total["reported"] = found.reported
    if why := found.unavailable.get(found.metric) or _not_a_mean(found):
        total, subsets = {"not_available": why, "n": len(rows), "failed": total["failed"]}, {}
    elif found.unavailable:
        total["unavailable"] = found.unavailable
    return {"total": total, "subsets": subsets}


def _not_a_mean(found: Found) -> str:
    """Why failures cannot be counted back into a figure; empty where it is the mean over the questions."""
    if not found.rows:
        return "no question was asked"
    counted = [row["score"] for row in found.rows if row["score"] is not None]
    if len(counted) < sum(not row["error"] for row in found.rows):
        return f"{found.metric} has no score for each question"
    if found.reported is not None and counted and abs(fmean(counted) - found.reported) > ROUNDED:
        return f"{found.metric} is no mean over the questions: reported is {found.reported:g}, {fmean(counted):g} is"
    return ""


def _figures(found: Found, rows: list[Row]) -> dict[str, Any]:
    scores = [row["score"] or 0.0 for row in rows]
    known = scores and (are_shares(scores) or not few(len(scores)))
    ends = mean_interval(scores)._asdict() if known else {}
    total: dict[str, Any] = {
        "score": fmean(scores) if scores else 0.0, **ends, "n": len(rows),
        "failed": sum(bool(r["error"]) for r in rows), "truncated": sum(r["finish"] == "length" for r in rows),
        "unparsed": sum(r["parsed"] is None and not r["error"] for r in rows),
    }  # fmt: skip
    names = sorted({name for r in rows for name in r["metrics"]} - set(found.unavailable))
    answered = [r["metrics"] for r in rows if not r["error"]]
    total["metrics"] = {name: sum(values.get(name, 0.0) for values in answered) / len(rows) for name in names}
    read = [r for r in rows if not r["error"]]
    if read and all("second" in r for r in read):
        differ = sum(r["second"] != r["parsed"] for r in read)
        total["second"] = {"acc": sum(r["second_score"] for r in read) / len(rows), "differ": differ}
    return total | intervals(total, "score", rows)
