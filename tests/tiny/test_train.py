"""Fine-tuning a tiny model for real: what is learnt, the same bytes every time, and after kill -9 too."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from suite.errors import SuiteError
from suite.stages import Artifact, Job
from suite.train.stage import Lora, Train
from tests.tiny.tiny_models import tiny_model

ROOT = Path(__file__).parents[2]
SENTENCE = "who are you what can do for me today tell story about the river and small town please answer"
WORDS = SENTENCE.split()
ROWS = [
    {
        "messages": [
            {"role": "user", "content": " ".join(WORDS[n % 7 : n % 7 + 3 + n % 4])},
            {"role": "assistant", "content": " ".join(WORDS[n % 5 :: 2 + n % 3])},
            {"role": "user", "content": WORDS[n % 11]},
            {"role": "assistant", "content": " ".join(WORDS[n % 3 : 4])},
        ]
    }
    for n in range(24)
]
SHORT: dict[str, Any] = {"lr": 1e-3, "batch_size": 4, "max_length": 128, "lora": Lora(rank=4, alpha=8)}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Artifact]]:
    folder = tmp_path_factory.mktemp("train")
    (folder / "rows.json").write_text(json.dumps(ROWS), "utf-8")
    model = tiny_model(folder / "base", hidden=64, dtype="bfloat16")
    return {"base": [Artifact(model, "model")], "data": [Artifact(folder / "rows.json", "dataset")]}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


class Told(Job):
    """A job that remembers what it was told."""

    def __init__(self, inputs: dict[str, list[Artifact]], folder: Path) -> None:
        self.events: list[dict[str, Any]] = []
        super().__init__("train", inputs, folder / "out", folder / "scratch", self.events.append)


def train(inputs: dict[str, list[Artifact]], folder: Path, **settings: Any) -> tuple[dict[str, Any], Told]:
    stage = Train(base="base", data="rows.json", **{**SHORT, **settings})
    stage.check(inputs)  # type: ignore[arg-type]
    job = Told(inputs, folder)
    return stage.run(job), job


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def parts(inputs: dict[str, list[Artifact]], folder: Path, **settings: Any) -> Any:
    """The stage's trainer, before it has run."""
    from suite.chat import Chat
    from suite.train import sft

    stage = Train(base="base", data="rows.json", **{**SHORT, **settings})
    chat = Chat.load(inputs["base"][0].path)
    job = Told(inputs, folder)
    examples = sft.prepare(chat, [inputs["data"][0].path], stage, job)
    model = sft.load(inputs["base"][0].path, stage)
    return sft.make_trainer(model, chat.tokenizer, examples.dataset(stage), stage, job)


def test_an_adapter_is_learnt_and_is_the_same_every_time(inputs: Any, tmp_path: Path) -> None:
    metrics, job = train(inputs, tmp_path / "a", epochs=3, lr=5e-3)
    assert metrics["loss"]["last"] < metrics["loss"]["first"] - 0.5
    assert metrics["steps"] == 18
    assert metrics["rows"] == 24
    assert job.events[-1]["step"] == job.events[-1]["total"] == 18
    assert {"loss", "lr", "tokens_per_s"} <= set(job.events[-1]["values"])
    again, _ = train(inputs, tmp_path / "b", epochs=3, lr=5e-3)
    assert again["loss"] == metrics["loss"]
    assert content(tmp_path / "a" / "out") == content(tmp_path / "b" / "out")

    out = tmp_path / "a" / "out"
    assert set(content(out)) >= {"adapter_model.safetensors", "adapter_config.json", "chat_template.jinja", "loss.png"}
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base"
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    base = inputs["base"][0].path
    assert all(str(base.parent).encode() not in data for data in content(out).values())
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    steps = (out / "loss.csv").read_text().splitlines()
    assert len(steps) == 19
    assert float(steps[-1].split(",")[2]) == metrics["loss"]["last"]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_in_few_bits_gives_an_adapter_of_the_base_itself(inputs: Any, tmp_path: Path, bits: int) -> None:
    import bitsandbytes as bnb
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    lora = Lora(rank=4, alpha=8, base_bits=bits)
    trainer = parts(inputs, tmp_path, lora=lora)
    held = {4: bnb.nn.Linear4bit, 8: bnb.nn.Linear8bitLt}[bits]
    # four linear layers of attention and three of the MLP in each of the two layers; the head stays as it is
    assert sum(isinstance(module, held) for module in trainer.model.modules()) == 14
    metrics, _ = train(inputs, tmp_path, epochs=3, lr=5e-3, lora=lora)
    assert metrics["loss"]["last"] < metrics["loss"]["first"] - 0.5
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base"
    plain = AutoModelForCausalLM.from_pretrained(inputs["base"][0].path, dtype=torch.float32)
    ids = torch.tensor([[1, 50, 60, 70]])
    before = plain(ids).logits
    assert (PeftModel.from_pretrained(plain, tmp_path / "out")(ids).logits - before).abs().max() > 1e-3


