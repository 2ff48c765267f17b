"""Our token F1 is the one that transformers has for SQuAD."""

from __future__ import annotations

import pytest
from transformers.data.metrics.squad_metrics import compute_f1

from evalsets import metrics

PAIRS = [
    ("the cat sat on the mat", "the cat lay on a mat"), ("On Monday, Tom bought books.", "on Monday Tom bought three books"), ("", "a"),
    ("an", "the"), ("It's 3.5 km!", "it is 3.5 km"), ("words words words", "words"), ("nothing alike", "other things"),
]  # fmt: skip


@pytest.mark.parametrize(("reply", "reference"), PAIRS)
def test_f1_is_that_of_squad(reply: str, reference: str) -> None:
    assert metrics.f1(reply, reference) == pytest.approx(compute_f1(reference, reply))
