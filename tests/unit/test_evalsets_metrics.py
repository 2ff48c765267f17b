"""Our metrics are those of the libraries, called directly."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from evalsets import metrics
from evalsets.extract import pattern
from suite.errors import SuiteError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # their sources have invalid escape sequences
    import jieba
    from rouge_chinese import Rouge

jieba.setLogLevel(60)

ENGLISH = [
    ("the cat sat on the mat", "the cat lay on a mat"),
    ("On Monday, Tom bought three books at the market.", "On Monday, Tom bought three books at the market."),
    ("Nothing alike here", "entirely different words"),
    ("Repeated repeated repeated words", "repeated words"),
]
CHINESE = [
    ("星期一小明在市场买了三本书。", "星期一小明在市场买了三本书。"),
    ("小红在公园看到两只猫", "星期二，小红在公园里看到了两只小猫。"),
    ("天气很好", "他去学校上课"),
    ("用Python写程序 3.5 小时", "他用 Python 写了 3.5 小时的程序。"),
]


@pytest.mark.parametrize(("reply", "reference"), ENGLISH)
def test_english_rouge(reply: str, reference: str) -> None:
    direct = RougeScorer(["rouge1", "rouge2", "rougeL"]).score(reference, reply)
    assert metrics.rouge("en", reply, reference) == {name: score.fmeasure for name, score in direct.items()}


@pytest.mark.parametrize(("reply", "reference"), CHINESE)
def test_chinese_rouge(reply: str, reference: str) -> None:
    words = [" ".join(w for w in jieba.cut(text) if w.strip()) for text in (reply, reference)]
    (direct,) = Rouge().get_scores(words[0], words[1])
    ours = metrics.rouge("zh", reply, reference)
    assert ours == {
        "rouge1": direct["rouge-1"]["f"],
        "rouge2": direct["rouge-2"]["f"],
        "rougeL": direct["rouge-l"]["f"],
    }


@pytest.mark.parametrize(("language", "pairs", "tokenizer"), [("en", ENGLISH, "13a"), ("zh", CHINESE, "zh")])
def test_bleu(language: str, pairs: list[tuple[str, str]], tokenizer: str) -> None:
    replies, references = [a for a, _ in pairs], [b for _, b in pairs]
    direct = sacrebleu.corpus_bleu(replies, [references], tokenize=tokenizer).score / 100
    assert metrics.bleu(language, replies, references) == direct
    assert 0.2 < direct < 1
    assert metrics.bleu(language, references, references) == pytest.approx(1)


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("reply", ["", "  \n", "。！？", "...", "\u3000"])
def test_a_reply_without_words_scores_nothing(language: str, reply: str) -> None:
    assert set(metrics.rouge(language, reply, "好 fine").values()) == {0.0}
    assert metrics.bleu(language, [reply], ["好 fine"]) == 0


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(["en", "zh"]), st.text(max_size=40), st.text("天地人好 abc。", min_size=1, max_size=20))
def test_scores_are_between_nothing_and_all(language: str, reply: str, reference: str) -> None:
    for score in metrics.rouge(language, reply, reference).values():
        assert 0 <= score <= 1
    assert 0 <= metrics.bleu(language, [reply], [reference]) <= 1 + 1e-9


def test_exact_ignores_only_white_space_around() -> None:
    assert metrics.exact(" 42\n", "42") == 1
    assert metrics.exact("42.0", "42") == 0
    assert metrics.exact("Yes", "yes") == 0


@pytest.mark.parametrize(("reply", "reference"), ENGLISH + CHINESE)
def test_chrf(reply: str, reference: str) -> None:
    assert metrics.chrf(reply, reference) == sacrebleu.sentence_chrf(reply, [reference]).score / 100


@pytest.mark.parametrize(
    ("reply", "reference", "f1", "jaccard"),
    [
        ("The cat sat.", "a cat sat", 1, 1), ("the big cat", "the cat", 2 / 3, 1 / 2), ("cat cat dog", "cat", 1 / 2, 1 / 2),
        ("dog", "cat", 0, 0), ("", "cat", 0, 0), ("the", "a", 1, 1), ("巴黎。", "巴黎", 1, 1), ("他去了巴黎", "巴黎", 4 / 7, 2 / 5),
        ("用Python写", "用 Python 写的", 6 / 7, 3 / 4), ("3.5", "35", 1, 1),
    ],
)  # fmt: skip
def test_token_f1_and_jaccard(reply: str, reference: str, f1: float, jaccard: float) -> None:
    assert metrics.f1(reply, reference) == pytest.approx(f1)
    assert metrics.jaccard(reply, reference) == pytest.approx(jaccard)


def test_a_pattern_is_found_or_not() -> None:
    assert metrics.regex("born in 1912.", r"\b1912\b") == 1
    assert metrics.regex("born in 19123", r"\b1912\b") == 0


def test_a_pattern_that_takes_forever_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pattern, "LONGEST", 0.2)
    with pytest.raises(SuiteError, match=r"takes more than 0\.2 s on one reply"):
        metrics.regex("a" * 50 + "!", "(a+)+$|(a|aa)+$|(.*a){30}b")


def test_a_function_of_your_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_metrics_of_a_test.py").write_text(
        "def longer(reply, expected): return float(len(reply) > len(expected))\n"
        "def odd(reply, expected): return 3\n"
        "def broken(reply, expected): return 1 / 0\n"
        "number = 5\n"
        "def score(reply, expected): return 1\n"
        "def exact(reply, expected): return 1\n", "utf-8",
    )  # fmt: skip
    (tmp_path / "broken_module_of_a_test.py").write_text("1 / 0\n", "utf-8")
    (tmp_path / "leaving_module_of_a_test.py").write_text("raise SystemExit(3)\n", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    mine = "my_metrics_of_a_test:longer"
    metrics.check(["exact", mine], "set.toml:3")
    assert metrics.headline([mine, "exact"]) == "longer"
    assert metrics.likeness(["exact", mine], "en", "longer", "long") == {"exact": 0.0, "longer": 1.0}
    for name, message in (
        ("my_metrics_of_a_test:odd", "gave 3, which is no number from 0 to 1"),
        ("my_metrics_of_a_test:broken", "failed: ZeroDivisionError"),
    ):
        with pytest.raises(SuiteError, match=message):
            metrics.likeness([name], "en", "a", "b")
    for name, message in (
        ("my_metrics_of_a_test:none", "cannot be imported: AttributeError"), ("no_such_module_here:f", "cannot be imported: ModuleNotFoundError"),
        ("broken_module_of_a_test:f", "cannot be imported: ZeroDivisionError"), ("my_metrics_of_a_test:number", "is no function"),
        ("leaving_module_of_a_test:f", "cannot be imported: SystemExit: 3"),
        ("rogue", "unknown metric 'rogue'\n  hint: did you mean 'rouge'"),
    ):  # fmt: skip
        with pytest.raises(SuiteError, match=message) as caught:
            metrics.check([name], "set.toml:3")
        assert caught.value.where == "set.toml:3"
    for names in (["my_metrics_of_a_test:score"], ["exact", "my_metrics_of_a_test:exact"], ["rouge", "rouge"]):
        with pytest.raises(SuiteError, match="two figures would have the name"):
            metrics.check(names, "set.toml:3")