def test_the_saved_adapter_is_the_trained_one(inputs: Any, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    trainer = parts(inputs, tmp_path, max_steps=4)
    trainer.train()
    from suite.train import sft

    base = inputs["base"][0].path
    sft.save(trainer.model, base, "base", tmp_path / "out")
    fresh = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ids = torch.tensor([[1, 50, 60, 70]])
    plain = fresh(ids).logits
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trainer.model.eval()(ids).logits)
        assert (loaded(ids).logits - plain).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_rows_do_not_see_each_other(inputs: Any, tmp_path: Path, dtype: str) -> None:
    """Loss and gradients of all rows packed are those of the rows one by one."""
    import torch

    def loss_and_gradient(packing: bool) -> tuple[float, torch.Tensor]:
        trainer = parts(inputs, tmp_path, packing=packing, batch_size=2 if packing else 1, max_length=256, dtype=dtype)
        batches = list(trainer.get_train_dataloader())
        assert (len(batches) < 8) == packing
        learnt = sum(int((batch["labels"] != -100).sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=learnt)
            loss.backward()
            total += loss.item()
        adapter = [p.grad.flatten() for n, p in trainer.model.named_parameters() if p.grad is not None]
        return total, torch.cat(adapter)

    (alone, gradient), (packed, packed_gradient) = loss_and_gradient(False), loss_and_gradient(True)
    exact = dtype == "float32"
    assert packed == pytest.approx(alone, rel=1e-5 if exact else 2e-2)
    assert (gradient - packed_gradient).norm() / gradient.norm() < (1e-4 if exact else 0.2)


def test_the_loss_is_trl_s_own(inputs: Any, tmp_path: Path) -> None:
    """Scoring learnt positions only gives the loss and gradient of TRL's fused head, for batches of unequal rows."""
    trainer = parts(inputs, tmp_path, batch_size=8)
    batch = next(iter(trainer.get_train_dataloader()))
    assert trainer._direct
    found = []
    for direct in (True, False):
        trainer._direct = direct
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        found.append((loss.item(), [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]))
    (ours, gradients), (theirs, expected) = found
    assert ours == pytest.approx(theirs, rel=1e-5)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert (gradient - wanted).norm() <= 1e-3 * wanted.norm() + 1e-7


def test_all_parameters_give_a_model_with_the_base_s_configuration(inputs: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    metrics, _ = train(inputs, tmp_path, lora=False, max_steps=3, lr=1e-3)
    assert metrics["parameters"]["trained"] == metrics["parameters"]["all"]
    base, out = inputs["base"][0].path, tmp_path / "out"
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert {name: (t.shape, t.dtype) for name, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    assert all(not (before[name] == after[name]).all() for name in before if name.endswith("proj.weight"))


def test_long_rows_are_cut_and_counted(inputs: Any, tmp_path: Path) -> None:
    rows = [ROWS[0], {"instruction": "a " * 100, "output": "never seen"}, {"instruction": "a", "output": "b " * 100}]
    (tmp_path / "rows.json").write_text(json.dumps([*rows, {"text": "?"}]), "utf-8")
    given = {**inputs, "data": [Artifact(tmp_path / "rows.json", "dataset")]}
    metrics, job = train(given, tmp_path, max_length=64, max_steps=1)
    assert (metrics["rows"], metrics["left_out"]) == (2, 2)
    assert metrics["tokens"]["cut"] > 100
    warnings = " ".join(event["text"] for event in job.events if event["event"] == "warn")
    assert "2 of 4 rows left out" in warnings
    assert "no answer within max_length 64" in warnings
    assert f"their last {metrics['tokens']['cut']} tokens are not trained on" in warnings


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {root!r})
from suite.stages import Artifact, Job
from suite.train.stage import Lora, Train

class Doomed(Job):
    def progress(self, step, total, what="", **values):
        if what == "train" and step == 8:
            os.kill(os.getpid(), signal.SIGKILL)

folder = Path({folder!r})
inputs = {{"base": [Artifact(Path({base!r}), "model")], "data": [Artifact(Path({data!r}), "dataset")]}}
stage = Train.model_validate_json({settings!r})
stage.run(Doomed("train", inputs, folder / "out", folder / "scratch"))
"""


def test_after_kill_9_it_ends_with_the_same_bytes(inputs: Any, tmp_path: Path) -> None:
    settings = {"epochs": 2, "save_steps": 3, "packing": False, "lora": Lora(rank=4, alpha=8, dropout=0.1)}
    metrics, _ = train(inputs, tmp_path / "whole", **settings)

    killed = tmp_path / "killed"
    stage = Train(base="base", data="rows.json", **{**SHORT, **settings})
    script = KILLED.format(
        root=str(ROOT),
        folder=str(killed),
        base=str(inputs["base"][0].path),
        data=str(inputs["data"][0].path),
        settings=stage.model_dump_json(),
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    checkpoints = killed / "scratch" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-3", "checkpoint-6"]
    # a third one, torn in the middle of its weights
    torn = shutil.copytree(checkpoints / "checkpoint-6", checkpoints / "checkpoint-9")
    (torn / "complete").unlink()
    (torn / "adapter_model.safetensors").write_bytes(b"torn")

    resumed, job = train(inputs, killed, **settings)
    assert {"event": "say", "text": "going on from checkpoint-6"} in job.events
    assert resumed["loss"] == metrics["loss"]
    assert content(killed / "out") == content(tmp_path / "whole" / "out")
    # killed after the last step, before the artifact was whole
    (killed / "out" / "adapter_model.safetensors").unlink()
    train(inputs, killed, **settings)
    assert content(killed / "out") == content(tmp_path / "whole" / "out")


def test_mistakes_that_only_the_model_shows(inputs: Any, tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match=r"no layer 'q_prj'[\s\S]*q_proj"):
        train(inputs, tmp_path, lora=Lora(targets=["q_prj"]))
    with pytest.raises(SuiteError, match="extra: trl refuses"):
        train(inputs, tmp_path, extra={"optim": "adamw_of_mine"})
