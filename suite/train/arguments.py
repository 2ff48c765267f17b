"""What every trainer here asks of transformers, whatever it trains."""

from __future__ import annotations

from typing import Any

import torch

from suite.stages import Job
from suite.train.pretrain import Pretrain
from suite.train.stage import Train


def common(settings: Train | Pretrain, job: Job) -> dict[str, Any]:
    """Arguments: checkpoints in the scratch folder that a crash goes on from, each step's loss, nothing printed."""
    return {
        "output_dir": str(job.scratch / "checkpoints"),
        "num_train_epochs": settings.epochs,
        "learning_rate": settings.lr,
        "warmup_steps": settings.warmup,
        "seed": settings.seed,
        "save_strategy": "steps",
        "save_steps": settings.save_steps,
        "save_total_limit": 2,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
