"""The `pretrain` stage: a tokenizer and a small Qwen3 model from nothing but text and conversations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from suite.config import ArtifactType, Config, DatasetRef, Launch
from suite.errors import SuiteError
from suite.stages import Artifact, Job, Stage


class Shape(Config):
    """Sizes of a Qwen3 model with tied embeddings; the quantizers want linear layers in multiples of 128."""

    hidden: int = Field(256, ge=8)
    """Width of the residual stream."""
    layers: int = Field(4, ge=1)
    """Number of transformer blocks."""
    heads: int = Field(4, ge=1)
    """Query heads of a block."""
    kv_heads: int = Field(2, ge=1)
    """Key and value heads of a block; a divisor of `heads`."""
    head_dim: int = Field(64, ge=2, multiple_of=2)
    """Width of a head."""
    intermediate: int = Field(768, ge=8)
    """Width inside the MLP."""
    positions: int = Field(1024, ge=8)
    """Longest context that the model says it takes."""

    @model_validator(mode="after")
    def _heads_in_groups(self) -> Self:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        return self


class Pretrain(Stage):
    """Train a byte-level BPE tokenizer and a model from scratch, with the loss on every token.

    Documents are packed whole into rows and do not see each other.
    """

    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "tokenizers", "accelerate")
    preload: ClassVar[tuple[str, ...]] = ("torch", "transformers", "suite.train.scratch")

    data: DatasetRef | list[DatasetRef]
    """Files of texts (.jsonl rows with `text`) and conversations (rendered with `chat_template`), in the order in which
    they are learnt; the documents of one file are shuffled."""
    held_out: DatasetRef | None = None
    """Rows of the same forms, never trained on, for the held-out loss and perplexity."""
    chat_template: DatasetRef
    """The Jinja file that becomes the model's chat template."""
    vocab_size: int = Field(2048, ge=512)
    """Tokens of the tokenizer, and so rows of the embedding; fewer when the data has too few words."""
    shape: Shape = Shape()
    """Sizes of the model."""
    context: int = Field(256, ge=16)
    """Length in tokens of a packed row; longer documents are cut into pieces."""
    batch_tokens: int = Field(4096, ge=16)
    """Tokens of one optimizer step."""
    epochs: float = Field(1.0, gt=0)
    """How often every document is seen."""
    lr: float = Field(2e-3, gt=0, le=1)
    """Peak learning rate; falls to 0 along a cosine."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the steps over which the learning rate rises from 0."""
    weight_decay: float = Field(0.1, ge=0)
    """AdamW's decay of the weight matrices (Loshchilov and Hutter, arXiv:1711.05101)."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the forward pass; learnt weights are float32 and are saved as bfloat16."""
    seed: int = Field(0, ge=0)
    """Decides the first weights and the order of the documents."""
    save_steps: Annotated[int, Launch()] = Field(200, ge=1)
    """Steps between checkpoints; a run that was killed goes on from the last one with the same result."""

    def makes(self) -> ArtifactType:
        """A model."""
        return "model"

    def check(self, inputs: Mapping[str, list[Artifact | None]]) -> None:
        """Raise SuiteError when a row does not fit into a step or the template is none."""
        if self.batch_tokens % self.context:
            raise SuiteError(
                f"batch_tokens ({self.batch_tokens}) is no multiple of context ({self.context})",
                where="batch_tokens",
                hint=f"try {max(1, self.batch_tokens // self.context) * self.context}",
            )
        for template in inputs.get("chat_template", ()):
            if template is not None and "{%" not in template.path.read_text("utf-8"):
                raise SuiteError("no Jinja template", where=str(template.path), hint="name a chat_template.jinja")

    def run(self, job: Job) -> dict[str, Any]:
        """Train, and return the loss, the held-out perplexity, counts and the speed."""
        from suite.train import scratch

        return scratch.pretrain(self, job)
