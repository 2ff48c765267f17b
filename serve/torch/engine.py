"""Continuous batching in a background thread: requests join and leave between any two steps.

submit ──> waiting ──> running rows ──> done          a step: schedule, move rows, forward, sample, tell
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from serve.folders import check_fits, read_adapter, read_model
from serve.generation import Finish, Generation, Request
from serve.torch.forward import Forward
from serve.torch.loading import cache_cells, load_model
from serve.torch.lora import MultiLora
from serve.torch.sampling import sample, score
from serve.torch.scheduler import Scheduler, Step
from suite.errors import SuiteError, near

log = logging.getLogger("serve")


class Engine:
    """One model, its adapters, and the thread that runs them.

    `dtype` "auto" is float32 on a CPU and the checkpoint's on a GPU. `max_batch` rows run at once; prompt and answer
    have at most `max_length` tokens together. `notify` is called in the engine's thread after each step, with the
    generations that have new tokens or ended.
    """

    def __init__(
        self,
        model: Path,
        adapters: Mapping[str, Path] | None = None,
        *,
        dtype: str = "auto",
        max_batch: int = 64,
        max_length: int | None = None,
        notify: Callable[[list[Generation]], None] = lambda _: None,
    ) -> None:
        folder = read_model(model)
        loras = {name: read_adapter(path) for name, path in (adapters or {}).items()}
        for lora in loras.values():
            check_fits(lora, folder)
        self.model = load_model(folder, dtype)
        self.adapters = MultiLora(self.model, loras) if loras else None
        cells = cache_cells(self.model)
        self.max_length = min(max_length or folder.max_length, cells)
        self.vocabulary = int(self.model.config.get_text_config().vocab_size)
        # prompt logprobs need all logits of a step at once: 2**26 of them are 256 MB in float32
        budget = max(64, min(1024, 2**26 // self.vocabulary))
        self.scheduler = Scheduler(max_batch, cells, chunk=min(512, budget), budget=budget)
        self.failures = 0
        """Steps that ended in an exception, since the start."""
        self._forward = Forward(self.model, self.adapters)
        self._notify = notify
        self._inbox: deque[Generation] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Generation:
        """Queue a request; raises SuiteError for one that can never run."""
        known = self.adapters.names if self.adapters else []
        if request.adapter and request.adapter not in known:
            raise SuiteError(f"unknown adapter '{request.adapter}'", hint=near(request.adapter, known))
        if not request.prompt:
            raise SuiteError("the prompt is empty")
        length = len(request.prompt) + (request.max_tokens > 0)
        if length > self.max_length:
            raise SuiteError(
                f"the prompt has {len(request.prompt)} tokens; this server's limit is {self.max_length} tokens "
                "for prompt and answer together"
            )
        if not all(0 <= token < self.vocabulary for token in request.prompt):
            raise SuiteError(f"token ids must be from 0 to {self.vocabulary - 1}")
        generation = Generation(request)
        with self._wake:
            self._inbox.append(generation)
            self._wake.notify()
        return generation

    def generate(self, requests: Iterable[Request]) -> list[Generation]:
        """Run requests together, and wait for all of them."""
        return [generation.wait() for generation in [self.submit(request) for request in requests]]

    def cancel(self, generation: Generation) -> None:
        """End a generation; its row is free before the next step."""
        with self._wake:
            generation.cancelled = True
            self._wake.notify()

    @property
    def alive(self) -> bool:
        """Whether the thread still takes requests."""
        return self._thread.is_alive() and not self._closing

    @property
    def load(self) -> tuple[int, int]:
        """How many generations run, and how many wait."""
        return len(self.scheduler.running), len(self.scheduler.waiting) + len(self._inbox)

    def close(self) -> None:
        """Cancel everything and end the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _loop(self) -> None:
        with torch.inference_mode():
            while self._collect():
                try:
                    self._step()
                except Exception as error:
                    log.exception("a step failed; its requests end with an error")
                    self._fail(error)
        for generation in [*self.scheduler.running, *self.scheduler.waiting, *self._inbox]:
            self._end(generation, "cancelled")
        self._forward.clear()

    def _collect(self) -> bool:
        """Take in what was submitted or cancelled; waits while there is nothing to do. False when closing."""
        with self._wake:
            while not (self._closing or self._inbox or self.scheduler.running or self.scheduler.waiting):
                self._wake.wait()
            while self._inbox:
                self.scheduler.add(self._inbox.popleft())
        for generation in [*self.scheduler.running, *self.scheduler.waiting]:
            if generation.cancelled:
                self.scheduler.remove(generation)
                self._end(generation, "cancelled")
        return not self._closing

    def _step(self) -> None:
        step = self.scheduler.schedule()
        self._forward.move(self.scheduler.take_moves())
        if step is None:
            return
        logits = self._forward.run(step, self.scheduler.running)
        self._score_prompts(step, logits)
        ready = set(map(id, self.scheduler.advance(step)))
        rows = [i for i, generation in enumerate(step.rows) if id(generation) in ready]
        if rows:
            last = [step.counts[i] - 1 if logits.shape[1] > 1 else 0 for i in rows]
            everyone = len(rows) == len(logits) and logits.shape[1] == 1
            self._sample([step.rows[i] for i in rows], logits[:, 0] if everyone else logits[rows, last])

    def _score_prompts(self, step: Step, logits: torch.Tensor) -> None:
        for row, generation in enumerate(step.rows):
            top = generation.request.prompt_logprobs
            begin = generation.cached
            following = generation.request.prompt[begin + 1 : begin + 1 + step.counts[row]]
            # what a preempted generation reads again was scored the first time
            if top is not None and following and len(generation.prompt_scores) == begin:
                generation.prompt_scores += score(logits[row, : len(following)], following, top)

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
        tokens = sample(logits, [generation.request.sampling for generation in generations])
        tops = [generation.request.logprobs for generation in generations]
        if asked := [top for top in tops if top is not None]:
            for generation, scored, top in zip(generations, score(logits, tokens, max(asked)), tops, strict=True):
                if top is not None:
                    generation.scores.append(replace(scored, top=scored.top[:top]))
        for generation, token in zip(generations, tokens, strict=True):
            try:
                self._take(generation, token)
            except Exception as error:  # from its own `stop`: no reason to fail its neighbours
                log.exception("a request's stop function failed")
                self.scheduler.remove(generation)
                generation.end("error", f"{type(error).__name__}: {error}")
        self._notify(generations)

    def _take(self, generation: Generation, token: int) -> None:
        request = generation.request
        generation.tokens.append(token)
        finish: Finish | None = None
        if token in request.stop_ids or (request.stop is not None and request.stop(token)):
            finish = "stop"
        elif len(generation.new) >= request.max_tokens or len(generation.tokens) >= self.max_length:
            finish = "length"
        if finish:
            self.scheduler.remove(generation)
            generation.end(finish)

    def _end(self, generation: Generation, finish: Finish, error: str = "") -> None:
        generation.end(finish, error)
        self._notify([generation])

    def _fail(self, error: Exception) -> None:
        """End what ran with an error; what waits goes on with an empty cache."""
        self.failures += 1
        for generation in [*self.scheduler.running]:
            self.scheduler.remove(generation)
            if generation.finish is None:
                self._end(generation, "error", f"{type(error).__name__}: {error}")
        self.scheduler.take_moves()
        self._forward.clear()
