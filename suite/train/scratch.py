"""A model from scratch: tokenizer, packed rows, transformers' Trainer.

A packed row (T,) is told apart into documents by its positions alone, which begin at 0 with each of them. That is
exact only with neither an attention mask nor a cache. A document's first token has no label, for nothing before it
says what it should be; padding has none either, and each of its tokens is a document of its own.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from suite import data
from suite.chat import Chat
from suite.errors import SuiteError
from suite.stages import Job
from suite.train import checkpoint, curve
from suite.train.arguments import common
from suite.train.packing import pack
from suite.train.pretrain import Pretrain, Shape
from suite.train.report import Report
from suite.train.tokenizer import END_OF_TEXT, END_OF_TURN, MARKUP, SPECIAL, plain_tokenizer, train_tokenizer

Document = str | data.Conversation
TOKENIZER_SAMPLE = 20_000
"""Documents that the tokenizer is trained on: more change its merges no more."""


def pretrain(settings: Pretrain, job: Job) -> dict[str, Any]:
    """Run the stage: see `suite.train.pretrain.Pretrain`."""
    files = [read(artifact.path) for artifact in job.inputs["data"]]
    documents = [document for file in files for document in file]
    template = job.input("chat_template").path.read_text("utf-8")
    sample = random.Random(settings.seed).sample(documents, min(len(documents), TOKENIZER_SAMPLE))
    job.say(f"tokenizer of {settings.vocab_size} tokens from {len(sample)} documents")
    tokenizer = _tokenizer(sample, settings, template)
    chat = Chat(tokenizer)
    rows = Rows([[encode(chat, d) for d in file] for file in files], settings, tokenizer.pad_token_id)
    transformers.set_seed(settings.seed)
    model = build(settings.shape, tokenizer)
    trainer = Trainer(job, model=model, args=_arguments(settings, job), train_dataset=rows)
    resumed = checkpoint.newest(job.scratch / "checkpoints")
    if resumed is not None:
        job.say(f"going on from {resumed.name}")
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    seconds = time.monotonic() - started
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    metrics: dict[str, Any] = {
        "loss": {"first": history[0]["loss"], "last": history[-1]["loss"]},
        "steps": trainer.state.global_step,
        "documents": len(documents),
        "tokens": {"all": rows.tokens, "rows": len(rows), "filled": round(rows.tokens / (len(rows) * rows.size), 4)},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "speed": {"tokens_per_s": round(trainer.tokens_seen / seconds, 1), "seconds": round(seconds, 1)},
    }
    held_out = job.optional("held_out")
    if held_out is not None:
        kept = [encode(chat, document) for document in read(held_out.path)]
        loss = trainer.evaluate(Rows([kept], settings, tokenizer.pad_token_id))["eval_loss"]
        metrics["held_out"] = {"loss": round(loss, 5), "perplexity": round(math.exp(loss), 4)}
    model.config.use_cache = True  # off only while training
    model.to(torch.bfloat16).save_pretrained(job.out)
    tokenizer.save_pretrained(job.out)
    curve.write(job.out, history)
    return metrics


def read(file: Path) -> list[Document]:
    """The documents of a file; raises SuiteError for a row that is neither a text nor a conversation."""
    rows = data.read(file)
    documents: dict[int, Document] = {row.line: row for row in rows.conversations}
    lines = file.read_text("utf-8").split("\n") if rows.left_out else []
    for left_out in rows.left_out:
        row = json.loads(lines[left_out.line - 1])
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise SuiteError(str(left_out), hint='a row of pretraining data is a conversation or {"text": "..."}')
        documents[left_out.line] = row["text"]
    return [documents[line] for line in sorted(documents)]


def encode(chat: Chat, document: Document) -> list[int]:
    """Ids (T,) of a document; a text ends with the end of text, a conversation as its template ends it."""
    if isinstance(document, str):
        return [*chat.tokenizer(document)["input_ids"], chat.tokenizer.convert_tokens_to_ids(END_OF_TEXT)]
    return chat.ids(document.messages, document.tools)


def _tokenizer(documents: Sequence[Document], settings: Pretrain, template: str) -> Any:
    """The tokenizer for what the model will read: texts, and conversations as the template renders them."""
    renderer = Chat(plain_tokenizer(template))
    control = re.compile("|".join(map(re.escape, (*SPECIAL, *MARKUP))))
    texts = (d if isinstance(d, str) else renderer.text(d.messages, d.tools) for d in documents)
    parts = (part for text in texts for part in control.split(text) if part)
    return train_tokenizer(parts, settings.vocab_size, settings.shape.positions, template)


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Packed rows: input_ids, labels and position_ids of shape (T,) each, T = `settings.context`.

    `files` are lists of documents; the rows of one come before those of the next, shuffled among themselves.
    """

    def __init__(self, files: Sequence[Sequence[Sequence[int]]], settings: Pretrain, pad: int) -> None:
        self.size, self.pad, self.tokens = settings.context, pad, 0
        self.rows: list[list[Sequence[int]]] = []
        order = random.Random(settings.seed)
        for documents in files:
            packed = pack([len(document) for document in documents], self.size)
            order.shuffle(packed)
            self.rows += [[documents[number][start:end] for number, start, end in row] for row in packed]
            self.tokens += sum(map(len, documents))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        pieces = self.rows[index]
        padding = self.size - sum(map(len, pieces))
        ids = [*itertools.chain.from_iterable(pieces), *[self.pad] * padding]
        labels = [label for piece in pieces for label in (-100, *piece[1:])] + [-100] * padding
        positions = [*itertools.chain.from_iterable(range(len(piece)) for piece in pieces), *[0] * padding]
        columns = {"input_ids": ids, "labels": labels, "position_ids": positions}
        return {name: torch.tensor(column) for name, column in columns.items()}


def build(shape: Shape, tokenizer: Any) -> Any:
    """A Qwen3 model with random weights, which stops at the end of a turn and of a text."""
    pad, end = tokenizer.convert_tokens_to_ids([END_OF_TEXT, END_OF_TURN])
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
    )
    model = transformers.Qwen3ForCausalLM(config)
    model.generation_config = transformers.GenerationConfig(eos_token_id=[end, pad], pad_token_id=pad)
    return model


def _arguments(settings: Pretrain, job: Job) -> Any:
    cuda = torch.cuda.is_available()
    batch = settings.batch_tokens // settings.context
    return transformers.TrainingArguments(
        **common(settings, job),
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        lr_scheduler_type="cosine",
        weight_decay=settings.weight_decay,
        adam_beta2=0.95,
        optim="adamw_torch_fused",
        train_sampling_strategy="sequential",
        use_cache=False,
        use_cpu=not cuda,  # transformers takes bf16 on a CPU only when it is chosen
        bf16=settings.dtype == "bfloat16",
        remove_unused_columns=False,
    )


class Trainer(transformers.Trainer):  # type: ignore[misc]
    """transformers' trainer, reporting to a job and sealing its checkpoints."""

    def __init__(self, job: Job, **kwargs: Any) -> None:
        super().__init__(callbacks=[Report(job, self)], **kwargs)
        self.remove_callback(transformers.PrinterCallback)
        self.tokens_seen = 0

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """One forward and backward pass over `inputs["input_ids"]` (B, T)."""
        self.tokens_seen += inputs["input_ids"].numel()
        return super().training_step(model, inputs, *args, **kwargs)
