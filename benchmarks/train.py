"""Tokens per processor second of the `train` stage against a plain torch loop over the same batches, in one process.

The loop is what a person would write by hand: forward, cross entropy on the learnt positions, backward, clip, AdamW.
It is the limit: the stage adds logging, progress, checks and a start of its own. Both see the same batches, on one
thread, and processor time is counted: what else the machine does changes neither the numbers nor their ratio much.

    python benchmarks/train.py [--quick] [--json]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

GOAL = 0.8
SENTENCE = "who are you what can do for me today tell a story about the river and small town please answer in short"


def main() -> None:
    """Measure and print one row a measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under 50 s")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    steps = 6 if arguments.quick else 60
    for measure, lora, packing in (
        ("train lora", True, False),
        ("train lora packed", True, True),
        ("train all parameters", False, False),
    ):
        row = compare(measure, steps, lora=lora, packing=packing)
        if arguments.json:
            print(json.dumps(row))
        else:
            print("{measure:24} ours {ours:8} theirs {theirs:8} {unit}  ratio {ratio:5} goal {goal}".format(**row))


def compare(measure: str, steps: int, *, lora: bool, packing: bool) -> dict[str, Any]:
    """One row: our speed, the loop's, and their ratio; the best of two turns each, taken in turns."""
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(Path(folder), steps, lora=lora, packing=packing)
        speeds = [(setting.ours(), setting.theirs()) for _ in range(2)]
    ours, theirs = (max(values) for values in zip(*speeds, strict=True))
    ratio = round(ours / theirs, 3)
    values = {"ours": round(ours), "theirs": round(theirs), "unit": "tokens/cpu-s", "ratio": ratio}
    return {"measure": measure, **values, "goal": GOAL, "met": ratio >= GOAL}


class Setting:
    """A model of the nano's shape with random weights, and rows of random words."""

    def __init__(self, folder: Path, steps: int, *, lora: bool, packing: bool) -> None:
        from suite.chat import Chat
        from suite.stages import Job
        from suite.train import sft
        from suite.train.stage import Lora, Train
        from tests.tiny.tiny_models import tiny_model

        shape = {"vocab_size": 4096, "intermediate_size": 768, "num_key_value_heads": 2}
        self.base = tiny_model(folder / "base", hidden=256, layers=4, std=0.02, **shape)
        rng = random.Random(0)
        rows = [{"instruction": _sentence(rng), "output": _sentence(rng)} for _ in range(16 * steps)]
        (folder / "rows.json").write_text(json.dumps(rows), "utf-8")
        self.settings = Train(
            base="base",
            data="rows.json",
            lora=Lora() if lora else False,
            max_steps=steps // 2 if packing else steps,
            packing=packing,
            max_length=256,
            batch_size=4 if packing else 8,
            save_steps=10_000,
        )
        self.job = Job("train", {}, folder / "out", folder / "scratch")
        self.chat = Chat.load(self.base)
        self.rows = sft.prepare(self.chat, [folder / "rows.json"], self.settings, self.job).dataset(self.settings)

    def trainer(self) -> Any:
        """The stage's own trainer on a fresh model."""
        from suite.train import sft

        model = sft.load(self.base, self.settings)
        return sft.make_trainer(model, self.chat.tokenizer, self.rows, self.settings, self.job)

    def ours(self) -> float:
        """Tokens per processor second of the stage's trainer."""
        trainer = self.trainer()
        started = time.process_time()
        trainer.train()
        return float(trainer.tokens_seen / (time.process_time() - started))

    def theirs(self) -> float:
        """Tokens per processor second of the loop, on the batches that the trainer would take."""
        import torch

        trainer = self.trainer()
        batches = list(trainer.get_train_dataloader())[: self.settings.max_steps]
        model = trainer.model.train()
        model = model.get_base_model() if self.settings.lora else model
        learnt = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learnt, lr=self.settings.lr, weight_decay=0.0, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
        tokens = 0
        started = time.process_time()
        for batch in batches:
            labels = batch.pop("labels")[:, 1:]
            hidden = model.model(**batch, use_cache=False).last_hidden_state[:, :-1]  # (B, T - 1, hidden)
            kept = labels != -100
            logits = model.lm_head(hidden[kept])
            loss = torch.nn.functional.cross_entropy(logits.float(), labels[kept])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learnt, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            mask = batch.get("attention_mask")
            tokens += batch["input_ids"].numel() if mask is None else int(mask.sum())
        return tokens / (time.process_time() - started)


def _sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(SENTENCE.split(), k=rng.randint(6, 24)))


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main()
