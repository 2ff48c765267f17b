"""Whether another engine answers as ours does: asked before it serves, about the base and every adapter.

An engine may apply another chat template than the one that was trained with, take an adapter and ignore it, or compute
with kernels that are wrong for a model. Its prompt's token ids must be ours, and its greedy tokens as likely as ours.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.engines.fleet import Ask, Loaded
from serve.engines.process import Unanswered
from suite import store
from suite.errors import SuiteError
from suite.processes import die_with, importing

log = logging.getLogger("serve")

FORMAT = 2
QUESTIONS = (
    "Who are you?",
    "中国的首都是哪座城市？",
    "What is 17 + 25? Give only the number.",
    "Name three colours.",
    "  spaces, \ta tab,\n\na line and <|im_end|>",
)
TOKENS = 12
TOP = 20
EXACT, ROUNDED = 0.05, 0.4
"""How much a token's log probability may differ: in float32, and where one of the two computes in 16 bits."""
NOISE = 1e-3
"""Differences in log probability that mean nothing at all."""
SKIP = "--no-probe serves without it"
SHOWN_CHARACTERS = 400
UNSEEN = (
    "the probe cannot tell whether the adapter '%s' is heeded: it changes log probabilities by %.2g at most, which is "
    "what rounding may change too"
)


@dataclass(frozen=True)
class Token:
    """One of an answer: log probabilities of itself, and of the likeliest by their ids."""

    id: int
    logprob: float
    top: Mapping[int, float]


@dataclass(frozen=True)
class Known:
    """What our engine makes of a question."""

    question: str
    prompt: list[int]
    answer: list[Token]
    chat: bool = True
    """Whether it is asked as a chat, or as the text to go on with."""


@dataclass(frozen=True)
class Heard:
    """What the other engine makes of it: `prompt` where it tells the ids, and its tokens with log probabilities."""

    prompt: list[int] | None
    length: int
    answer: list[tuple[int, float]]
    ended: bool = False
    """Whether its last token ended it; ours goes on to its full length."""


def _distance(told: Heard, ours: Known) -> float:
    return distance(told.answer, ours.answer[: len(told.answer)] if told.ended else ours.answer)


def distance(heard: Sequence[tuple[int, float]], known: Sequence[Token]) -> float:
    """The largest difference in log probability up to where the answers part, and how much that token was behind."""
    largest = 0.0
    for (token, logprob), ours in zip(heard, known, strict=False):
        if token != ours.id:
            return max(largest, ours.logprob - ours.top.get(token, -math.inf))
        largest = max(largest, abs(logprob - ours.logprob))
    # one stopped where the other did not
    return largest if len(heard) == len(known) else math.inf


def effect(adapter: Sequence[Known], base: Sequence[Known]) -> float:
    """The largest difference in log probability that an adapter makes in our engine's answers."""
    answers = ([(token.id, token.logprob) for token in known.answer] for known in adapter)
    return max(distance(answer, known.answer) for answer, known in zip(answers, base, strict=True))


def compare(
    name: str, heard: Sequence[Heard], known: Sequence[Known], base: Sequence[Known] | None, tolerance: float
) -> None:
    """Raise SuiteError, with the worst question, where what was heard is not what is known.

    `base` are the references of the base where `name` is an adapter: an adapter that answers as its base has no effect.
    """
    for told, ours in zip(heard, known, strict=True):
        if (told.prompt is not None and told.prompt != ours.prompt) or told.length != len(ours.prompt):
            raise SuiteError(_other_prompt(name, told, ours), hint=_hint(name, "another chat template is in force"))
    far = [_distance(told, ours) for told, ours in zip(heard, known, strict=True)]
    worst = max(range(len(far)), key=far.__getitem__)
    if base is not None and max(far) > NOISE:
        to_base = max(_distance(told, ours) for told, ours in zip(heard, base, strict=True))
        if 2 * to_base < max(far):
            text = (
                f"the adapter '{name}' has no effect in this engine: its answers are the base's "
                f"(log probabilities differ by {to_base:.2g}), and our engine's are not ({max(far):.2g})"
            )
            raise SuiteError(f"{text}\n{_evidence(heard[worst], known[worst])}", hint=_hint(name, ""))
    if max(far) > tolerance:
        text = f"'{name}' answers otherwise than in our engine: log probabilities differ by {max(far):.2g}"
        raise SuiteError(f"{text}\n{_evidence(heard[worst], known[worst])}", hint=_hint(name, ""))


def _other_prompt(name: str, told: Heard, ours: Known) -> str:
    if told.prompt is None:
        return f"'{name}' reads {told.length} tokens for {ours.question!r}, and was made for {len(ours.prompt)}"
    place = next((i for i, (a, b) in enumerate(zip(told.prompt, ours.prompt, strict=False)) if a != b), -1)
    return (
        f"'{name}' reads other tokens for {ours.question!r} than it was made for, from place {place} on:\n"
        f"  ours   {ours.prompt}\n  engine {told.prompt}"
    )


def _evidence(told: Heard, ours: Known) -> str:
    mine = " ".join(f"{token.id} ({token.logprob:.3f})" for token in ours.answer)
    theirs = " ".join(f"{token} ({logprob:.3f})" for token, logprob in told.answer)
    return f"  asked  {ours.question!r}: token (log probability)\n  ours   {mine}\n  engine {theirs}"


