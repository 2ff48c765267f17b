"""The proof that an artifact equals the one it came from: both answer the same probes, and their logits are compared.

Parent and child are in memory one after the other, never both; the parent's logits wait on disk. A model that does not
fit is never in memory whole either (`export.streaming`). Reported, over all positions of all probes:

    max_dlogit, mean_dlogit   |child - parent| of the logits
    kl                        mean KL(parent || child) per token, in nats
    top1                      share of positions where both prefer the same next token
    ties                      share where they do not, but the parent has the child's within TIE of its own
    ppl_parent, ppl_child     exp of the mean negative log likelihood of the next token
    greedy, greedy_tokens     how far the child goes along with the parent's greedy answers, until they part: as a
                              share of their tokens, and in tokens of an answer
    vocabulary_*              rows of each model's head; the common ones are compared
    prompts                   share of probes that the child's own tokenizer and chat template make into the same ids
    worst_probe, worst_kl     where the difference is largest
"""

from __future__ import annotations

import gc
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from export.answering import Answering, answering
from export.folder import eos_ids
from export.limits import Limits
from export.probes import TEXTS, dialogues
from export.streaming import Streamed
from export.tensors import read_checkpoint
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
TIE = 0.05
"""Logits that are as good as equal: sums in float16 differ by as much."""
CONTAINER = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where Linux says how much memory a container may take."""
AT_ONCE = 1 << 22
"""Logits that are compared at once; a vocabulary may have 200 000 tokens."""


@dataclass(frozen=True)
class Probe:
    """`ids` (T,) of a text; those from `answer` on are the parent's own greedy answer to what stands before.

    `same` says whether the child's tokenizer gives these ids too; None where that was not asked.
    """

    name: str
    ids: list[int]
    asks: bool = False
    stops: frozenset[int] = frozenset()
    answer: int = 0
    same: bool | None = None


@dataclass
class Sums:
    """What `measure` adds up over positions."""

    positions: int = 0
    max_dlogit: float = 0.0
    dlogit: float = 0.0
    kl: float = 0.0
    top1: int = 0
    ties: int = 0
    predicted: int = 0
    nll_parent: float = 0.0
    nll_child: float = 0.0
    answers: int = 0
    answered: int = 0
    agreed: int = 0
    vocabulary: tuple[int, int] = (0, 0)
    worst: tuple[float, str] = (-1.0, "")

    def add(self, probe: Probe, parent: torch.Tensor, child: torch.Tensor) -> None:
        """Add one probe's logits, (T, V) float32 each; where one has more rows than the other, the common ones count.

        Raises SuiteError when one of the two does not have a token of the probe.
        """
        self.vocabulary = parent.shape[1], child.shape[1]
        common = min(self.vocabulary)
        if max(probe.ids) >= common:
            raise SuiteError(
                f"parent and child have {parent.shape[1]} and {child.shape[1]} tokens in the vocabulary, and "
                f"{probe.name!r} has token {max(probe.ids)}",
                hint="compare a model with what was made of it",
            )
        rows = max(1, AT_ONCE // common)
        kl, chosen = [], []
        for start in range(0, len(probe.ids), rows):
            before, after = parent[start : start + rows, :common], child[start : start + rows, :common]
            kl.append(self._compare(before, after, torch.tensor(probe.ids[start + 1 : start + rows + 1])))
            chosen.append(after.argmax(-1))
            equal = before.argmax(-1) == chosen[-1]
            as_good = before.gather(-1, chosen[-1].unsqueeze(-1)).squeeze(-1) >= before.amax(-1) - TIE
            self.top1 += int(equal.sum())
            self.ties += int((as_good & ~equal).sum())
        self.positions += len(probe.ids)
        self.kl += torch.cat(kl).sum().item()
        self.worst = max(self.worst, (torch.cat(kl).mean().item(), probe.name))
        if probe.answer:
            # one pass shows how far the child's own greedy answer would go along with the parent's
            same = torch.cat(chosen)[probe.answer - 1 : -1] == torch.tensor(probe.ids[probe.answer :])
            self.answers += 1
            self.answered += len(same)
            self.agreed += int(same.int().cumprod(0).sum())

    def _compare(self, parent: torch.Tensor, child: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        """KL (T,) at each position; what is no number counts as infinitely far."""
        equal = parent == child  # also where both are -inf
        difference = (child - parent).abs().masked_fill(equal, 0).nan_to_num(nan=math.inf)
        self.max_dlogit = max(self.max_dlogit, difference.max().item())
        self.dlogit += difference.mean(-1).sum().item()
        p, q = parent.double().log_softmax(-1), child.double().log_softmax(-1)  # in float32 the KL of equals is not 0
        self.predicted += len(following)
        self.nll_parent -= _of(p, following)
        self.nll_child -= _of(q, following)
        kl = (p.exp() * (p - q)).masked_fill(p == q, 0).sum(-1)
        return kl.clamp_min(0).nan_to_num(nan=math.inf)

    def result(self) -> dict[str, Any]:
        """The means, as JSON values."""
        return {
            "max_dlogit": self.max_dlogit,
            "mean_dlogit": self.dlogit / self.positions,
            "kl": self.kl / self.positions,
            "top1": self.top1 / self.positions,
            "ties": self.ties / self.positions,
            "ppl_parent": _exp(self.nll_parent / self.predicted),
            "ppl_child": _exp(self.nll_child / self.predicted),
            "greedy": self.agreed / self.answered if self.answered else 1.0,
            "greedy_tokens": self.agreed / self.answers if self.answers else 0.0,
            "positions": self.positions,
            "vocabulary_parent": self.vocabulary[0],
            "vocabulary_child": self.vocabulary[1],
            "worst_kl": self.worst[0],
            "worst_probe": self.worst[1],
        }


def _of(log_p: torch.Tensor, ids: torch.Tensor) -> float:
    """The sum of log probabilities that the first rows (T, V) give to `ids`."""
    return log_p[: len(ids)].gather(-1, ids.unsqueeze(-1)).sum().item()


def _exp(value: float) -> float:
    return torch.tensor(value, dtype=torch.float64).exp().item()


def probes(folder: Path, rows: Sequence[Sequence[Message]] = (), parent: Path | None = None) -> list[Probe]:
    """The fixed probes and `rows` (conversations of the user's own), with the tokenizer of the model in `folder`.

    Dialogues are rendered by the model's own chat template; a model without one, or whose template refuses a system
    text, is asked what it can be asked. With the folder of its `parent`, the parent's ids are asked, and each probe
    says whether the tokenizer and template in `folder` make the same of it.
    """
    # an adapter's folder does not say what ends an answer
    stops = frozenset(eos_ids(folder)) if (folder / "config.json").is_file() else frozenset()
    found = []
    own = _tokenized(folder, rows)
    for (name, asks, theirs), (*_, ids) in zip(_tokenized(parent, rows) if parent else own, own, strict=True):
        same = theirs == ids if parent and theirs else None
        found.append(Probe(name, theirs or ids, asks, stops, same=same))
    return [probe for probe in found if len(probe.ids) > 1]


def _tokenized(folder: Path, rows: Sequence[Sequence[Message]]) -> list[tuple[str, bool, list[int]]]:
    """All of them in order: name, whether it asks, and ids; none where this template refuses it."""
    tokenizer = load_tokenizer(folder)
    chat = Chat(tokenizer) if tokenizer.chat_template else None
    found = [(text, False, list(tokenizer(text)["input_ids"])) for text in TEXTS]
    for messages in dialogues():
        asked = [m for m in messages if m["role"] != "system"]
        found.append((asked[-1]["content"], True, _ids(chat, messages, True) or _ids(chat, asked, True)))
    found += [(str(row[0]["content"])[:NAME], False, _ids(chat, list(row), False)) for row in rows]
    return [(name, asks, ids[:LONGEST]) for name, asks, ids in found]


def _ids(chat: Chat | None, messages: list[Message], generate: bool) -> list[int]:
    try:
        return chat.ids(messages, generate=generate) if chat else []
    except SuiteError:
        return []


def load(folder: Path, adapter: Path | None = None, dtype: Any = torch.float32, streamed: bool | None = None) -> Any:
    """The model in `folder`, with an adapter on top if given, ready to be asked; float32, so that sums add no noise.

    One that does not fit into memory is `streamed`, layer by layer; a quantized one, which is small, never is. Any
    other `dtype`, such as "auto", is for a model as it will be served: in memory.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if streamed is None:
        streamed = dtype is torch.float32 and not quantized.settings(folder) and not fits(folder)
    if streamed:
        return Streamed(folder, adapter, device)
    model = quantized.load(folder, dtype=dtype, device_map=device)
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter))
    return model.eval()


