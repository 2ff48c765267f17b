"""Three ways to watch a run: bars on a terminal, plain lines elsewhere, JSON lines for machines."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_EVERY_SECONDS = 5.0
SAID = {
    "cached": "cached",
    "done": "done",
    "failed": "FAILED",
    "blocked": "blocked: what it needs failed",
    "running": "started",
}
STYLES = {"cached": "cyan", "done": "green", "failed": "red", "blocked": "yellow"}


def values_text(values: Mapping[str, float]) -> str:
    """Measured values in one line, e.g. `loss 1.234 tokens_per_s 5120`."""
    return "  ".join(f"{name} {_short(value)}" for name, value in values.items())


def _short(value: float) -> str:
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def line_of(event: Mapping[str, Any]) -> str | None:
    """What an event means to a person, in one line; None for events that say nothing by themselves."""
    match event["event"]:
        case "state" if event["state"] in ("done", "failed"):
            return f"{SAID[event['state']]} in {event['seconds']:.1f} s"
        case "state" if event["state"] in ("cached", "blocked"):
            return SAID[event["state"]]
        case "say":
            return str(event["text"])
        case "warn":
            return f"warning: {event['text']}"
        case "failed":
            hint = f" (hint: {event['hint']})" if event["hint"] else ""
            return f"error: {event['message']}{hint}"
        case "gate":
            return f"gate {'held' if event['held'] else 'FAILED'}: {event['gate']} ({event['reason']})"
    return None


@dataclass
class JsonView:
    """One JSON object a line on stdout."""

    out: TextIO = field(default_factory=lambda: sys.stdout)

    def event(self, stage: str, event: Mapping[str, Any]) -> None:
        print(json.dumps({"stage": stage, **event}, ensure_ascii=False), file=self.out, flush=True)

    def tick(self) -> None:
        """Nothing to redraw."""


@dataclass
class PlainView:
    """Lines for a log file: every state, and progress every few seconds."""

    out: TextIO = field(default_factory=lambda: sys.stderr)
    _last: dict[str, float] = field(default_factory=dict)
    _started: dict[str, tuple[float, float, str]] = field(default_factory=dict)

    def event(self, stage: str, event: Mapping[str, Any]) -> None:
        if event["event"] == "progress":
            self._progress(stage, event)
        elif event["event"] == "state" and event["state"] == "running":
            self._print(stage, "started")
        elif line := line_of(event):
            self._print(stage, line)

    def _print(self, stage: str, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {stage}: {text}", file=self.out, flush=True)

    def _progress(self, stage: str, event: Mapping[str, Any]) -> None:
        now, step, total = time.monotonic(), event["step"], event["total"]
        began, first, what = self._started.get(stage, (now, step, ""))
        if what != event["what"]:
            began, first = now, step
            self._started[stage] = (began, first, event["what"])
        if now - self._last.get(stage, 0) < PLAIN_EVERY_SECONDS:
            return
        self._last[stage] = now
        eta = f"  ETA {(now - began) / (step - first) * (total - step):.0f} s" if step > first else ""
        self._print(stage, f"{event['what']} {step:g}/{total:g}  {values_text(event['values'])}{eta}")

    def tick(self) -> None:
        """Nothing to redraw."""


class RichView:
    """Bars with ETA for what runs, a line above them for what is over."""

    def __init__(self, console: Console, width: int) -> None:
        self.console, self.width = console, width
        self.tasks: dict[str, TaskID] = {}
        self.progress = Progress(
            TextColumn(f"[bold]{{task.description:<{width}}}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[what]} {task.completed:g}/{task.total:g}"),
            TextColumn("[cyan]{task.fields[values]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )

    def __enter__(self) -> RichView:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def event(self, stage: str, event: Mapping[str, Any]) -> None:
        if event["event"] == "progress":
            task = self._task(stage)
            what = {"what": event["what"], "values": values_text(event["values"])}
            if self.progress.tasks[self.progress.task_ids.index(task)].fields["what"] != event["what"]:
                self.progress.reset(task)  # a new phase has an ETA of its own
            self.progress.update(task, completed=event["step"], total=event["total"], **what)
        elif event["event"] == "state" and event["state"] == "running":
            self._task(stage)
        elif line := line_of(event):
            style = STYLES.get(event.get("state", ""), "yellow" if event["event"] == "warn" else "")
            text = escape(line)
            self.progress.print(
                f"[bold]{escape(stage):<{self.width}}[/]  " + (f"[{style}]{text}[/]" if style else text)
            )
        if event["event"] == "state" and event["state"] != "running" and stage in self.tasks:
            self.progress.remove_task(self.tasks.pop(stage))

    def _task(self, stage: str) -> TaskID:
        if stage not in self.tasks:
            self.tasks[stage] = self.progress.add_task(escape(stage), total=1, what="starting", values="")
        return self.tasks[stage]

    def tick(self) -> None:
        """Bars redraw themselves."""


@contextlib.contextmanager
def watching(names: Collection[str], as_json: bool) -> Iterator[JsonView | PlainView | RichView]:
    """The view that fits where the output goes; `names` are what there is to watch."""
    if as_json:
        yield JsonView()
    elif sys.stderr.isatty():
        with RichView(Console(stderr=True), max(map(len, names))) as view:
            yield view
    else:
        yield PlainView()
