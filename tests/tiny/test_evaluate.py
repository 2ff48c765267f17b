"""The eval stage on real (tiny, random) models, through the real server."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from evalsets import sets
from suite.config import ArtifactType
from suite.errors import StageFailed
from suite.evaluate import Evaluate, compare
from suite.stages import Artifact, Job
from tests.tiny.tiny_models import tiny_adapter, tiny_model

FILES = ("report.json", "report.md", "answers/ceval-mini.jsonl", "answers/summaries.jsonl", "answers/perplexity.jsonl")


def evaluate(
    subject: Path, kind: ArtifactType, work: Path, base: Path | None = None, **settings: Any
) -> dict[str, Any]:
    inputs = {"model": [Artifact(subject, kind)]}
    if base:
        inputs["base"] = [Artifact(base, "model")]
    for name in ("out", "scratch"):
        (work / name).mkdir(parents=True, exist_ok=True)
    stage = Evaluate(model=str(subject), base=str(base) if base else None, **{"limit": 8} | settings)
    stage.check(inputs)  # type: ignore[arg-type]
    return stage.run(Job("score", inputs, work / "out", work / "scratch"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def scored(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    work = tmp_path_factory.mktemp("scored")
    return work, evaluate(model, "model", work)


def test_every_set_is_scored(scored: tuple[Path, dict[str, Any]]) -> None:
    work, metrics = scored
    assert set(metrics) == {"ceval-mini", "summaries", "perplexity", "speed", "memory", "backend"}
    assert metrics["backend"] == "torch"
    assert 20e6 < metrics["memory"] < 4e9  # of a server with torch
    for name in ("ceval-mini", "summaries", "perplexity"):
        assert (metrics[name]["n"], metrics[name]["failed"]) == (8, 0)
    assert metrics["ceval-mini"]["low"] <= metrics["ceval-mini"]["acc"] <= metrics["ceval-mini"]["high"]
    assert metrics["speed"]["tokens_per_s"] > 0
    assert all((work / "out" / name).is_file() for name in FILES)
    assert json.loads(json.dumps(metrics)) == metrics


def test_served_perplexity_is_that_of_the_model(model: Path, scored: tuple[Path, dict[str, Any]]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    total, count = 0.0, 0
    for question in sets.load("perplexity").questions(8):
        ids = torch.tensor([tokenizer(question.text)["input_ids"]])  # (1, T)
        with torch.no_grad():
            loss = loaded(ids, labels=ids).loss
        total, count = total + float(loss) * (ids.shape[1] - 1), count + ids.shape[1] - 1
    assert scored[1]["perplexity"]["tokens"] == count
    assert scored[1]["perplexity"]["ppl"] == pytest.approx(math.exp(total / count), rel=1e-3)


def test_a_killed_evaluation_continues_and_ends_with_the_same_bytes(
    model: Path, scored: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    answers = tmp_path / "scratch" / "answers"
    answers.mkdir(parents=True)
    journal = (scored[0] / "scratch/answers/ceval-mini.jsonl").read_text("utf-8")
    kept = "".join([line for line in journal.splitlines(keepends=True) if '"prompt"' in line][:6])
    (answers / "ceval-mini.jsonl").write_text(kept[:-20], "utf-8")  # killed in the middle of a line
    metrics = evaluate(model, "model", tmp_path, concurrency=3)
    assert metrics["speed"]["questions"] == 8 + 8 - 5
    for name in FILES:
        assert (tmp_path / "out" / name).read_bytes() == (scored[0] / "out" / name).read_bytes()
    assert {c["verdict"] for c in compare(scored[0] / "out", tmp_path / "out").values()} == {"cannot tell"}


def test_an_adapter_is_asked_by_its_name(model: Path, scored: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    adapter = tiny_adapter(model, tmp_path / "adapter")
    metrics = evaluate(adapter, "adapter", tmp_path / "work", base=model, sets=["perplexity"])
    assert metrics["perplexity"]["ppl"] != pytest.approx(scored[1]["perplexity"]["ppl"], rel=1e-4)


def test_too_many_failed_questions_fail_the_stage(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "long"
    folder.mkdir()
    about = 'title = "t"\nlanguages = ["en"]\nlicense = "CC0-1.0"\nsource = "a test"\n'
    (folder / "set.toml").write_text(f'kind = "qa"\n{about}', "utf-8")
    rows = [{"query": "too long " * 40, "response": "x"}, {"query": "short", "response": "x"}]
    (folder / "default.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    settings = {"sets": [str(folder)], "engine": {"max_length": 128}}
    with pytest.raises(StageFailed, match="1 questions failed, the first is default/00001: HTTP 400"):
        evaluate(model, "model", tmp_path, **settings)
    assert "too long" in (tmp_path / "out/answers/long.jsonl").read_text("utf-8")
    metrics = evaluate(model, "model", tmp_path, max_failed=1, **settings)
    assert (metrics["long"]["failed"], metrics["speed"]) == (1, {})  # the answer that there was is not asked for again
