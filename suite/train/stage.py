"""The `train` stage: supervised fine-tuning on conversations, as a LoRA adapter or of all parameters."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from suite import data
from suite.config import ArtifactType, Config, DatasetRef, Launch, ModelRef
from suite.errors import SuiteError, near
from suite.stages import Artifact, Job, Stage


class Lora(Config):
    """A low-rank adapter beside the frozen weights: W + (alpha / rank) B A (Hu et al., arXiv:2106.09685)."""

    rank: int = Field(16, ge=1, le=1024)
    """Rank of the update, and the adapter's size."""
    alpha: float = Field(32, gt=0)
    """Scale of the update: alpha / rank, or alpha / sqrt(rank) with rslora."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input while training."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Which layers get an adapter: "all-linear" is every linear layer but the head, else names such as "q_proj"."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank), which keeps large ranks stable (Kalajdzievski, arXiv:2312.03732)."""
    dora: bool = False
    """Learn magnitude and direction apart (Liu et al., arXiv:2402.09353); slower."""
    base_bits: Literal[4, 8] | None = None
    """Hold the frozen base in so few bits while training: 4 is NF4, as in QLoRA (Dettmers et al., arXiv:2305.14314), 8
    is LLM.int8() (arXiv:2208.07339). The adapter is merged into, and served on, the base as it is."""


class Train(Stage):
    """Fine-tune `base` on conversations; loss on all assistant turns and nothing else."""

    libraries: ClassVar[tuple[str, ...]] = (
        "torch", "transformers", "tokenizers", "peft", "trl", "accelerate", "bitsandbytes",
    )  # fmt: skip
    preload: ClassVar[tuple[str, ...]] = ("torch", "transformers", "peft", "trl", "suite.train.sft")

    base: ModelRef
    """The model to tune: a folder, a hub reference, or a stage that makes a model."""
    data: DatasetRef | list[DatasetRef]
    """Conversations, .json or .jsonl, in alpaca, sharegpt, XTuner or OpenAI form; or several such files."""
    fill: dict[str, str] = Field(default_factory=dict)
    """Values for `{{name}}` placeholders in the data, e.g. `{ name = "Nano", author = "us" }`."""
    lora: Lora | Literal[False] = Lora()
    """The adapter's settings; `false` trains all parameters and makes a model."""
    epochs: float = Field(3.0, gt=0)
    """How often every row is seen."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many optimizer steps, whatever `epochs` says."""
    lr: float = Field(2e-4, gt=0, le=1)
    """Peak learning rate; 2e-4 suits LoRA, all parameters want about 1e-5."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warmup."""
    warmup: float = Field(0.03, ge=0, lt=1)
    """Share of the steps over which the learning rate rises from 0."""
    batch_size: int = Field(8, ge=1)
    """Rows (with packing: packed rows) in one forward pass."""
    accumulate: int = Field(1, ge=1)
    """Forward passes whose gradients make one step."""
    max_length: int = Field(1024, ge=8)
    """Longest row in tokens; longer ones are cut, and counted in the report."""
    packing: bool = False
    """Put several rows into one of `max_length` tokens; they do not see each other, and the loss stays the same."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the forward pass; auto is bfloat16 on a GPU that has it. Learnt weights are float32."""
    seed: int = Field(0, ge=0)
    """Decides the adapter's first values, the order of the rows and dropout."""
    save_steps: Annotated[int, Launch()] = Field(200, ge=1)
    """Steps between checkpoints; a run that was killed goes on from the last one with the same result."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """More settings for trl.SFTConfig, by their names there, e.g. `{ weight_decay = 0.1 }`."""

    def makes(self) -> ArtifactType:
        """An adapter, or a model when all parameters are trained."""
        return "adapter" if self.lora else "model"

    def check(self, inputs: Mapping[str, list[Artifact | None]]) -> None:
        """Raise SuiteError when `extra`, the base's folder or the data cannot be used."""
        if self.extra:
            _check_extra(self.extra)
        for base in inputs.get("base", ()):
            if base is not None:
                _check_base(base.path, self.max_length)
        known = [artifact.path for artifact in inputs.get("data", ()) if artifact is not None]
        if known and len(known) == len(inputs["data"]):
            data.check(known, self.fill)

    def run(self, job: Job) -> dict[str, Any]:
        """Train, and return losses, counts of rows and tokens, and the speed."""
        from suite.train import sft

        return sft.train(self, job)


