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
    greedy_equal              share of these answers that never part, or only where two tokens are as good
    vocabulary_*              rows of each model's head; the common ones are compared
    prompts                   share of probes that the child's own tokenizer and chat template make into the same ids
    worst_probe, worst_kl     where the difference is largest
"""

from __future__ import annotations

import contextlib
import gc
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
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
from export.sums import Probe, Sums
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
CONTAINER = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where Linux says how much memory a container may take."""


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


def load(
    folder: Path,
    adapter: Path | None = None,
    dtype: Any = torch.float32,
    streamed: bool | None = None,
    tokens: int | None = None,
) -> Any:
    """The model in `folder`, with an adapter on top if given, ready to be asked; float32, so that sums add no noise.

    One that does not fit into memory is `streamed`, layer by layer; a quantized one, which is small, never is. Any
    other `dtype`, such as "auto", is for a model as it will be served: in memory. An adapter that brings new tokens
    needs to be told how many `tokens` there are then.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if streamed is None:
        streamed = dtype is torch.float32 and not quantized.settings(folder) and not fits(folder)
    if streamed:
        return Streamed(folder, adapter, device, tokens)
    model = quantized.load(folder, dtype=dtype, device_map=device)
    if tokens is not None:
        model.resize_token_embeddings(tokens, mean_resizing=False)
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


class Interview:
    """Asks models the same probes, one after the other, never two in memory; their logits wait on the disk.

    The greedy answers of the first that is asked become part of the probes. Use it with `with`.
    """

    def __init__(self, probes: Sequence[Probe], models: int = 2, progress: Progress = lambda *_: None) -> None:
        self.probes, self.progress = list(probes), progress
        self.asked, self.models = 0, models
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Interview:
        self.folder = Path(self._open.enter_context(tempfile.TemporaryDirectory()))
        # some quantized layers would compile themselves anew for every length of text
        self._open.enter_context(torch.compiler.set_stance("force_eager"))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def ask(self, load: Callable[[], Any]) -> Path:
        """Where the answers are of the model that `load()` gives: one of transformers, as `parity.load` gives it, or
        any object with `logits(ids) -> (T, V)` (see `export.answering`)."""
        gc.collect()
        model = answering(load())
        folder = self.folder / str(self.asked)
        folder.mkdir()
        open_ones = [i for i, probe in enumerate(self.probes) if probe.asks and not probe.answer]
        first = model.tokens / (model.tokens + model.passes(len(self.probes))) if open_ones else 0.0
        if open_ones:
            prompts, stops = zip(*((self.probes[i].ids, self.probes[i].stops) for i in open_ones), strict=True)
            answers = model.answers(prompts, stops, lambda share: self._tell(model, first * share))
            for i, answer in zip(open_ones, answers, strict=True):
                ids = self.probes[i].ids
                self.probes[i] = replace(self.probes[i], ids=[*ids, *answer], answer=len(ids))
        questions = [partial(self._keep, model, p.ids, folder / f"{i}.npy") for i, p in enumerate(self.probes)]
        model.each(questions, lambda share: self._tell(model, first + (1 - first) * share))
        self.asked += 1
        return folder

    def compare(self, parent: Path, child: Path) -> dict[str, Any]:
        """What this module's own text lists, of two that were asked; raises SuiteError when one of them does not have a
        token that was asked."""
        sums = Sums()
        for i, probe in enumerate(self.probes):
            sums.add(probe, *(torch.from_numpy(np.load(side / f"{i}.npy")) for side in (parent, child)))
        return sums.result()

    def against(self, parent: Path, load: Callable[[], Any]) -> dict[str, Any]:
        """Ask one more, compare it with `parent`, and forget it."""
        child = self.ask(load)
        found = self.compare(parent, child)
        self.forget(child)
        return found

    def forget(self, folder: Path) -> None:
        """Make room on the disk: logits of a large vocabulary are many."""
        shutil.rmtree(folder)

    def _keep(self, model: Answering, ids: list[int], file: Path) -> None:
        try:
            np.save(file, model.logits(ids).numpy())
        except OSError as error:
            raise SuiteError(
                f"the logits cannot wait on the disk: {error.strerror or error}",
                where=str(file.parent),
                hint="set TMPDIR to a directory with more space",
            ) from None

    def _tell(self, model: Answering, share: float) -> None:
        each = len(self.probes)
        self.progress(round((self.asked + share) * each), self.models * each, model.how)


def measure(
    parent: Callable[[], Any], child: Callable[[], Any], probes: Sequence[Probe], progress: Progress = lambda *_: None
) -> dict[str, Any]:
    """Compare what `child()` answers to `probes` with what `parent()` does; each loads its model.

    Raises SuiteError when one of the two does not have a token that is asked.
    """
    with Interview(probes, 2, progress) as interview:
        return interview.against(interview.ask(parent), child) | prompts(probes)


def prompts(probes: Sequence[Probe]) -> dict[str, Any]:
    """Whether the child's tokenizer gives the parent's ids, where that was asked."""
    told = [probe for probe in probes if probe.same is not None]
    if not told:
        return {}
    differ = [probe.name for probe in told if not probe.same]
    return {"prompts": 1 - len(differ) / len(told), **({"other_prompt": differ[0]} if differ else {})}


def require_prompts(result: Mapping[str, Any], where: str = "") -> None:
    """Raise SuiteError, naming the first, where a prompt becomes other tokens."""
    if "other_prompt" in result:
        raise SuiteError(
            f"the child reads other tokens than its parent: {result['other_prompt']!r}",
            where=where,
            hint="its tokenizer or chat template changed; copy the parent's tokenizer files",
        )


def require(result: Mapping[str, Any], limits: Limits, where: str = "") -> None:
    """Raise SuiteError, naming number, limit and worst probe, where `result` of `measure` is beyond `limits`.

    What is no finite number, and a prompt that becomes other tokens, are beyond any.
    """
    require_prompts(result, where)
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
    if not result["greedy_equal"] >= limits.greedy:
        message = f"{result['greedy_equal']:.0%} of the greedy answers are the parent's, below {limits.greedy:.0%}"
        first = f"the first that is another: to {result['other_answer']!r}"
        raise SuiteError(f"{message}; {first}; {worst}", where=where, hint=limits.cure)