def fits(folder: Path, free: int | None = None) -> bool:
    """Whether the model in `folder` fits into memory in float32.

    `free` is in bytes, by default what the GPU, or else the machine, has left.
    """
    weights = sum(math.prod(tensor.shape) for tensor in read_checkpoint(folder).values()) * torch.float32.itemsize
    if free is None:
        free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else _memory()
    return weights <= free * FILLED


def _memory() -> int:
    """Bytes that the machine has left, and the container that this may run in."""
    free: int = psutil.virtual_memory().available
    for file in CONTAINER:
        if file.is_file() and (limit := file.read_text().strip()).isdigit():
            free = min(free, int(limit) - psutil.Process().memory_info().rss)
    return free


def measure(
    parent: Callable[[], Any], child: Callable[[], Any], probes: Sequence[Probe], progress: Progress = lambda *_: None
) -> dict[str, Any]:
    """Compare what `child()` answers to `probes` with what `parent()` does; each loads its model.

    A model is one of transformers, as `load` gives it, or any object with `logits(ids) -> (T, V)` (see
    `export.answering`). Raises SuiteError when one of the two does not have a token that is asked.
    """
    sums = Sums()
    # some quantized layers would compile themselves anew for every length of text
    eager = torch.compiler.set_stance("force_eager")
    with eager, tempfile.TemporaryDirectory() as waiting:
        before, after = Path(waiting) / "parent", Path(waiting) / "child"
        asked = _ask(answering(parent()), probes, before, progress, 0)
        gc.collect()
        _ask(answering(child()), asked, after, progress, len(probes))
        for i, probe in enumerate(asked):
            sums.add(probe, *(torch.from_numpy(np.load(side / f"{i}.npy")) for side in (before, after)))
    return sums.result() | _prompts(probes)


