"""What Prometheus reads at /metrics. Each application has a registry of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.generation import Stats
from serve.traffic import Exchange

M = TypeVar("M", Counter, Histogram)

WAIT = (0.01, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0)
EACH = (0.0025, 0.01, 0.025, 0.05, 0.1, 0.5)
"""Bounds in seconds of histograms that exist for every model: few, for there may be hundreds of adapters."""
WHOLE = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Of those that exist for every route."""

ENGINE: dict[str, tuple[type[CounterMetricFamily] | type[GaugeMetricFamily], str]] = {
    "running": (GaugeMetricFamily, "Answers that are computed at the moment"),
    "waiting": (GaugeMetricFamily, "Answers that wait to be computed"),
    "cells": (GaugeMetricFamily, "Tokens that the cache of running answers may hold"),
    "cells_used": (GaugeMetricFamily, "Tokens that it holds, padding included"),
    "prefix_cells": (GaugeMetricFamily, "Tokens that may be kept for prompts that begin alike"),
    "prefix_cells_used": (GaugeMetricFamily, "Tokens that are kept for them"),
    "prefix_queries": (CounterMetricFamily, "Prompt tokens that were looked for among those kept"),
    "prefix_hits": (CounterMetricFamily, "Prompt tokens that were found there"),
    "preemptions": (CounterMetricFamily, "Answers that gave up their place in the cache, and started again"),
    "steps": (CounterMetricFamily, "Steps of the engine"),
    "failures": (CounterMetricFamily, "Steps of the engine that failed"),
    "adapter_slots": (GaugeMetricFamily, "Bytes of the copies of adapters that batches are computed with"),
}
"""Of `serve.generation.Stats`: what it is, and its help."""

ADAPTERS: dict[str, tuple[type[CounterMetricFamily] | type[GaugeMetricFamily], str]] = {
    "resident": (GaugeMetricFamily, "Adapters in memory"),
    "used": (GaugeMetricFamily, "Bytes of their weights"),
    "budget": (GaugeMetricFamily, "Bytes that they may have"),
    "hits": (CounterMetricFamily, "Answers whose adapter was in memory"),
    "misses": (CounterMetricFamily, "Answers that waited for theirs"),
    "loads": (CounterMetricFamily, "Adapters read from disk"),
    "failures": (CounterMetricFamily, "Adapters that could not be read"),
    "evictions": (CounterMetricFamily, "Adapters that made room for others"),
}
"""Of its `adapters`."""


class Metrics:
    """Counts exchanges as they end; what engines do, by the names of their models, is asked when somebody reads."""

    def __init__(self, stats: Callable[[], Mapping[str, Stats]]) -> None:
        self.registry = CollectorRegistry()
        self._requests = self._counter("requests", "HTTP requests", ["route", "model", "status"])
        self._aliased = self._counter("alias_requests", "Requests to an alias by who answered", ["alias", "model"])
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts", ["model"])
        self._new = self._counter("generation_tokens", "Tokens generated", ["model"])
        self._finished = self._counter("answers", "Answers by how they ended", ["finish"])
        self._queued = self._histogram("queue_seconds", "Time that an answer waited for its first step", WAIT, "model")
        first, each = "From a prompt's arrival to its first token", "Of each token after the first"
        self._first = self._histogram("time_to_first_token_seconds", first, WAIT, "model")
        self._each = self._histogram("time_per_output_token_seconds", each, EACH, "model")
        self._of_models = (
            self._requests, self._aliased, self._prompt, self._new, self._queued, self._first, self._each,
        )  # fmt: skip
        self._total = self._histogram("request_seconds", "From a request's arrival to its end", WHOLE, "route")
        ProcessCollector(registry=self.registry)
        self.registry.register(_OfEngine(stats))
        self._child = cache(_child)

    def __call__(self, exchange: Exchange) -> None:
        """Count a request that has ended."""
        child = self._child
        child(self._requests, exchange.route, exchange.model, str(exchange.status)).inc()
        child(self._total, exchange.route).observe(exchange.ended - exchange.started)
        if exchange.alias and exchange.model:
            child(self._aliased, exchange.alias, exchange.model).inc()
        for answer in exchange.answers:
            child(self._prompt, exchange.model).inc(answer.prompt_tokens)
            child(self._new, exchange.model).inc(answer.new_tokens)
            child(self._finished, answer.finish).inc()
            if answer.queued is not None:
                child(self._queued, exchange.model).observe(answer.queued)
            if answer.first_token is not None:
                child(self._first, exchange.model).observe(answer.first_token)
                if answer.ended is not None and answer.new_tokens > 1:
                    each = (answer.ended - answer.first_token) / (answer.new_tokens - 1)
                    child(self._each, exchange.model).observe(each)

    def forget(self, model: str) -> None:
        """A model is gone, and what was counted of it: adapters that come and go leave nothing behind."""
        for metric in self._of_models:
            metric.remove_by_labels({"model": model})
        self._child.cache_clear()

    def text(self) -> bytes:
        """The page, in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, about: str, labels: list[str]) -> Counter:
        return Counter(f"suite_{name}", about, labels, registry=self.registry)

    def _histogram(self, name: str, about: str, bounds: tuple[float, ...], label: str) -> Histogram:
        return Histogram(f"suite_{name}", about, [label], buckets=bounds, registry=self.registry)


def _child(metric: M, *labels: str) -> M:
    return metric.labels(*labels)


class _OfEngine(Collector):
    def __init__(self, stats: Callable[[], Mapping[str, Stats]]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for name, (kind, about) in ENGINE.items():
            yield _labelled(kind, f"suite_engine_{name}", about, {m: getattr(s, name) for m, s in stats.items()})
        for name, (kind, about) in ADAPTERS.items():
            values = {m: getattr(s.adapters, name) for m, s in stats.items()}
            yield _labelled(kind, f"suite_adapters_{name}", about, values)


def _labelled(
    kind: type[CounterMetricFamily] | type[GaugeMetricFamily], name: str, about: str, values: Mapping[str, float]
) -> Metric:
    family = kind(name, about, labels=["model"])
    for model, value in values.items():
        family.add_metric([model], value)
    return family
