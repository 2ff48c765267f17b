"""What a trainer tells a job while it trains, and when a checkpoint is complete."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import transformers

from suite.stages import Job
from suite.train import checkpoint


class CountsTokens(Protocol):
    """A trainer that counts what it has read."""

    tokens_seen: int


class Report(transformers.TrainerCallback):  # type: ignore[misc]
    """Progress with loss, learning rate and speed after each step; seals each checkpoint once it is written."""

    def __init__(self, job: Job, trainer: CountsTokens) -> None:
        self.job, self.trainer, self.started = job, trainer, 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.monotonic()

    def on_log(self, _args: Any, state: Any, _control: Any, logs: Mapping[str, float], **_: Any) -> None:
        if "loss" in logs:
            speed = self.trainer.tokens_seen / max(time.monotonic() - self.started, 1e-9)
            values = {"loss": logs["loss"], "lr": logs["learning_rate"], "tokens_per_s": speed}
            self.job.progress(state.global_step, state.max_steps, "train", **values)

    def on_save(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
        checkpoint.seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")
