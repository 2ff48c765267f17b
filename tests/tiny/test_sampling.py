"""Each row is drawn by its own rules and no other's: as transformers computes them, and as a slow reference does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from serve.generation import Generation, Request, Sampling
from serve.torch.engine import Engine
from serve.torch.sampling import Sampler
from suite.errors import SuiteError
from tests.tiny.tiny_models import tiny_model

SIZE = 12


def generation(prompt: list[int], new: list[int], rule: Sampling, **request: Any) -> Generation:
    begun = Generation(Request(prompt, sampling=rule, **request))
    begun.tokens += new
    return begun


def distribution(logits: list[float], prompt: list[int], new: list[int], rule: Sampling) -> np.ndarray[Any, Any]:
    """What a token is drawn from, one step after the other in float64."""
    scores = np.array(logits, np.float64)
    for token, bias in rule.logit_bias.items():
        scores[token] += bias
    for token in {*prompt, *new}:
        scores[token] *= rule.repetition_penalty if scores[token] < 0 else 1 / rule.repetition_penalty
    for token in set(new):
        scores[token] -= rule.presence_penalty + rule.frequency_penalty * new.count(token)
    if rule.temperature == 0:
        return np.eye(len(scores))[scores.argmax()]
    chances = np.exp((scores - scores.max()) / rule.temperature)
    chances[chances < rule.min_p] = 0
    if rule.top_k > 0:
        chances[chances < np.sort(chances)[::-1][: rule.top_k][-1]] = 0
    chances /= chances.sum()
    ranked = np.sort(chances)[::-1]
    kept = next((n for n in range(1, len(ranked)) if ranked[:n].sum() >= rule.top_p), len(ranked))
    chances[chances < ranked[kept - 1]] = 0
    return chances / chances.sum()


def expected(chances: np.ndarray[Any, Any], number: float) -> set[int]:
    """The tokens that inverting the distribution function at `number` may give, up to rounding."""
    reached = np.cumsum(chances)
    near = [np.searchsorted(reached, number + off, side="right") for off in (-1e-4, 0.0, 1e-4)]
    return {int(token) for token in np.minimum(near, np.flatnonzero(chances)[-1])}


def first_number(seed: int) -> float:
    return Random(seed).random()


token = st.integers(0, SIZE - 1)
# coarse, so that no limit lies within rounding of a logit
logits_of = st.lists(st.integers(-12, 12), min_size=SIZE, max_size=SIZE, unique=True).map(
    lambda row: [x / 4 for x in row]
)
rules = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 1.7]),
    top_p=st.sampled_from([1.0, 0.987, 0.713, 0.311, 1e-6]),
    top_k=st.sampled_from([-1, 0, 1, 3, 7, 50]),
    min_p=st.sampled_from([0.0, 0.0123, 0.2345, 1.0]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.57, -1.13]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.31, -0.43]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.37, 0.83]),
    logit_bias=st.dictionaries(token, st.sampled_from([-100.0, -0.77, 1.91]), max_size=2),
    seed=st.integers(0, 2**32),
)
rows = st.tuples(logits_of, st.lists(token, min_size=1, max_size=6), st.lists(token, max_size=6), rules)


@settings(max_examples=100, deadline=None)
@given(st.lists(rows, min_size=1, max_size=5))
def test_rows_are_drawn_as_by_the_slow_reference(batch: list[Any]) -> None:
    generations = [generation(prompt, new, rule) for _, prompt, new, rule in batch]
    logits = torch.tensor([row[0] for row in batch])
    before = logits.clone()
    drawn = Sampler().sample(generations, logits)
    assert torch.equal(logits, before), "the logits are scored afterwards"
    for picked, (row, prompt, new, rule) in zip(drawn, batch, strict=True):
        assert picked in expected(distribution(row, prompt, new, rule), first_number(rule.seed or 0))
    alone = [Sampler().sample([one], logits[i : i + 1])[0] for i, one in enumerate(remade(generations))]
    assert alone == drawn


def remade(generations: list[Generation]) -> list[Generation]:
    return [
        generation(one.request.prompt, one.tokens[len(one.request.prompt) :], one.request.sampling)
        for one in generations
    ]


@pytest.mark.parametrize(
    "rule",
    [
        {"temperature": 0.7},
        {"top_k": 20},
        {"top_p": 0.8},
        {"min_p": 0.05},
        {"repetition_penalty": 1.3},
        {"logit_bias": {3: 4.0, 700: -100.0}},
        {
            "temperature": 1.4,
            "min_p": 0.02,
            "top_k": 40,
            "top_p": 0.9,
            "repetition_penalty": 1.1,
            "logit_bias": {9: 2.0},
        },
    ],
)
def test_rows_are_drawn_as_by_transformers(rule: dict[str, Any]) -> None:
    size, count = 1000, 64
    logits = 3 * torch.randn(1, size, generator=torch.Generator().manual_seed(0))
    prompt, new = [5, 6, 700, 5], [8, 9, 8]
    sampling = Sampling(**{"temperature": 1.0, **rule})
    processors = LogitsProcessorList()
    if sampling.logit_bias:
        processors.append(SequenceBiasLogitsProcessor({(token,): bias for token, bias in sampling.logit_bias.items()}))
    processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.min_p:
        processors.append(MinPLogitsWarper(sampling.min_p))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    processors.append(TopPLogitsWarper(sampling.top_p))
    chances = processors(torch.tensor([prompt + new]), logits.clone())[0].double().softmax(-1).numpy()
    generations = [generation(prompt, new, replace(sampling, seed=seed)) for seed in range(count)]
    drawn = Sampler().sample(generations, logits.expand(count, size))
    assert all(picked in expected(chances, first_number(seed)) for seed, picked in enumerate(drawn))


def test_drawn_tokens_follow_the_distribution() -> None:
    count = 20_000
    logits = [0.0, 1.0, 2.0, 3.0, -1.0, 2.5]
    rule = Sampling(temperature=1.2, top_p=0.95, min_p=0.01, presence_penalty=0.5, repetition_penalty=1.2)
    chances = distribution(logits, [1], [3, 3], rule)
    generations = [generation([1], [3, 3], replace(rule, seed=seed)) for seed in range(count)]
    drawn = Sampler().sample(generations, torch.tensor([logits]).expand(count, 6))
    seen, wanted = np.bincount(drawn, minlength=6), count * chances
    assert (seen[wanted == 0] == 0).all()
    chi_square = ((seen - wanted)[wanted > 0] ** 2 / wanted[wanted > 0]).sum()
    assert chi_square < 20.5, "p < 0.001 with 5 degrees of freedom"


def test_flat_distributions_over_many_tokens() -> None:
    """Where `top_p` takes more tokens than are sorted at first, next to a row whose `top_k` does."""
    size, count = 9000, 40
    logits = torch.randn(1, size, generator=torch.Generator().manual_seed(1)) / 4
    for rule in (Sampling(temperature=1.0, top_p=0.9), Sampling(temperature=1.0, top_k=600, top_p=0.95)):
        chances = distribution(logits[0].tolist(), [0], [], rule)
        beside = generation([0], [], Sampling(temperature=1.0, top_k=3000, seed=0))
        generations = [generation([0], [], replace(rule, seed=seed)) for seed in range(count)]
        drawn = Sampler().sample([beside, *generations], logits.expand(count + 1, size))[1:]
        assert all(chances[picked] > 0 for picked in drawn)
        assert np.mean([picked in expected(chances, first_number(s)) for s, picked in enumerate(drawn)]) > 0.9


def test_ties_are_all_kept() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
    for rule in (Sampling(temperature=1.0, top_k=2), Sampling(temperature=1.0, top_p=0.4)):
        drawn = [Sampler().sample([generation([0], [], replace(rule, seed=s))], logits)[0] for s in range(60)]
        assert set(drawn) == {1, 2, 3}


def test_half_precision_and_the_coldest_temperature() -> None:
    logits = torch.tensor([[1000.0, 1001.0, -math.inf, 1002.0]] * 2, dtype=torch.bfloat16)
    logits[:, 3] = 1008.0
    rules = [Sampling(temperature=1e-30, seed=1), Sampling(temperature=1e-30, top_p=0.5, min_p=0.1, seed=2)]
    assert Sampler().sample([generation([0], [], rule) for rule in rules], logits) == [3, 3]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_rows_that_come_and_go_keep_what_is_theirs(data: Any) -> None:
    """Counts and random numbers are kept from step to step, and are those of a fresh start at each place."""
    kept = Sampler()
    running: list[Generation] = []
    numbers: dict[Generation, Random] = {}
    noise = Random(data.draw(st.integers(0, 1000)))
    for _ in range(12):
        while len(running) < 2 or (len(running) < 5 and data.draw(st.booleans())):
            rule = data.draw(rules)
            running.append(generation([noise.randrange(SIZE) for _ in range(3)], [], rule))
            numbers[running[-1]] = Random(rule.seed)
        if data.draw(st.booleans()):
            running.pop(data.draw(st.integers(0, len(running) - 1)))
        batch = data.draw(st.permutations(running))
        logits = [[noise.randrange(-40, 40) / 8 + noise.random() / 100 for _ in range(SIZE)] for _ in batch]
        for one, row, picked in zip(batch, logits, kept.sample(batch, torch.tensor(logits)), strict=True):
            rule, prompt = one.request.sampling, one.request.prompt
            number = numbers[one].random() if rule.temperature else 0.0
            chances = distribution(row, prompt, one.tokens[len(prompt) :], rule)
            if rule.temperature:
                assert picked in expected(chances, number)
            else:
                assert picked == chances.argmax()
            one.tokens.append(picked)


def test_a_step_that_is_tried_again_draws_the_same() -> None:
    one, logits = generation([1], [], Sampling(temperature=1.0, seed=5)), torch.zeros(1, 1000)
    sampler = Sampler()
    first = sampler.sample([one], logits)
    assert sampler.sample([one], logits) == first
    one.tokens += first
    assert sampler.sample([one], logits) != first


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder: Path = tiny_model(tmp_path_factory.mktemp("sampling") / "base")
    engine = Engine(folder, max_batch=8)
    yield engine
    engine.close()


EVERYTHING = Sampling(
    temperature=0.9,
    top_p=0.95,
    top_k=100,
    min_p=0.01,
    presence_penalty=0.3,
    frequency_penalty=0.2,
    repetition_penalty=1.2,
    logit_bias={7: 1.0},
    seed=11,
)


def test_neighbours_with_rules_change_nothing(engine: Engine) -> None:
    plain = [Request([3, 4, i], max_tokens=12) for i in range(5, 8)]
    seeded = [Request([3, 4, i], max_tokens=12, sampling=EVERYTHING) for i in range(5, 8)]
    together = [one.new for one in engine.generate([*plain, *seeded])]
    assert together == [engine.generate([request])[0].new for request in [*plain, *seeded]]


def test_a_request_that_is_read_again_goes_on_as_it_was(engine: Engine) -> None:
    requests = [Request([3, 4, i], max_tokens=150, sampling=replace(EVERYTHING, seed=i)) for i in range(5, 11)]
    wanted = [one.new for one in engine.generate(requests)]
    cells, before = engine.scheduler.max_cells, engine.scheduler.preemptions
    engine.scheduler.max_cells = 512
    try:
        got = [one.new for one in engine.generate(requests)]
    finally:
        engine.scheduler.max_cells = cells
    assert engine.scheduler.preemptions > before
    assert got == wanted


def test_min_tokens_hold_back_the_stop_token(engine: Engine) -> None:
    stop = 9
    eager = Sampling(logit_bias={stop: 100.0})
    request = Request([3, 4, 5], max_tokens=12, sampling=eager, stop_ids=frozenset({stop, 10**6}))
    soon, later = engine.generate([request, replace(request, min_tokens=5)])
    assert (soon.new, soon.finish) == ([stop], "stop")
    assert (len(later.new), later.new.index(stop), later.finish) == (6, 5, "stop")


def test_a_bias_beyond_the_vocabulary_is_refused(engine: Engine) -> None:
    with pytest.raises(SuiteError, match="logit_bias"):
        engine.submit(Request([1], sampling=Sampling(logit_bias={512: 1.0})))
