"""The probe's references: our engine's prompts and greedy answers, kept by the contents of model and adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from serve import probe
from suite.chat import Chat
from suite.errors import SuiteError
from tests.tiny.tiny_models import tiny_adapter, tiny_model


def test_they_are_transformers_own_and_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_model(tmp_path / "base")
    adapter = tiny_adapter(base, tmp_path / "a")
    known = probe.references(base, {"a": adapter})
    chat = Chat.load(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for entry in known[""]:
        assert entry.prompt == chat.ids([{"role": "user", "content": entry.question}], generate=True)
        ids = torch.tensor([entry.prompt])
        made = model.generate(ids, max_new_tokens=probe.TOKENS, do_sample=False, eos_token_id=-1)[0, ids.shape[1] :]
        assert [token.id for token in entry.answer] == made.tolist()
        assert all(token.logprob == max(token.top.values()) for token in entry.answer)
    assert [e.answer for e in known["a"]] != [e.answer for e in known[""]]

    monkeypatch.setattr(probe, "_compute", lambda *_: pytest.fail("computed again"))
    assert probe.references(base, {"other": adapter})["other"] == known["a"]


def test_a_model_that_cannot_chat_is_asked_to_go_on(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", template=None)
    assert not any(entry.chat for entry in probe.references(base, {})[""])


def test_why_there_are_none_is_said(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", architecture="llama")
    other = tiny_adapter(tiny_model(tmp_path / "b", hidden=64), tmp_path / "a")
    with pytest.raises(SuiteError, match=r"no reference answers(.|\n)*another base"):
        probe.references(base, {"a": other})
