from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from suite.chat import Chat
from suite.errors import SuiteError
from suite.stages import Artifact, Job
from suite.train import scratch
from suite.train.pretrain import Pretrain, Shape
from suite.train.tokenizer import PATTERN, train_tokenizer

TEMPLATE = Path(__file__).parents[2] / "examples" / "nano" / "chat_template.jinja"
SHAPE = Shape(hidden=32, layers=2, heads=2, kv_heads=1, head_dim=16, intermediate=48, positions=64)
SETTINGS = Pretrain(
    data=["chat.jsonl", "text.jsonl"],
    held_out="held.jsonl",
    chat_template="chat_template.jinja",
    vocab_size=512,
    shape=SHAPE,
    context=64,
    batch_tokens=256,
    save_steps=3,
)


def dialogue(number: int) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"What comes after {number}?"},
            {"role": "assistant", "content": f"After {number} comes {number + 1}."},
        ]
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Artifact]]:
    folder = tmp_path_factory.mktemp("data")
    rows = {
        "chat": [dialogue(n) for n in range(60)],
        "text": [{"text": f"{n} plus one is {n + 1}. {n}加一等于{n + 1}。"} for n in range(60)],
        "held": [dialogue(n) for n in range(60, 70)],
    }
    found = {}
    for name, lines in rows.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
        found[name] = Artifact(file, "dataset")
    return {
        "data": [found["chat"], found["text"]],
        "held_out": [found["held"]],
        "chat_template": [Artifact(TEMPLATE, "dataset")],
    }


Make = Callable[..., tuple[Path, dict[str, Any]]]


@pytest.fixture
def make(tmp_path: Path, files: dict[str, list[Artifact]]) -> Make:
    def run(name: str, emit: Callable[[dict[str, Any]], None] = lambda event: None) -> tuple[Path, dict[str, Any]]:
        out, work = tmp_path / name, tmp_path / f"{name}.scratch"
        out.mkdir(exist_ok=True)
        work.mkdir(exist_ok=True)
        return out, SETTINGS.run(Job("pretrain", files, out, work, emit))

    return run


def content(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def test_makes_a_model_folder_that_others_read(make: Make, tmp_path: Path) -> None:
    out, metrics = make("one")
    model = AutoModelForCausalLM.from_pretrained(out)
    chat = Chat.load(out)
    assert all(tensor.dtype is torch.bfloat16 for tensor in load_file(out / "model.safetensors").values())
    assert model.config.model_type == "qwen3"
    assert model.config.vocab_size == len(chat.tokenizer)
    assert model.config.use_cache
    assert model.generation_config.eos_token_id == chat.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert not model.generation_config.do_sample
    assert metrics["loss"]["last"] < metrics["loss"]["first"]
    assert metrics["held_out"]["perplexity"] > 1
    assert metrics["documents"] == 120
    for file in out.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name


def test_killed_run_goes_on_to_the_same_bytes(make: Make) -> None:
    whole, _ = make("whole")

    def kill(event: dict[str, Any]) -> None:
        if event["event"] == "progress" and event["step"] >= 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make("killed", kill)
    said = []
    resumed, _ = make("killed", lambda event: said.append(event.get("text", "")))
    assert any(text.startswith("going on from checkpoint-") for text in said)
    assert content(resumed) == content(whole)


def test_packed_loss_is_the_loss_of_each_document_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 17, 3, 11, 30, 2, 9, 21, 6]
    documents = [torch.randint(8, 250, (n,), generator=generator).tolist() for n in lengths]
    model = scratch.build(SHAPE, train_tokenizer((), 512, 64, "{% %}")).eval()
    rows = scratch.Rows([documents], SETTINGS.model_copy(update={"context": 32}), 0)
    assert len(rows) < len(documents)
    batch = {name: torch.stack([rows[n][name] for n in range(len(rows))]) for name in rows[0]}
    with torch.no_grad():
        packed = model(**batch, use_cache=False).loss
        alone = [
            torch.nn.functional.cross_entropy(
                model(torch.tensor([document]), use_cache=False).logits[0, :-1],
                torch.tensor(document[1:]),
                reduction="sum",
            )
            for document in documents
        ]
    assert packed.item() == pytest.approx(sum(map(float, alone)) / sum(n - 1 for n in lengths), rel=1e-5)


def test_files_are_learnt_in_their_order() -> None:
    rows = scratch.Rows([[[1, 1]] * 40, [[2, 2]] * 40], SETTINGS, 0)
    first = [int(rows[number]["input_ids"][0]) for number in range(len(rows))]
    assert first == sorted(first)


def test_file_may_mix_texts_and_conversations(tmp_path: Path) -> None:
    file = tmp_path / "world.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ({"text": "one"}, dialogue(1), {"text": "two"})), "utf-8")
    first, second, third = scratch.read(file)
    assert (first, third) == ("one", "two")
    assert second.messages == dialogue(1)["messages"]


@pytest.mark.parametrize("row", [{"txt": "not"}, {"messages": [{"role": "user", "content": "and?"}]}])
def test_row_that_cannot_be_learnt_is_named_with_its_line(tmp_path: Path, row: dict[str, Any]) -> None:
    file = tmp_path / "world.jsonl"
    file.write_text('{"text": "fine"}\n' + json.dumps(row) + "\n", "utf-8")
    with pytest.raises(SuiteError, match=r"world\.jsonl:2"):
        scratch.read(file)


TOKENIZER = train_tokenizer(["What comes after one?", "一之后是什么？"] * 3, 512, 64, TEMPLATE.read_text("utf-8"))


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_tokenizer_gives_every_text_back(text: str) -> None:
    ids = TOKENIZER(text)["input_ids"]
    assert TOKENIZER.decode(ids) == unicodedata.normalize("NFC", text)


def test_tokenizer_splits_as_qwen2_does() -> None:
    known = "1ff7f41064896984db5d1bb6ff64fa4bc29007d08c1b439e505b7392777a319e"
    assert hashlib.sha256(PATTERN.encode()).hexdigest() == known


def test_special_tokens_are_one_token_and_only_control_tokens_are_hidden() -> None:
    text = "<|im_start|><tool_call>{}</tool_call><|im_end|>"
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"], skip_special_tokens=True) == "<tool_call>{}</tool_call>"


CALL = {"type": "function", "function": {"name": "get_time", "arguments": {"city": "巴黎"}}}
TOOL = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}


def test_template_renders_system_tools_and_marks_what_is_learnt() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Time?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"hour": 3}'},
        {"role": "assistant", "content": "3 o'clock."},
    ]
    chat = Chat(TOKENIZER)
    ids, mask = chat.learnt(messages, [TOOL])
    text = TOKENIZER.decode(ids)
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n")
    assert json.dumps(TOOL) in text
    assert '<|im_start|>user\n<tool_response>\n{"hour": 3}\n</tool_response><|im_end|>\n' in text
    assert TOKENIZER.decode([i for i, learnt in zip(ids, mask, strict=True) if learnt]) == (
        '<tool_call>\n{"name": "get_time", "arguments": {"city": "巴黎"}}\n</tool_call><|im_end|>3 o\'clock.<|im_end|>'
    )


def test_template_without_system_adds_none() -> None:
    text = Chat(TOKENIZER).text([{"role": "user", "content": "Hi"}], generate=True)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
