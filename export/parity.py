"""The proof that an artifact equals the one it came from: both answer the same probes, and their logits are compared.

Parent and child are in memory one after the other, never both; the parent's logits wait on disk. Reported, over all
positions of all probes:

    max_dlogit, mean_dlogit   |child - parent| of the logits
    kl                        mean KL(parent || child) per token, in nats
    top1                      share of positions where both prefer the same next token
    ppl_parent, ppl_child     exp of the mean negative log likelihood of the next token
    greedy                    share of the parent's greedy answers that the child gives too, up to where they part
"""

from __future__ import annotations

import gc
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from export.folder import eos_ids, read_config
from export.probes import TEXTS, dialogues
from suite import quantized
from suite.chat import Chat, Message, load_tokenizer
from suite.errors import SuiteError

Progress = Callable[[float, float, str], None]
LONGEST = 256
"""Tokens of a probe that are used, at most."""
NAME = 80
"""Characters of a probe's text that name it."""
FILLED = 0.8
"""Share of the free memory that weights may take; the rest is for activations and logits."""
ANSWER = 16
"""Tokens of a greedy answer."""


@dataclass(frozen=True)
class Probe:
    """`ids` (T,) of a text; those from `answer` on are the parent's own greedy answer to what stands before."""

    name: str
    ids: list[int]
    asks: bool = False
    stops: frozenset[int] = frozenset()
    answer: int = 0


@dataclass
class Sums:
    """What `measure` adds up over positions."""

    positions: int = 0
    max_dlogit: float = 0.0
    dlogit: float = 0.0
    kl: float = 0.0
    top1: int = 0
    predicted: int = 0
    nll_parent: float = 0.0
    nll_child: float = 0.0
    answered: int = 0
    agreed: int = 0
    worst: tuple[float, str] = field(default=(-1.0, ""))

    def add(self, probe: Probe, parent: torch.Tensor, child: torch.Tensor) -> None:
        """Add one probe's logits, both (T, V) float32."""
        difference = (child - parent).abs()
        p, q = parent.double().log_softmax(-1), child.double().log_softmax(-1)  # in float32 the KL of equals is not 0
        kl = (p.exp() * (p - q)).sum(-1).clamp_min(0)  # (T,)
        self.positions += len(kl)
        self.max_dlogit = max(self.max_dlogit, difference.max().item())
        self.dlogit += difference.mean(-1).sum().item()
        self.kl += kl.sum().item()
        self.top1 += int((parent.argmax(-1) == child.argmax(-1)).sum())
        self.worst = max(self.worst, (kl.mean().item(), probe.name))
        following = torch.tensor(probe.ids[1:]).unsqueeze(-1)
        self.predicted += len(following)
        self.nll_parent -= p[:-1].gather(-1, following).sum().item()
        self.nll_child -= q[:-1].gather(-1, following).sum().item()
        if probe.answer:
            # one pass shows how far the child's own greedy answer would go along with the parent's
            same = child.argmax(-1)[probe.answer - 1 : -1] == torch.tensor(probe.ids[probe.answer :])
            self.answered += len(same)
            self.agreed += int(same.int().cumprod(0).sum())

    def result(self) -> dict[str, Any]:
        """The means, as JSON values."""
        return {
            "max_dlogit": self.max_dlogit,
            "mean_dlogit": self.dlogit / self.positions,
            "kl": self.kl / self.positions,
            "top1": self.top1 / self.positions,
            "ppl_parent": math.exp(self.nll_parent / self.predicted),
            "ppl_child": math.exp(self.nll_child / self.predicted),
            "greedy": self.agreed / self.answered if self.answered else 1.0,
            "positions": self.positions,
            "worst_kl": self.worst[0],
            "worst_probe": self.worst[1],
        }


