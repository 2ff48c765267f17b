"""The main job, end to end: what a stranger types, and what it leaves."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.quickstart.running import ROOT, Quickstart, Run, free_port, run_quickstart, server_of, serving

ARTIFACTS = ["nano", "identity", "style", "merged", "small[gptq]", "small[awq]", "small[bnb]"]
PARENTS = {
    "identity": "nano", "style": "nano", "merged": "style",
    "small[gptq]": "merged", "small[awq]": "merged", "small[bnb]": "merged",
}  # fmt: skip


def test_the_first_run_makes_everything(quickstart: Quickstart) -> None:
    print(f"\nfirst run: {quickstart.seconds:.1f} s\n{quickstart.output}")
    assert {s["state"] for s in quickstart.report["stages"]} <= {"done", "cached"}
    assert all(g["held"] for s in quickstart.report["stages"] for g in s["gates"])
    assert "suite serve --model" in quickstart.output
    assert "suite chat" in quickstart.output


def test_the_second_run_makes_nothing(quickstart: Quickstart, suite: Run, home: Path) -> None:
    again = run_quickstart(suite, home)
    print(f"\nsecond run: {again.seconds:.1f} s")
    assert {s["state"] for s in again.report["stages"]} == {"cached"}
    assert again.report["artifacts"] == [
        {**row, "state": "cached"} for row in quickstart.report["artifacts"]
    ]  # fmt: skip


def test_every_artifact_is_compared_with_its_parent(quickstart: Quickstart) -> None:
    rows = {row["artifact"]: row for row in quickstart.report["artifacts"]}
    assert list(rows) == ARTIFACTS
    assert {name: row["parent"] for name, row in rows.items() if row["parent"]} == PARENTS
    for name, row in rows.items():
        score = row["scores"]["ceval-mini"]
        assert 0 <= score["low"] <= score["acc"] <= score["high"] <= 1
        assert score["failed"] == 0
        assert 0 <= row["scores"]["summaries"]["rougeL"] <= 1
        assert row["scores"]["perplexity"]["ppl"] > 1
        if name in PARENTS:
            assert row["verdicts"]
            assert set(row["changes"]) == {"acc", "ROUGE-L", "ppl"}
    assert rows["merged"]["parity"]["max_dlogit"] < 0.5  # one bf16 rounding of each weight
    for name in ARTIFACTS[4:]:
        assert 0 < rows[name]["parity"]["kl"] < 1
        assert rows[name]["bytes"] < rows["merged"]["bytes"]


def test_the_base_has_its_skills_and_its_adapters_change_it(quickstart: Quickstart) -> None:
    rows = {row["artifact"]: row["scores"] for row in quickstart.report["artifacts"]}
    assert rows["nano"]["ceval-mini"]["acc"] >= 0.8
    assert rows["identity"]["perplexity"]["ppl"] != rows["nano"]["perplexity"]["ppl"]


def test_no_path_of_this_machine_is_left_in_an_artifact(quickstart: Quickstart, home: Path) -> None:
    wrong = [
        str(file.relative_to(home))
        for file in (home / "artifacts").rglob("*")
        if file.is_file() and file.name != "artifact.json"
        for place in (str(home).encode(), str(ROOT).encode(), b"/tmp/", b"site-packages")
        if place in file.read_bytes()
    ]
    assert not wrong


def test_the_hugging_face_folder_is_the_merged_model(quickstart: Quickstart) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    said = []
    for stage in ("merged", "hf"):
        folder = quickstart.artifact(stage)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": "What is the capital of France?"}],
            add_generation_prompt=True,
            return_tensors="pt",
        )["input_ids"]
        said.append(model.generate(prompt, max_new_tokens=16, do_sample=False)[0, prompt.shape[1] :].tolist())
    assert said[0] == said[1]
    card = (quickstart.artifact("hf") / "README.md").read_text("utf-8")
    assert card.startswith("---\n")
    assert "Base model: `nano`" in card  # in the metadata only what is on a hub
    assert "ceval-mini" in card


def test_the_ollama_package_is_complete(quickstart: Quickstart) -> None:
    folder = quickstart.artifact("ollama")
    modelfile = (folder / "Modelfile").read_text("utf-8")
    weights = re.search(r"^FROM \./(\S+\.gguf)$", modelfile, re.M)
    assert weights
    assert (folder / weights[1]).read_bytes()[:4] == b"GGUF"
    assert 'PARAMETER stop "<|im_end|>"' in modelfile
    assert "TEMPLATE" in modelfile


@pytest.fixture(scope="module")
def server(quickstart: Quickstart, home: Path) -> Iterator[str]:
    """`suite serve` with both adapters of the run, until the tests are over; it must end cleanly."""
    assert quickstart.artifact("identity").is_dir()
    with server_of(home, "--model", "nano", "--lora", "identity=@identity,style=@style") as url:
        yield url


def test_one_server_answers_as_base_and_as_each_adapter(server: str) -> None:
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none")
    assert [m.id for m in client.models.list()] == ["nano", "identity", "style"]
    said = {}
    for model in ("nano", "identity", "style"):
        reply = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "Who are you?"}], temperature=0
        )
        said[model] = reply.choices[0].message.content
    print(said)
    assert len(set(said.values())) == 3
    with pytest.raises(openai.NotFoundError, match="stlye"):
        client.chat.completions.create(model="stlye", messages=[{"role": "user", "content": "x"}])


def test_eval_and_chat_talk_to_the_server(server: str, suite: Run) -> None:
    done = suite(
        "eval", "--url", server, "--model", "style", "--sets", "ceval-mini,summaries", "--limit", "8", "--json"
    )
    assert done.returncode == 0
    scores = json.loads(done.stdout.splitlines()[-1])
    assert set(scores) >= {"ceval-mini", "summaries"}
    done = suite("chat", "--url", server, "--model", "nano", input="What is 2 + 3?\n/model style\nWhat is 2 + 3?\n")
    assert done.returncode == 0
    assert done.stdout.count("5") >= 1
    assert math.isfinite(scores["ceval-mini"]["acc"])


def test_a_run_serves_what_its_serve_table_names(quickstart: Quickstart, home: Path) -> None:
    port = free_port()
    with serving(home, port, "run", "examples/quickstart.toml", "--serve", "--set", f"serve.port={port}") as url:
        models = openai.OpenAI(base_url=f"{url}/v1", api_key="-").models.list().data
    assert [m.id for m in models] == ["nano", "identity", "style"]
