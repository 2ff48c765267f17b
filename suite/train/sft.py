"""Supervised fine-tuning with TRL on rows that `suite.chat` has rendered, tokenised and masked.

TRL gets ids and labels and prepares nothing itself: what is learnt is decided in one place. Packing is TRL's
best-fit decreasing: packed rows carry restarting positions, no attention mask and no cache, so that they do not see
each other and the loss is that of the rows alone.
"""

from __future__ import annotations

import gc
import inspect
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
import transformers
import trl
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora import Linear as LoraLinear
from torch.nn import functional

from suite import data, quantized
from suite.chat import Chat
from suite.errors import SuiteError
from suite.stages import Job
from suite.train import checkpoint, curve
from suite.train.arguments import common
from suite.train.report import Report

if TYPE_CHECKING:
    from suite.train.stage import Lora, Train

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
SMALL_LOGITS = 1 << 26
CONFIG_FILES = ("config.json", "generation_config.json")


def train(settings: Train, job: Job) -> dict[str, Any]:
    """Run the stage: see `suite.train.stage.Train`."""
    base = job.input("base")
    chat = Chat.load(base.path)
    examples = prepare(chat, [artifact.path for artifact in job.inputs["data"]], settings, job)
    tokens = examples.counts()
    job.say(f"{len(examples.ids)} rows of {tokens['all']} tokens, {tokens['learnt']} of them learnt")
    for line in examples.accounts():
        job.warn(line)
    model = load(base.path, settings)
    trainer = make_trainer(model, chat.tokenizer, examples.dataset(settings), settings, job)
    resumed = checkpoint.newest(job.scratch / "checkpoints")
    if resumed is not None:
        job.say(f"going on from {resumed.name}")
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    seconds = time.monotonic() - started
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    save(trainer.model, base.path, base.name, job.out)
    _copy_tokenizer(chat, base.path, job.out)
    curve.write(job.out, history)
    return {
        "loss": {"first": history[0]["loss"], "last": history[-1]["loss"]},
        "steps": trainer.state.global_step,
        "rows": len(examples.ids),
        "left_out": len(examples.rows.left_out),
        "tokens": tokens,
        "parameters": {
            "trained": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
            "all": sum(p.numel() for p in trainer.model.parameters()),
        },
        "speed": {"tokens_per_s": round(trainer.tokens_seen / seconds, 1), "seconds": round(seconds, 1)},
    }


@dataclass
class Examples:
    """Tokenised rows: `ids` and `labels` have one list a row, labels are -100 where nothing is learnt."""

    rows: data.Rows
    ids: list[list[int]] = field(default_factory=list)
    labels: list[list[int]] = field(default_factory=list)
    cut_rows: int = 0
    cut_tokens: int = 0

    def counts(self) -> dict[str, int]:
        """Tokens of one epoch: all, learnt, and cut away."""
        learnt = sum(label != -100 for labels in self.labels for label in labels)
        return {"all": sum(map(len, self.ids)), "learnt": learnt, "cut": self.cut_tokens}

    def accounts(self) -> list[str]:
        """What a person should know of rows that were left out or cut."""
        lines = [self.rows.account()] if self.rows.left_out else []
        if self.cut_rows:
            lines.append(
                f"{self.cut_rows} of {len(self.ids)} rows are longer than max_length: their last {self.cut_tokens} "
                "tokens are not trained on"
            )
        return lines

    def dataset(self, settings: Train) -> Any:
        """The rows as TRL takes them, packed into rows of `max_length` if so set."""
        rows = datasets.Dataset.from_dict({"input_ids": self.ids, "labels": self.labels})
        return trl.pack_dataset(rows, settings.max_length, "bfd") if settings.packing else rows


def prepare(chat: Chat, files: Sequence[Path], settings: Train, job: Job) -> Examples:
    """Read, render, tokenise and mask all rows; raises SuiteError when none is left."""
    rows = data.Rows()
    for file in files:
        rows.extend(data.read(file, settings.fill))
    examples = Examples(rows)
    refusal: SuiteError | None = None
    used = []
    for number, row in enumerate(rows.conversations, 1):
        job.progress(number, len(rows.conversations), "tokenize")
        try:
            ids, mask = chat.learnt(row.messages, row.tools)
        except SuiteError as error:
            refusal = error
            rows.left_out.append(data.LeftOut(row.file, row.line, error.message))
            continue
        length = settings.max_length
        # the first token has nothing before it to be predicted from
        labels = [-100, *(i if learnt else -100 for i, learnt in zip(ids[1:length], mask[1:length], strict=True))]
        if all(label == -100 for label in labels):
            rows.left_out.append(data.LeftOut(row.file, row.line, f"no answer within max_length {length}"))
            continue
        used.append(row)
        examples.ids.append(ids[:length])
        examples.labels.append(labels)
        examples.cut_rows += len(ids) > length
        examples.cut_tokens += max(0, len(ids) - length)
    rows.conversations = used
    if not used:
        raise refusal or SuiteError(f"no row can be trained on: {rows.account()}", where=str(files[0]))
    return examples


def load(base: Path, settings: Train) -> Any:
    """The base ready to train, with a fresh adapter if so set."""
    transformers.set_seed(settings.seed)
    half = compute_dtype(settings) is torch.bfloat16
    # learnt weights stay float32: a frozen base may be half, and autocast does the rest
    dtype = torch.bfloat16 if half and settings.lora else torch.float32
    bits = settings.lora.base_bits if settings.lora else None
    options = {"quantization_config": _few_bits(bits, compute_dtype(settings))} if bits else {}
    model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, local_files_only=True, output_loading_info=True, **options
    )
    quantized.check_whole(base, loaded)
    if bits:
        # the trainer turns gradient checkpointing on where it is wanted
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return add_lora(model, settings.lora) if settings.lora else model


