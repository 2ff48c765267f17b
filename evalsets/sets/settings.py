"""What a `set.toml` may say."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from evalsets.language import Language
from suite.config import Config

Kind = Literal["choice", "numeric", "qa", "tools", "toolbench", "instructions", "refusals", "perplexity"]

FIELDS: dict[Kind, set[str]] = {"choice": {"question", "options"}, "numeric": {"question"}, "qa": {"question"}}
"""What a prompt must have, for the kinds that have one; the others send their rows as they are."""

PROMPTS: dict[Kind, dict[Language, str]] = {
    "choice": {"en": "{question}\n{options}\nAnswer:", "zh": "{question}\n{options}\n答案："},
    "numeric": {"en": "{question}", "zh": "{question}"},
    "qa": {"en": "{question}", "zh": "{question}"},
}
SEVERAL: dict[Language, str] = {
    "en": "{question}\n{options}\nName every right option.\nAnswer:",
    "zh": "{question}\n{options}\n请选出所有正确的选项。\n答案：",
}
"""Prompts of choice sets with several right options."""


class Generation(Config):
    """What every request of a set carries, so that no endpoint's own defaults decide a score."""

    max_tokens: int = Field(default=256, ge=1)
    """Longest reply in tokens; a reply cut there is counted as truncated."""
    stop: list[str] = Field(default=[])
    """Texts that end a reply."""
    temperature: float = Field(default=0.0, ge=0)
    """0 is greedy."""
    seed: int = 0
    """For endpoints that sample."""


class SetFile(Config):
    """The keys of a `set.toml`."""

    kind: Kind
    """choice: letters are right; numeric: a number is; qa: a reference text; tools and toolbench: calls of functions;
    instructions: rules that a reply keeps; refusals: to refuse or not; perplexity: texts to predict."""
    title: str
    """One line for reports."""
    languages: list[Language] = Field(min_length=1)
    """Languages of the questions; with several, each row's own `lang` or its script decides."""
    license: str
    """SPDX name of the data's license."""
    source: str
    """Where the data comes from."""
    data: str = ""
    """Folder that holds the data in any layout known here, relative to this file, or its address at a hub,
    "hf:org/name" with perhaps a folder and "@commit"; beside it when left out."""
    split: Literal["val", "test"] | None = None
    """choice, numeric, qa: which split is asked; the one that its publisher scores when left out."""
    prompt: dict[Language, str] = Field(default={})
    """choice, numeric, qa: by language, with {question} and, for choice, {options}; C-Eval's form when left out."""
    shots: int = Field(default=0, ge=0)
    """choice, numeric: solved examples before a question, the first rows of the dev (or train) file of its subset."""
    shots_random: bool = False
    """choice, numeric: draw these rows by chance, with the seed of `generation`, so that they are always the same."""
    extract: str = ""
    """choice, numeric: a regular expression with one group, which finds the answer in a reply the first time that it
    fits; letters or numbers are read there. A reply that it does not fit has none. Our own reading when left out."""
    multiple: bool = False
    """choice: several letters may be right, and all of them must be named."""
    likelihood: bool = False
    """choice: also measure which option's letter is likeliest, at endpoints that give log-probabilities of prompts."""
    metric: Literal["acc", "partial", "likelihood"] = "acc"
    """choice: what decides comparisons: acc, the questions answered right; partial, with `multiple`, the right letters
    named of each; likelihood, with `likelihood`, the questions whose likeliest option is right, as base models are
    compared."""
    metrics: list[str] = Field(default=["rouge", "bleu"], min_length=1)
    """qa: what to measure: rouge, bleu, exact, f1, chrf, jaccard, regex, judge or a `module:function` of your own. The
    first, which cannot be bleu, gets the interval and decides comparisons."""
    generation: Generation = Generation()
