"""Real model and adapter folders small enough to make in a second: random weights, a trained BPE, a chat template.

Other test files import `tiny_model` and `tiny_adapter`; both give the same bytes for the same arguments.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- '# Tools\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson + '\\n' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
            {{- message.content or '' }}
            {%- for call in message.tool_calls or [] %}
                {{- '<tool_call>\\n' + {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}
                {{- '\\n</tool_call>' }}
            {%- endfor %}
            {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "The quick brown fox jumps over the lazy dog. Who are you? I am an assistant, how can I help you today?",
    "What is the capital of France? The capital of France is Paris. Seven plus five is twelve.",
    "user assistant system tool name arguments content function parameters type string",
    "你好，请问你是谁？我是一个人工智能助手，很高兴为你服务。今天天气怎么样？答案：",
]


def tiny_tokenizer(vocab: int = 512, template: str | None = CHAT_TEMPLATE) -> Any:
    """A byte-level BPE with the ChatML special tokens, trained on a few sentences; any text round-trips.

    Each is the caller's own: what one test does to it is not found by the next.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(vocab)),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=2048,
    )
    tokenizer.chat_template = template
    return tokenizer


@cache
def _trained(vocab: int) -> str:
    """Its tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(CORPUS, trainer)
    return str(bpe.to_str())


def tiny_model(
    folder: Path,
    *,
    architecture: str = "qwen3",
    vocab: int = 512,
    hidden: int = 128,
    layers: int = 2,
    seed: int = 0,
    dtype: str = "float32",
    std: float = 0.1,
    template: str | None = CHAT_TEMPLATE,
    **config: Any,
) -> Path:
    """Write a random causal language model with its tokenizer to `folder`, and return `folder`.

    Works for every architecture whose configuration knows these names, or is given others in `config`. `std` is large
    enough for logits that differ clearly between tokens; norm weights and biases are random too, so that a mistake in
    them shows.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    tokenizer = tiny_tokenizer(vocab, template)
    shape: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden // 4,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "initializer_range": std,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **config,
    }
    if architecture in ("phi3", "falcon", "deepseek_v3"):
        shape.pop("head_dim")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **shape), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(std * torch.randn_like(parameter))
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_length=2048
    )
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_adapter(model_folder: Path, folder: Path, *, rank: int = 4, seed: int = 1, **lora: Any) -> Path:
    """Write a random PEFT LoRA adapter for the model in `model_folder` to `folder`; its B is not zero.

    `lora` goes to `peft.LoraConfig`, e.g. `lora_alpha=16`, `use_rslora=True`, `target_modules=["q_proj"]`.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    settings = {"lora_alpha": 2 * rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, LoraConfig(r=rank, **settings))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name or "lora_embedding_B" in name:
                    parameter.normal_(std=0.1)
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink()  # it names the folder of the model
    file = folder / "adapter_config.json"
    saved = json.loads(file.read_text("utf-8"))
    saved["base_model_name_or_path"] = model_folder.name
    saved["target_modules"] = sorted(saved["target_modules"])  # a set: its order differs from process to process
    file.write_text(json.dumps(saved, indent=2), "utf-8")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
    return folder


def greedy(model: Any, prompt: list[int], new: int) -> list[int]:
    """The `new` tokens that transformers generates behind a prompt, with the attention that it picks."""
    import torch

    ids = torch.tensor([prompt])
    model.generation_config.max_length = None
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=None
    )
    return [int(token) for token in out[0, len(prompt) :]]
