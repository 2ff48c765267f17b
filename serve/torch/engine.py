"""Continuous batching in a background thread: requests join and leave between any two steps.

submit ──> waiting ──> running rows ──> done          a step: schedule, move rows, forward, sample, tell
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from serve.folders import read_model
from serve.generation import EngineEnded, Finish, Generation, Request, Stats
from serve.torch.adapters import Adapters
from serve.torch.cache import BLOCK, SlotCache
from serve.torch.forward import Forward
from serve.torch.loading import cache_room, load_model, memory_share
from serve.torch.observing import observe
from serve.torch.prefix import Prefixes
from serve.torch.sampling import Sampler, score, spoilt
from serve.torch.scheduler import Reading, Scheduler, Step
from suite.errors import SuiteError

log = logging.getLogger("serve")

PREFIX_SHARE = 0.25
"""How much of the cache may hold keys and values for requests that begin alike."""
WHOLE_LENGTH = 4096
"""Tokens of prompt and answer, unless more are asked for, where prompts are read whole: layers like Mamba's compute the
states behind all tokens at once, which are a megabyte and more for each."""
PREFIX_BLOCK = 16
"""How many tokens are kept together: a request reads again what is behind its last whole block."""
ADAPTER_SHARES = 0.1, 0.1
"""How much of a machine's memory, or of what is free on a GPU, may hold adapters."""
NOT_FINITE = "the model gave numbers that are not finite (NaN or infinity) for this request"