def probes(folder: Path, rows: Sequence[Sequence[Message]] = ()) -> list[Probe]:
    """The fixed probes and `rows` (conversations of the user's own), with the tokenizer of the model in `folder`.

    Dialogues are rendered by the model's own chat template; a model without one, or whose template refuses a system
    text, is asked what it can be asked.
    """
    tokenizer = load_tokenizer(folder)
    stops = frozenset(eos_ids(folder))
    found = [Probe(text, _cut(tokenizer(text)["input_ids"])) for text in TEXTS]
    if tokenizer.chat_template:
        chat = Chat(tokenizer)
        for messages in dialogues():
            asked = [m for m in messages if m["role"] != "system"]
            ids = _ids(chat, messages, True) or _ids(chat, asked, True)
            if ids:
                found.append(Probe(asked[-1]["content"], _cut(ids), True, stops))
        for row in rows:
            if ids := _ids(chat, list(row), False):
                found.append(Probe(str(row[0]["content"])[:NAME], _cut(ids)))
    return [p for p in found if len(p.ids) > 1]


def load(folder: Path, adapter: Path | None = None, dtype: Any = torch.float32) -> Any:
    """The model in `folder`, with an adapter on top if given, ready to be asked; float32, so that sums add no noise."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = quantized.load(folder, dtype=dtype, device_map=device)
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter))
    return model.eval()


def precision(folder: Path, free: int | None = None) -> Any | None:
    """The dtype in which the model in `folder` fits into memory: float32, else its own; None where neither does.

    `free` is in bytes, by default what the GPU or else the machine has left.
    """
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    config = read_config(folder)
    stored = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"))
    if free is None:
        free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    room = free * FILLED
    if weights * torch.float32.itemsize / stored.itemsize <= room:
        return torch.float32
    return stored if weights <= room else None


@torch.inference_mode()
def measure(
    parent: Callable[[], Any], child: Callable[[], Any], probes: Sequence[Probe], progress: Progress = lambda *_: None
) -> dict[str, Any]:
    """Compare what `child()` answers to `probes` with what `parent()` does; each loads its model.

    Raises SuiteError when the two do not have the same vocabulary.
    """
    sums = Sums()
    total = 2 * len(probes)
    # some quantized layers would compile themselves anew for every length of text
    eager = torch.compiler.set_stance("force_eager")
    with eager, tempfile.TemporaryDirectory() as waiting:
        answered = []
        model = parent()
        for i, probe in enumerate(probes):
            answered.append(_answered(model, probe))
            np.save(Path(waiting) / f"{i}.npy", _logits(model, answered[i].ids).numpy())
            progress(i + 1, total, "parity")
        del model
        gc.collect()
        model = child()
        for i, probe in enumerate(answered):
            before = torch.from_numpy(np.load(Path(waiting) / f"{i}.npy"))
            after = _logits(model, probe.ids)
            if before.shape != after.shape:
                raise SuiteError(
                    f"parent and child have {before.shape[1]} and {after.shape[1]} tokens in the vocabulary"
                )
            sums.add(probe, before, after)
            progress(len(probes) + i + 1, total, "parity")
    return sums.result()


def _answered(model: Any, probe: Probe) -> Probe:
    """`probe` with the model's greedy answer after it, up to and with a stop token."""
    if not probe.asks:
        return probe
    ids, past = list(probe.ids), None
    step = torch.tensor([ids], device=model.device)
    for _ in range(ANSWER):
        out = model(input_ids=step, past_key_values=past, use_cache=True)
        past = out.past_key_values
        ids.append(int(out.logits[0, -1].argmax()))
        if ids[-1] in probe.stops:
            break
        step = torch.tensor([ids[-1:]], device=model.device)
    return replace(probe, ids=ids, answer=len(probe.ids))


def _logits(model: Any, ids: list[int]) -> torch.Tensor:
    """(T, V) float32."""
    logits: torch.Tensor = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits
    return logits[0].float().cpu()


def _ids(chat: Chat, messages: list[Message], generate: bool) -> list[int]:
    try:
        return chat.ids(messages, generate=generate)
    except SuiteError:
        return []


def _cut(ids: Sequence[int]) -> list[int]:
    return list(ids[:LONGEST])