def _few_bits(bits: int, compute: torch.dtype) -> transformers.BitsAndBytesConfig:
    """How bitsandbytes holds a frozen base; what it computes in is `compute`."""
    if bits == 8:
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def compute_dtype(settings: Train) -> torch.dtype:
    """The precision of the forward pass that `dtype` means on this machine."""
    half = settings.dtype == "bfloat16" or (
        settings.dtype == "auto" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    )
    return torch.bfloat16 if half else torch.float32


def add_lora(model: Any, lora: Lora) -> Any:
    """`model` with a fresh adapter; raises SuiteError for a target that the model does not have."""
    head = model.get_output_embeddings()
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    targets = sorted(linear) if lora.targets == "all-linear" else lora.targets
    unknown = [target for target in targets if target not in linear]
    if unknown:
        raise SuiteError(
            f"lora.targets: the base has no layer '{unknown[0]}'", hint="it has: " + ", ".join(sorted(linear))
        )
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        task_type="CAUSAL_LM",
    )
    if not lora.base_bits:
        # without this peft asks every quantization library whether the layer is theirs, and imports them for it
        config._register_custom_module({torch.nn.Linear: LoraLinear})
    return get_peft_model(model, config)


class Trainer(trl.SFTTrainer):  # type: ignore[misc]
    """TRL's trainer, reporting to a job and sealing its checkpoints."""

    def __init__(self, job: Job, **kwargs: Any) -> None:
        super().__init__(callbacks=[_Report(job, self)], **kwargs)
        self.remove_callback(transformers.PrinterCallback)
        self.tokens_seen = 0

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """One forward and backward pass over `inputs["input_ids"]` (B, T)."""
        mask = inputs.get("attention_mask")
        self.tokens_seen += inputs["input_ids"].numel() if mask is None else int(mask.sum())
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean cross entropy (nats) over the learnt tokens of a step.

        TRL's fused head saves memory by scoring every position twice, in pieces. Off the GPU, where the logits of the
        learnt positions (B, K, vocabulary) are small, scoring these once takes half the time.
        """
        kept = (inputs["labels"][:, 1:] != -100).any(0).nonzero().squeeze(1)  # (K,)
        size = inputs["labels"].size(0) * len(kept) * self.model.config.get_text_config().vocab_size
        if return_outputs or not self._direct or size > SMALL_LOGITS:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"][:, 1:][:, kept]  # (B, K)
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        logits = model(**inputs, logits_to_keep=kept, use_cache=False).logits  # (B, K, vocabulary)
        total = functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
        return total / (num_items_in_batch if num_items_in_batch is not None else (labels != -100).sum())

    @cached_property
    def _direct(self) -> bool:
        model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        takes_positions = "logits_to_keep" in inspect.signature(model.forward).parameters
        plain = self.args.loss_type == "nll" and not self.args.label_smoothing_factor and not self.aux_loss_enabled
        return plain and takes_positions and self.args.device.type == "cpu"

    def floating_point_ops(self, _inputs: Any) -> int:
        """Nobody reads the count, and taking it walks over all modules every step."""
        return 0

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Leave out TRL's card, which it writes into every checkpoint."""


class _Report(Report):
    def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_save = False  # the artifact itself is about to be written


def make_trainer(model: Any, tokenizer: Any, rows: Any, settings: Train, job: Job) -> Trainer:
    """TRL's trainer for `model` on tokenised `rows`, with everything fixed that the result depends on."""
    gc.freeze()  # Trainer collects garbage first, and the libraries' objects, of which there are a million, are none
    cuda = torch.cuda.is_available()
    free = {"gradient_checkpointing": cuda, "optim": "adamw_torch_fused", **settings.extra}
    try:
        config = trl.SFTConfig(
            **free,
            **common(settings, job),
            lr_scheduler_type=settings.schedule if settings.schedule != "constant" else "constant_with_warmup",
            max_steps=settings.max_steps or -1,
            per_device_train_batch_size=settings.batch_size,
            gradient_accumulation_steps=settings.accumulate,
            max_length=settings.max_length,
            packing=settings.packing,
            dataset_kwargs={"skip_prepare_dataset": True},
            bf16=cuda and compute_dtype(settings) is torch.bfloat16,
        )
    except (TypeError, ValueError) as error:
        raise SuiteError(f"trl refuses these settings: {error}", where="extra") from error
    return Trainer(job, model=model, args=config, train_dataset=rows, processing_class=tokenizer)


def save(model: Any, base: Path, base_name: str, out: Path) -> None:
    """Write the adapter, or the whole model in the base's dtype with the base's configuration, to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        model.save_pretrained(out, save_embedding_layers=False)
        (out / "README.md").unlink()
        file = out / "adapter_config.json"
        saved = json.loads(file.read_text("utf-8"))
        saved["base_model_name_or_path"] = base_name
        saved["target_modules"] = sorted(saved["target_modules"])  # peft holds a set
        file.write_text(json.dumps(saved, indent=2, ensure_ascii=False) + "\n", "utf-8")
        return
    dtype = transformers.AutoConfig.from_pretrained(base, local_files_only=True).dtype
    model.to(dtype or torch.float32).save_pretrained(out)
    # training sets a pad token and turns the cache off; what is published is the base's own configuration
    for name in CONFIG_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, out / name)
        else:
            (out / name).unlink(missing_ok=True)


def _copy_tokenizer(chat: Chat, base: Path, out: Path) -> None:
    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, out / name)
    template = chat.tokenizer.chat_template
    if isinstance(template, str) and not (out / "chat_template.jinja").exists():
        (out / "chat_template.jinja").write_text(template, "utf-8")
