"""One engine as a process: started, watched, started again when it dies, and never left behind.

             ┌── dies, or is unwell for long and ended: ───┐
             v        a pause, longer each time            │
stopped ─> starting ──── answers, and is admitted ──────> ready ─> draining ─> stopped
             └─ dies before it was ever ready, or again and again, or is refused ─> failed
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from serve.engines.causes import ended
from serve.engines.guard import end_session
from suite.errors import SuiteError
from suite.processes import importing, tail

State = Literal["stopped", "starting", "ready", "draining", "failed"]

PORT_TAKEN = ("address already in use", "Errno 98", "EADDRINUSE")


@dataclass(frozen=True)
class Patience:
    """How long is waited for what, in seconds."""

    start: float = 900.0
    """Loading: large checkpoints on slow disks, kernels that are compiled."""
    stop: float = 10.0
    """From SIGTERM to SIGKILL."""
    poll: float = 0.2
    """Between two looks whether it answers."""
    pause: float = 1.0
    """Before the first restart; doubled for each one that follows soon."""
    longest_pause: float = 30.0
    steady: float = 60.0
    """Whoever was ready for so long, and dies, starts with a short pause again."""
    starts: int = 5
    """Starts in a row, none of them steady, after which it counts as failed."""
    end: float = 15.0
    """From an engine's first error to its end: vLLM looks every 5 s whether the process that computes still lives."""
    look: float = 10.0
    """Between two looks whether one that is ready is well."""
    again: float = 1.0
    """The same for one that has said that it is not: requests wait for its next word."""
    unwell: float = 90.0
    """After so long an engine that says that it fails, and answers nothing, is ended. vLLM says so for good; LMDeploy
    also where a step takes 10 s, and itself gives a scheduler that makes none 90 s."""
    silent: float = 180.0
    """The same for one that says nothing at all, which a machine that swaps or compiles may bring about."""


class Unanswered(SuiteError):
    """An engine gave no answer, or an error of its own: this may be its end."""


@dataclass(frozen=True)
class Launch:
    """What to run: the command, and environment variables beside the machine's."""

    command: Sequence[str]
    variables: Mapping[str, str] = field(default_factory=dict)


async def unwatched() -> str:
    """Never returns: for an engine that only its own end takes away."""
    await asyncio.Event().wait()
    return ""


class EngineProcess:
    """A server of another program on a free local port.

    `launch(port)` is asked before every start, so a restart runs with the settings of that moment. `answers(url)` says
    whether it takes requests, and then `admit(url)`, which raises SuiteError, whether they should be given to it.
    `watch()` runs while it is ready, and returns only when it is to be ended, with the reason. `changed` is called
    after each change of `state`. All of it lives in one event loop.
    """

    def __init__(
        self,
        launch: Callable[[int], Launch],
        answers: Callable[[str], Awaitable[bool]],
        log: Path,
        *,
        admit: Callable[[str], Awaitable[None]] | None = None,
        watch: Callable[[], Awaitable[str]] = unwatched,
        changed: Callable[[], None] = lambda: None,
        patience: Patience = Patience(),
    ) -> None:
        self.state: State = "stopped"
        self.url = ""
        self.starts = 0
        """How often it was started."""
        self.error: SuiteError | None = None
        """Why it failed, with the last lines of its log."""
        self.ended = ""
        """How its last life ended, e.g. "died"."""
        self.log = log
        self._launch, self._answers, self._admit = launch, answers, admit
        self._watch, self._changed, self._patience = watch, changed, patience
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin; `state` tells how it goes on."""
        if self.state not in ("stopped", "failed"):
            raise RuntimeError(f"an engine that is {self.state} cannot be started")
        self.error = None
        self._to("starting")
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """End it, whatever it does at the moment; it is gone when this returns."""
        if self._task:
            self._to("draining")
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        self._to("stopped")

    def _to(self, state: State) -> None:
        self.state = state
        self._changed()

    async def _run(self) -> None:
        try:
            await self._live()
        except SuiteError as error:
            self.error = error
        except Exception as error:  # a bug here must not look like an engine that starts for ever
            self.error = SuiteError(f"the engine cannot be watched: {type(error).__name__}: {error}")
        self._to("failed")

    async def _live(self) -> None:
        """Start it and start it again, until SuiteError says why that is useless."""
        patience, restless, was_ready = self._patience, 0, False
        while True:
            steady, self.ended = False, "died"
            async with self._process() as process:
                if await self._until_ready(process):
                    was_ready = True
                    self._to("ready")
                    since = time.monotonic()
                    self.ended = await self._until_over(process)
                    waited = 0 if self.ended == "died" else patience.silent  # for one that was not well any more
                    steady = time.monotonic() - since - waited > patience.steady
                    self._to("starting")  # before it is gone, which one that hangs takes its time for
            restless = 0 if steady else restless + 1
            said = tail(self.log)
            hopeless = not was_ready and not any(sign in said for sign in PORT_TAKEN)
            if hopeless or restless >= patience.starts:
                what = "could not start" if hopeless else f"{self.ended} {restless} times in a row"
                raise ended(what, self.log, process.returncode)
            if was_ready:
                await asyncio.sleep(min(patience.pause * 2 ** (restless - 1), patience.longest_pause))

    @contextlib.asynccontextmanager
    async def _process(self) -> AsyncIterator[asyncio.subprocess.Process]:
        """Run it for as long as the block lasts; see `serve.engines.guard`."""
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.starts += 1
        launch = self._launch(port)
        variables = {**importing(), **launch.variables}
        guard = [sys.executable, "-P", "-m", "serve.engines.guard", str(self._patience.stop)]
        with self.log.open("ab") as log:
            log.write(f"# {' '.join(launch.command)}\n".encode())
            log.flush()
            process = await asyncio.create_subprocess_exec(
                *guard, *launch.command, env=variables, stdin=asyncio.subprocess.PIPE, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        try:
            yield process
        finally:
            assert process.stdin is not None
            process.stdin.close()
            if await asyncio.shield(process.wait()) < 0:
                end_session(process.pid)

    async def _until_ready(self, process: asyncio.subprocess.Process) -> bool:
        deadline = time.monotonic() + self._patience.start
        while process.returncode is None:
            if await self._answers(self.url):
                return await self._admitted(process)
            if time.monotonic() > deadline:
                raise ended(f"was not ready after {self._patience.start:g} s", self.log)
            await asyncio.sleep(self._patience.poll)
        return False

    async def _until_over(self, process: asyncio.subprocess.Process) -> str:
        """Returns when it has died, or is to be ended; how."""
        watching = asyncio.ensure_future(self._watch())
        dying = asyncio.ensure_future(process.wait())
        try:
            await asyncio.wait([watching, dying], return_when=asyncio.FIRST_COMPLETED)
            return "died" if dying.done() else watching.result()
        finally:
            watching.cancel()
            dying.cancel()

    async def _admitted(self, process: asyncio.subprocess.Process) -> bool:
        """Whether it may be given requests; False where it ended while it was looked at."""
        if self._admit:
            try:
                await self._admit(self.url)
            except Unanswered as error:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), self._patience.end)
                if process.returncode is None:
                    raise ended(f"runs, but fails: {error.message}", self.log) from None
        return process.returncode is None


def free_port() -> int:
    """A port of the loopback that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