class Engine:
    """One model, its adapters, and the thread that runs them.

    `dtype` "auto" is float32 on a CPU and the checkpoint's on a GPU. `max_batch` rows run at once; prompt and answer
    have at most `max_length` tokens together. `cache_memory` bytes hold keys, values and states, by default a share of
    the machine's; with `prefix_cache` a part of them is for prompts that begin like earlier ones, which are not read
    again so far. `adapter_memory` bytes, a share too, hold the adapters that were asked for last. `notify` is called
    in the engine's thread after each step, with the generations that have new tokens or ended.
    """

    def __init__(
        self,
        model: Path,
        adapters: Mapping[str, Path] | None = None,
        *,
        dtype: str = "auto",
        max_batch: int = 64,
        max_length: int | None = None,
        cache_memory: int | None = None,
        prefix_cache: bool = True,
        adapter_memory: int | None = None,
        notify: Callable[[list[Generation]], None] = lambda _: None,
    ) -> None:
        folder = read_model(model)
        self.model = load_model(folder, dtype)
        reading: Reading = self.model.found.reading
        max_length = max_length or (min(folder.max_length, WHOLE_LENGTH) if reading == "whole" else folder.max_length)
        max_batch, cells = cache_room(self.model, cache_memory, max_batch, -(-max_length // BLOCK) * BLOCK)
        kept = 0
        if prefix_cache and reading == "padded":  # states are not kept: keys and values alone are no beginning
            kept = min(int(PREFIX_SHARE * cells), max_batch * folder.max_length) // PREFIX_BLOCK
        cells = (cells - kept * PREFIX_BLOCK) // BLOCK * BLOCK
        self.max_length = min(max_length, cells)
        self.vocabulary = int(self.model.config.get_text_config().vocab_size)
        # prompt logprobs need all logits of a step at once: 2**26 of them are 256 MB in float32
        budget = max(64, min(1024, 2**26 // self.vocabulary))
        prefixes = Prefixes(kept, PREFIX_BLOCK)
        self.scheduler = Scheduler(
            max_batch, cells, prefixes, chunk=min(512, budget), budget=budget, block=BLOCK, reading=reading
        )
        self.steps = 0
        """Forward passes since the start."""
        self.failures = 0
        """Steps that ended in an exception, since the start; one outside a step ends the thread too."""
        self._last_failure: tuple[str, float | None] = "", None
        self._wake = threading.Condition()
        memory = memory_share(self.model, *ADAPTER_SHARES) if adapter_memory is None else adapter_memory
        self._adapters = Adapters(self.model, folder, memory, self._nudge)
        for name, path in (adapters or {}).items():
            self.load_adapter(name, path)
        self._forward = Forward(self.model, self._adapters, SlotCache(kept, PREFIX_BLOCK, cells))
        self._sampler = Sampler()
        self._notify = notify
        self._open: set[Generation] = set()  # all that was submitted and has not ended
        self._inbox: deque[Generation] = deque()
        self._gone: deque[Generation] = deque()
        self._due = math.inf  # no generation's deadline is earlier
        self._closing, self._cause = False, ""  # why, where nobody asked for it
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Generation:
        """Queue a request; raises SuiteError for one that can never run, EngineEnded where none can any more."""
        if not request.prompt:
            raise SuiteError("the prompt is empty")
        length = len(request.prompt) + (request.max_tokens > 0)
        if length > self.max_length:
            raise SuiteError(
                f"the prompt has {len(request.prompt)} tokens; this server's limit is {self.max_length} tokens "
                "for prompt and answer together"
            )
        whole = self.scheduler.reading == "whole"
        if whole and request.prompt_logprobs is not None and len(request.prompt) > self.scheduler.budget:
            raise SuiteError(
                f"this model reads a prompt at once: only one of up to {self.scheduler.budget} tokens can be scored"
            )
        if not all(0 <= token < self.vocabulary for token in request.prompt):
            raise SuiteError(f"token ids must be from 0 to {self.vocabulary - 1}")
        if not all(0 <= token < self.vocabulary for token in request.sampling.logit_bias):
            raise SuiteError(f"the token ids of logit_bias must be from 0 to {self.vocabulary - 1}", where="logit_bias")
        generation = Generation(request)
        with self._wake:
            if self._closing:
                raise EngineEnded(f"the engine ended: {self._cause}" if self._cause else "the engine is closed")
            generation.weights = request.adapter and self._adapters.find(request.adapter)
            self._open.add(generation)
            self._inbox.append(generation)
            self._wake.notify()
        return generation

    def generate(self, requests: Iterable[Request]) -> list[Generation]:
        """Run requests together, and wait for all of them."""
        return [generation.wait() for generation in [self.submit(request) for request in requests]]

    def cancel(self, generation: Generation) -> None:
        """End a generation; its row is free before the next step."""
        with self._wake:
            self._gone.append(generation)
            self._wake.notify()

    def load_adapter(self, name: str, folder: Path) -> None:
        """Let requests name an adapter, looked into here and read when the first one does. Raises SuiteError.

        Of a name that is taken, new requests get the new adapter; those there are end with the one they have.
        """
        adapter = self._adapters.check(folder)
        with self._wake:
            self._adapters.register(name, adapter)
            self._wake.notify()

    def unload_adapter(self, name: str) -> None:
        """Forget a name; its adapter leaves when the requests that use it have ended. Raises SuiteError."""
        with self._wake:
            self._adapters.unregister(name)
            self._wake.notify()

    @property
    def adapter_names(self) -> list[str]:
        """What requests may name."""
        return self._adapters.names

    @property
    def alive(self) -> bool:
        """Whether the thread still takes requests."""
        return self._thread.is_alive() and not self._closing

    @property
    def load(self) -> tuple[int, int]:
        """How many generations run, and how many wait."""
        waiting = len(self.scheduler.waiting) + len(self._adapters.parked) + len(self._inbox)
        return len(self.scheduler.running), waiting

    def stats(self) -> Stats:
        """What it does at the moment, and did since its start."""
        scheduler, (running, waiting) = self.scheduler, self.load
        prefixes, (failure, failure_time) = scheduler.prefixes, self._last_failure
        return Stats(
            running=running,
            waiting=waiting,
            cells=scheduler.max_cells,
            cells_used=scheduler.cells,
            prefix_cells=prefixes.blocks * prefixes.size,
            prefix_cells_used=len(prefixes) * prefixes.size,
            prefix_queries=scheduler.looked_for,
            prefix_hits=scheduler.found,
            preemptions=scheduler.preemptions,
            steps=self.steps,
            failures=self.failures,
            last_failure=failure,
            last_failure_time=failure_time,
            adapters=self._adapters.stats(),
            adapter_slots=self._adapters.lora.bytes,
        )

    def close(self) -> None:
        """Cancel everything and end the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _nudge(self) -> None:
        with self._wake:
            self._wake.notify()

    def _loop(self) -> None:
        try:
            with torch.inference_mode():
                while self._collect():
                    self._step()
        except BaseException as error:  # of a step come `Exception`s that `_recover` knows; nobody knows this one
            log.critical("the engine ended; all of its requests end with an error", exc_info=error)
            self._cause = self._failed(error)
        finally:
            with self._wake:  # what is submitted from now on is refused
                self._closing = True
            for generation in [generation for generation in self._open if generation.finish is None]:
                self._end(generation, "error" if self._cause else "cancelled", self._cause)
            self._adapters.close()
            self._forward.clear()

    def _failed(self, error: BaseException) -> str:
        """Keep what went wrong for `stats`; returns it."""
        text = f"{type(error).__name__}: {error}"
        self.failures, self._last_failure = self.failures + 1, (text, time.time())
        return text

    def _collect(self) -> bool:
        """Take in what came, end what was cancelled or is due; wait while there is nothing to do. False to close."""
        self._admit()  # what ended since may have made room
        with self._wake:
            while not (self._closing or self._inbox or self._gone or self._adapters.changed or self._has_work()):
                left = self._due - time.monotonic()
                if left <= 0:
                    break
                self._wake.wait(min(left, threading.TIMEOUT_MAX))
            while self._inbox:
                generation = self._inbox.popleft()
                self._due = min(self._due, generation.request.deadline or math.inf)
                if generation.weights:
                    self._adapters.park(generation)
                else:
                    self.scheduler.add(generation)
            self._adapters.retire()
            gone = [*self._gone]  # taken with the inbox: what comes and goes from now on is in neither
            self._gone.clear()
        for generation in gone:
            self._drop(generation, "cancelled")
        if time.monotonic() >= self._due:
            self._expire()
        self._admit()
        return not self._closing

    def _admit(self) -> None:
        """Schedule those whose adapter is in memory; none of the others waits for a disk."""
        go, failed = self._adapters.admit(lambda: [*self.scheduler.running, *self.scheduler.waiting])
        for generation in go:
            self.scheduler.add(generation)
        for generation, error in failed:
            generation.unreadable = True
            self._end(generation, "error", error.message)

    def _has_work(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def _expire(self) -> None:
        now, self._due = time.monotonic(), math.inf
        for generation in [*self.scheduler.running, *self.scheduler.waiting, *self._adapters.parked]:
            if (deadline := generation.request.deadline) is not None:
                if deadline <= now:
                    self._drop(generation, "timeout")
                else:
                    self._due = min(self._due, deadline)

    def _step(self) -> None:
        step = self.scheduler.schedule()
        try:
            if step is not None:
                self._run(step)
        except Exception as error:
            self._recover(step, error)

    def _run(self, step: Step) -> None:
        self.steps += 1
        for generation in step.rows:
            generation.started = generation.started or time.monotonic()
        logits = self._forward.run(step, self.scheduler.running)
        if rows := spoilt(logits, step.counts):
            logits = self._leave_out(rows, step, logits)
        observe(step, logits, self._forward.hidden)
        ready = set(map(id, self.scheduler.advance(step)))
        rows = [i for i, generation in enumerate(step.rows) if id(generation) in ready]
        if rows:
            last = [step.counts[i] - 1 if logits.shape[1] > 1 else 0 for i in rows]
            everyone = len(rows) == len(logits) and logits.shape[1] == 1
            self._sample([step.rows[i] for i in rows], logits[:, 0] if everyone else logits[rows, last])

    def _leave_out(self, rows: list[int], step: Step, logits: torch.Tensor) -> torch.Tensor:
        """End what has numbers that are not finite, and wipe it out: masked or not, they would spoil who comes next.

        Returns the logits of the rows that `step` has afterwards.
        """
        for row in rows:
            log.warning("a request gave numbers that are not finite")
            self._forward.cache.wipe(step.first + row)
            self.scheduler.remove(step.rows[row], keep=False)
            self._end(step.rows[row], "error", NOT_FINITE)
        left = [row for row in range(len(step.rows)) if row not in rows]
        step.rows, step.counts = [step.rows[row] for row in left], [step.counts[row] for row in left]
        if self._forward.hidden is not None:
            self._forward.hidden = self._forward.hidden[left]
        return logits[left]

    def _sample(self, generations: list[Generation], logits: torch.Tensor) -> None:
        for generation in generations:
            if generation.request.max_tokens == 0:
                self.scheduler.remove(generation)
                self._end(generation, "length")
        rows = [i for i, generation in enumerate(generations) if generation.finish is None]
        if len(rows) < len(generations):
            generations, logits = [generations[i] for i in rows], logits[rows]
        if not generations:
            return
        tokens = self._sampler.sample(generations, logits)
        tops = [generation.request.logprobs for generation in generations]
        if asked := [top for top in tops if top is not None]:
            for generation, scored, top in zip(generations, score(logits, tokens, max(asked)), tops, strict=True):
                if top is not None:
                    generation.scores.append(replace(scored, top=scored.top[:top]))
        for generation, token in zip(generations, tokens, strict=True):
            try:
                self._take(generation, token)
            except Exception as error:  # from its own `stop` or grammar: no reason to fail its neighbours
                log.exception("a request's stop function or grammar failed")
                self.scheduler.remove(generation)
                generation.end("error", f"{type(error).__name__}: {error}")
        self._tell(generations)

    def _take(self, generation: Generation, token: int) -> None:
        request = generation.request
        generation.tokens.append(token)
        generation.first_token = generation.first_token or time.monotonic()
        finish: Finish | None = None
        # first, because one that has failed allows nothing but the end
        complete = generation.matcher is not None and generation.matcher.take(token)
        if token in request.stop_ids or (request.stop is not None and request.stop(token)) or complete:
            finish = "stop"
        elif generation.count >= request.max_tokens or len(generation.tokens) >= self.max_length:
            finish = "length"
        if finish:
            self.scheduler.remove(generation)
            generation.end(finish)

    def _end(self, generation: Generation, finish: Finish, error: str = "") -> None:
        generation.end(finish, error)
        self._tell([generation])

    def _tell(self, generations: list[Generation]) -> None:
        self._open.difference_update([generation for generation in generations if generation.finish])
        try:
            self._notify(generations)
        except Exception:  # the answers are right all the same
            log.exception("nobody could be told about new tokens")

    def _drop(self, generation: Generation, finish: Finish, error: str = "") -> None:
        """End a generation early, wherever it is; nothing is done for one that has ended."""
        if generation.finish is None:
            if not self._adapters.remove(generation):
                self.scheduler.remove(generation)
            self._end(generation, finish, error)

    def _recover(self, step: Step | None, error: Exception) -> None:
        """End what the step was made for with an error; all else goes on, with an empty cache.

        Where the memory was short, nothing ends: half as much is tried, down to a request that does not fit alone.
        """
        together = len(self.scheduler.running)
        short = _is_out_of_memory(error) and together > 1
        self.scheduler.reset(together // 2 if short else None)
        self._forward.clear()
        if short:
            log.warning("out of memory with %d requests at once; half of them wait: %s", together, error)
            return
        log.error("a step failed; its requests end with an error", exc_info=error)
        text = self._failed(error)
        for generation in step.rows if step else []:
            self._drop(generation, "error", text)


def _is_out_of_memory(error: Exception) -> bool:
    # on a CPU torch raises a plain RuntimeError, with words that depend on the system
    short = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in short)
