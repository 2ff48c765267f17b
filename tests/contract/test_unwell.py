"""Engines that are unwell and do not end by themselves are ended and started again, and no request is lost by it.

The engine is `tests/upstream.py`, which does what requests say.
"""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from serve.engines import remote
from serve.engines.fleet import Fleet
from serve.engines.process import Patience
from tests.contract.pretended import Pretended, gateway, model_and_adapters

HASTY = Patience(stop=0.3, poll=0.02, pause=0.02, longest_pause=0.05, look=0.1, again=0.1, unwell=0.5, silent=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_and_adapters(tmp_path_factory.mktemp("unwell"))


@pytest.mark.parametrize(
    ("word", "reason"),
    [("lose", r"was unwell for \d+ s \(its /health answers 503\)"), ("stall", r"did not answer for \d+ s")],
)
def test_one_that_does_not_end_by_itself_is_ended(
    folder: Path, tmp_path: Path, word: str, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    patience = HASTY if word == "lose" else replace(HASTY, silent=2)
    monkeypatch.setattr(remote, "Fleet", partial(Fleet, patience=patience))
    with gateway(folder, tmp_path, Pretended({"pause": 0.1}), adapters={}) as running:
        with caplog.at_level(logging.WARNING, "serve"):
            answers = running.together([*(f"{i}" for i in range(8)), f"{word} once", *"abcd"], streams=4)
        assert [answer.status_code for answer in answers] == [200] * 13
        assert len(running.lines("started")) == 2
        health = running.http.get("/health").json()
        assert re.fullmatch(rf"base-0 {reason}, and was started again", health["last_failure"])
        assert health["failed_steps"] == 1
        assert re.search(rf"base-0 {reason}, and is started again; its log: ", caplog.text)


def test_others_answer_while_one_is_unwell(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "Fleet", partial(Fleet, patience=replace(HASTY, unwell=600)))
    with gateway(folder, tmp_path, Pretended({}), adapters={}, replicas=2) as running:
        running.until(lambda: len(running.lines("started")) == 2)
        assert running.chat("lose once").status_code == 200
        health = running.http.get("/health").json()
        assert re.fullmatch(r"base-\d: its /health answers 503", health["last_failure"])
        assert len({answer.json()["id"] for answer in running.together(["x"] * 4)}) == 1
        assert len(running.lines("started")) == 2
