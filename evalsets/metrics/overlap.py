"""ROUGE, BLEU and chrF, each by the library that defines it for the language, on a scale of 0 to 1.

English   rouge-score (no stemming), sacrebleu tokenizer "13a"
Chinese   rouge-chinese over jieba's words, sacrebleu tokenizer "zh"
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

ROUGE = ("rouge1", "rouge2", "rougeL")
BLEU_TOKENIZERS = {"en": "13a", "zh": "zh"}


def rouge(language: str, reply: str, reference: str) -> dict[str, float]:
    """F-measures of ROUGE-1, ROUGE-2 and ROUGE-L; all 0 where a side has no words."""
    if language == "zh":
        return _rouge_chinese(reply, reference)
    scores = _english().score(reference, reply)
    return {name: float(scores[name].fmeasure) for name in ROUGE}


def _rouge_chinese(reply: str, reference: str) -> dict[str, float]:
    words, expected = words_chinese(reply), words_chinese(reference)
    if not words or not expected:
        return dict.fromkeys(ROUGE, 0.0)
    (scores,) = _chinese().get_scores(" ".join(words), " ".join(expected))
    return {name: float(scores[key]["f"]) for name, key in zip(ROUGE, ("rouge-1", "rouge-2", "rouge-l"), strict=True)}


def words_chinese(text: str) -> list[str]:
    """Jieba's words, without the white space between them."""
    return [word for word in _jieba().cut(text) if word.strip()]


def bleu(language: str, replies: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU as sacrebleu computes it, divided by 100."""
    import sacrebleu

    tokenizer = BLEU_TOKENIZERS[language]
    return float(sacrebleu.corpus_bleu(list(replies), [list(references)], tokenize=tokenizer).score) / 100


def chrf(reply: str, reference: str) -> float:
    """chrF2 of one reply as sacrebleu computes it (Popović 2015), divided by 100; characters, so any language."""
    import sacrebleu

    return float(sacrebleu.sentence_chrf(reply, [reference]).score) / 100


@cache
def _english() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(ROUGE), use_stemmer=False)


@cache
def _chinese() -> Any:
    return _quietly("rouge_chinese").Rouge()


@cache
def _jieba() -> Any:
    tokenizer = _quietly("jieba").Tokenizer()
    # its own way would trust a cache file that anybody may have put into the temporary directory
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    tokenizer.initialized = True
    return tokenizer


def _quietly(module: str) -> Any:
    """Import a module whose sources have invalid escape sequences, which Python warns of when it compiles them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(module)