def _ask(model: Answering, probes: Sequence[Probe], folder: Path, progress: Progress, done: int) -> list[Probe]:
    """Write the logits for each probe to `folder`; returns the probes with the answers to those that ask for one."""
    folder.mkdir()
    total = 2 * len(probes)

    def ask(probe: Probe, file: Path) -> Probe:
        if probe.asks and not probe.answer:
            probe = replace(probe, ids=model.answered(probe.ids, probe.stops), answer=len(probe.ids))
        logits = model.logits(probe.ids).numpy()
        try:
            np.save(file, logits)
        except OSError as error:
            raise SuiteError(
                f"the logits cannot wait on the disk: {error.strerror or error}",
                where=str(folder),
                hint="set TMPDIR to a directory with more space",
            ) from None
        return probe

    passes = 1 + model.tokens * any(probe.asks and not probe.answer for probe in probes)
    questions = [partial(ask, probe, folder / f"{i}.npy") for i, probe in enumerate(probes)]
    return model.each(questions, lambda share: progress(done + round(share * len(probes)), total, model.how), passes)


def _prompts(probes: Sequence[Probe]) -> dict[str, Any]:
    """Whether the child's tokenizer gives the parent's ids, where that was asked."""
    told = [probe for probe in probes if probe.same is not None]
    if not told:
        return {}
    differ = [probe.name for probe in told if not probe.same]
    return {"prompts": 1 - len(differ) / len(told), **({"other_prompt": differ[0]} if differ else {})}


def require(result: Mapping[str, Any], limits: Limits, where: str = "") -> None:
    """Raise SuiteError, naming number, limit and worst probe, where `result` of `measure` is beyond `limits`.

    What is no finite number, and a prompt that becomes other tokens, are beyond any.
    """
    if "other_prompt" in result:
        raise SuiteError(
            f"the child reads other tokens than its parent: {result['other_prompt']!r}",
            where=where,
            hint="its tokenizer or chat template changed; copy the parent's tokenizer files",
        )
    worst = f"worst on {result['worst_probe']!r}: KL {result['worst_kl']:.2g}"
    for name, said in (
        ("kl", "the mean KL to the parent is {:.2g} nats a token"),
        ("max_dlogit", "a logit differs from the parent's by {:.2g}"),
    ):
        limit = getattr(limits, name)
        if not (math.isfinite(result[name]) and result[name] <= limit):
            beyond = f"above {limit:g}" if math.isfinite(result[name]) else "which is no number"
            raise SuiteError(f"{said.format(result[name])}, {beyond}; {worst}", where=where, hint=limits.cure)
    same = result["top1"] + result["ties"]
    if not same >= limits.top1:
        message = f"parent and child prefer the same token at {same:.2%} of positions, below {limits.top1:.2%}"
        raise SuiteError(f"{message}; {worst}", where=where, hint=limits.cure)
