"""A byte-level BPE tokenizer trained from scratch, shaped like Qwen's: every reader of Qwen models can read it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

END_OF_TEXT, START_OF_TURN, END_OF_TURN = SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Control tokens: the end of a text, and the two ends of a chat turn."""
MARKUP = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
"""One token each, but text: a reply keeps them when special tokens are skipped."""
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's split, to the letter: llama.cpp knows a tokenizer by it (`tokenizer.ggml.pre = qwen2`)."""


def plain_tokenizer(chat_template: str) -> Any:
    """A tokenizer without merges, good for rendering conversations."""
    return train_tokenizer((), 0, 0, chat_template)


def train_tokenizer(texts: Iterable[str], vocab_size: int, context: int, chat_template: str) -> Any:
    """A fast tokenizer of at most `vocab_size` tokens; the same texts in the same order give the same one."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=max(0, vocab_size - len(MARKUP)),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        chat_template=chat_template,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