OWN_NAMES = {
    "learning_rate": "lr",
    "lr_scheduler_type": "schedule",
    "warmup_steps": "warmup",
    "warmup_ratio": "warmup",
    "num_train_epochs": "epochs",
    "max_steps": "max_steps",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulate",
    "max_length": "max_length",
    "packing": "packing",
    "bf16": "dtype",
    "fp16": "dtype",
    "seed": "seed",
    "data_seed": "seed",
    "save_steps": "save_steps",
}
"""Names of trl.SFTConfig that this stage has a setting for."""

FIXED = re.compile(
    "(assistant_only|average_tokens|chat_template|completion_only|dataset_|disable_|do_|eos_|eval_|full_determ|hub_|"
    "ignore_data|label_names|load_best|logging_|max_seq|model_init|output_|overwrite_|packing_|pad_token|padding_|"
    "push_to|remove_unused|report_to|resume_|run_name|save_|shuffle_|trackio_|truncation_|trust_remote|use_cpu)"
)
"""Names of trl.SFTConfig on which exact masks, packing, resuming or reproducible artifacts depend."""


def _check_extra(extra: Mapping[str, Any]) -> None:
    for name in extra:
        if name in OWN_NAMES:
            raise SuiteError(f"extra.{name}: the stage has a setting for this", hint=f"set {OWN_NAMES[name]} instead")
        if FIXED.match(name):
            raise SuiteError(f"extra.{name}: exact and repeatable training depends on it", hint="leave it out")
    known = _config_names()
    for name in extra:
        if name not in known:
            raise SuiteError(f"extra.{name}: trl.SFTConfig has no such setting", hint=near(name, known))


def _config_names() -> list[str]:
    """The fields of trl.SFTConfig and its bases, read from their sources: importing them would take seconds."""
    names: list[str] = []
    for package, file in (
        ("trl", "trainer/sft_config.py"),
        ("trl", "trainer/base_config.py"),
        ("transformers", "training_args.py"),
    ):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise SuiteError(f"{package} is not installed", hint="pip install .")
        tree = ast.parse((Path(spec.origin).parent / file).read_text("utf-8"))
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                fields = (item.target for item in node.body if isinstance(item, ast.AnnAssign))
                names += [field.id for field in fields if isinstance(field, ast.Name) and not field.id.startswith("_")]
    return names


def _check_base(folder: Path, max_length: int) -> None:
    """A base needs config.json, weights, a tokenizer with a chat template, and positions for the longest row."""
    where = str(folder)
    if not (folder / "config.json").is_file():
        raise SuiteError("no config.json, so this is no model folder", where=where, hint="name the folder that has it")
    positions = json.loads((folder / "config.json").read_text("utf-8")).get("max_position_embeddings")
    if positions and max_length > positions:
        raise SuiteError(
            f"max_length: {max_length} is more than the base's {positions} positions",
            where=where,
            hint=f"set max_length = {positions} or less",
        )
    if not any(folder.glob("*.safetensors")):
        raise SuiteError("no .safetensors weights", where=where, hint="convert the weights to safetensors")
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    if not (folder / "chat_template.jinja").is_file() and not settings.get("chat_template"):
        raise SuiteError(
            "the base has no chat template",
            where=where,
            hint="use the family's instruction-tuned model, or put its chat_template.jinja into the folder",
        )