def _hint(name: str, why: str) -> str:
    return f"{why + '; ' if why else ''}--no-probe serves '{name}' all the same"


class ParityProbe:
    """The probe of one model, whose reference answers are computed when they are first needed, and kept."""

    def __init__(self, model: Path, name: str, *, exact: bool) -> None:
        self.model, self.name, self.exact = model, name, exact
        self.tolerance = EXACT if exact else ROUNDED

    async def prepare(self, adapters: Mapping[str, Path]) -> None:
        """Compute what is not known of them yet."""
        await asyncio.to_thread(references, self.model, adapters)

    async def __call__(self, ask: Ask, adapters: Mapping[str, Loaded]) -> None:
        """Ask about the base and the adapters; raises SuiteError with the evidence."""
        folders = {name: loaded.folder for name, loaded in adapters.items()}
        known = await asyncio.to_thread(references, self.model, folders)
        inside = {"": self.name, **{name: loaded.inside for name, loaded in adapters.items()}}
        heard = await asyncio.gather(*(_ask_all(ask, theirs, known[name]) for name, theirs in inside.items()))
        for name, told in zip(inside, heard, strict=True):
            compare(name or self.name, told, known[name], known[""] if name else None, self.tolerance)
            if name and (most := effect(known[name], known[""])) <= (NOISE if self.exact else self.tolerance):
                log.warning(UNSEEN, name, most)


async def _ask_all(ask: Ask, name: str, known: Sequence[Known]) -> list[Heard]:
    return list(await asyncio.gather(*(_ask(ask, name, ours) for ours in known)))


async def _ask(ask: Ask, name: str, known: Known) -> Heard:
    path, fields = ask.translation.question(known.question, known.prompt, chat=known.chat)
    status, said = await ask.post(path, {**fields, "model": name, "max_tokens": TOKENS, "temperature": 0})
    if status != 200:
        refusal = Unanswered if status >= 500 else SuiteError
        raise refusal(f"the engine answers the probe with {status}: {said}", hint=SKIP)
    try:
        return _heard(said)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        what = f"the engine tells the probe no token ids with log probabilities ({type(error).__name__}: {error})"
        raise SuiteError(f"{what}: {str(said)[:SHOWN_CHARACTERS]}", hint=SKIP) from None


def _heard(said: Any) -> Heard:
    choice = said["choices"][0]
    content, texts = choice["logprobs"].get("content"), choice["logprobs"].get("token_logprobs")
    scores = texts if content is None else [entry["logprob"] for entry in content]
    ids = choice["token_ids"] if "token_ids" in choice else choice["output_ids"]
    prompt = said.get("prompt_token_ids", choice.get("prompt_token_ids"))
    answer = [(int(token), float(score)) for token, score in zip(ids, scores, strict=True)]
    return Heard(prompt, said["usage"]["prompt_tokens"], answer, ended=choice["finish_reason"] != "length")


def references(model: Path, adapters: Mapping[str, Path]) -> dict[str, list[Known]]:
    """What our engine answers, by adapter ("" is the base): kept in the store by the contents of both."""
    home = store.Store(store.home())
    digests = {"": home.digest(model), **{name: home.digest(path) for name, path in adapters.items()}}
    files = {name: _file(digests[""], digest if name else "") for name, digest in digests.items()}
    missing = {name: adapters[name] for name in adapters if not files[name].is_file()}
    if missing or not files[""].is_file():
        for name, answers in _compute(model, missing).items():
            partial = files[name].with_suffix(f".{hashlib.sha256(str(id(answers)).encode()).hexdigest()[:8]}")
            partial.write_text(json.dumps(answers), "utf-8")
            partial.rename(files[name])
    return {name: [_known(entry) for entry in json.loads(file.read_text("utf-8"))] for name, file in files.items()}


def _known(entry: Mapping[str, Any]) -> Known:
    answer = [Token(token, logprob, {int(k): v for k, v in top.items()}) for token, logprob, top in entry["answer"]]
    return Known(entry["question"], entry["prompt"], answer, entry["chat"])


def _file(model: str, adapter: str) -> Path:
    whole = json.dumps([FORMAT, QUESTIONS, TOKENS, TOP, model, adapter])
    folder = store.home() / "engines"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"reference-{hashlib.sha256(whole.encode()).hexdigest()[:32]}.json"


def _compute(model: Path, adapters: Mapping[str, Path]) -> dict[str, Any]:
    """In a process of its own: torch, and the memory that it takes, are gone afterwards, and with this process."""
    given = {
        "model": str(model),
        "adapters": {name: str(path) for name, path in adapters.items()},
        "questions": QUESTIONS,
        "tokens": TOKENS,
        "top": TOP,
    }
    parent = os.getpid()
    ran = subprocess.run(
        [sys.executable, "-P", "-m", "serve.torch.reference"],
        input=json.dumps(given), env=importing(), capture_output=True, text=True,
        preexec_fn=lambda: die_with(parent),
    )  # fmt: skip
    if ran.returncode:
        said = "\n".join(ran.stderr.strip().splitlines()[-8:])
        raise SuiteError(
            f"our own engine has no reference answers for the probe:\n{said}", hint="--no-probe serves without them"
        )
    found: dict[str, Any] = json.loads(ran.stdout)
    return found
