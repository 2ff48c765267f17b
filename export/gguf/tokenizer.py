"""A tokenizer.json as GGUF keys, with the model's own chat template; an unknown kind is an error, never a guess."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from export.ends import ends
from export.folder import read_json
from suite.errors import SuiteError

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""How ByteLevel splits by itself (`use_regex`)."""
DIGIT = r"\p{N}"
PRE_TOKENIZERS = {
    "eeb55ba74cc544ae7067587b680d16521d9891de9e94c7ba9412c0e0e93b1c36": "gpt-2",
    "d5d7e1b34b94ab2b4b788e47363cd60946d12cc6cd20bad41f9246f4756c3b37": "smollm",
    "1ff7f41064896984db5d1bb6ff64fa4bc29007d08c1b439e505b7392777a319e": "qwen2",
    "00431aed57e696b747435f734d1e3b9b1bfd931a121fb5cac7129e97c181e9ba": "qwen35",
    "d98f9631be1e9607a9848c26c1f9eac1aa9fc21ac6ba82a2fc0741af9780a48f": "llama-bpe",
    "a97b42cdd6d6cfbaa59644826415cb6d1ebbedce0227f6e17af75a3228616c2b": "deepseek-llm",
    "d1e24733e9bebb22db6737f4301ecd337492bddede5c04872e13487874f96533": "deepseek-coder",
    "3e41884740914736a01647a8d1d6426e0e5aed47b7fdb19dfb81d31e3653a502": "deepseek-v3",
    "042d2f5ff6a14c7f0b8c343dfea08171906342d12bbcfee0dff9fa8f81cecdc2": "seed-coder",
}
"""llama.cpp has the splits of each family built in, and knows them by name; keyed by the sha256 of their regexes.

Each is the hash of what llama.cpp's llama-vocab.cpp has under that name: the "original regex from tokenizer.json" in a
comment (qwen2, qwen35, llama-bpe, seed-coder), the expressions themselves (deepseek; its digits one by one), or those
of ByteLevel (gpt-2; smollm after digits one by one). For each, tokenizers trained with those splits gave the same
tokens in llama.cpp on thousands of random texts. Not so for tekken and gpt-4o: there llama.cpp splits before combining
marks, as in Hindi and Thai, and the original does not. So they are not here.
"""
PHI3 = re.compile("phi-?3", re.IGNORECASE)
PHI3_KEEPS = {"<unk>", "<s>", "<|endoftext|>"}
"""Special tokens after which Phi-3 keeps spaces."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def add_tokenizer(writer: Any, folder: Path, config: dict[str, Any]) -> None:
    """Add the tokenizer of the model in `folder` to a GGUFWriter.

    Byte-level BPE of a family that llama.cpp knows, and BPE with byte fallback (SentencePiece's). Raises SuiteError
    for any other.
    """
    tokenizer = check_tokenizer(folder)
    model = tokenizer["model"]
    tokens, types = _tokens(tokenizer, config["vocab_size"], folder)
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores([float(-i) if t != UNUSED else -1000.0 for i, t in enumerate(types)])
        writer.add_token_types(types)
        writer.add_add_space_prefix(_adds_space(tokenizer))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer(tokenizer, folder))
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    _add_special(writer, folder, tokenizer)


def check_tokenizer(folder: Path) -> dict[str, Any]:
    """The tokenizer.json in `folder`; raises SuiteError for one that llama.cpp has no way to follow."""
    tokenizer = read_json(folder / "tokenizer.json")
    model = tokenizer["model"]
    if model.get("type", "BPE") != "BPE":
        raise SuiteError(f"a {model['type']} tokenizer cannot be written to GGUF here", where=str(folder))
    if not model.get("byte_fallback"):
        pre_tokenizer(tokenizer, folder)
    return tokenizer


def pre_tokenizer(tokenizer: dict[str, Any], folder: Path) -> str:
    """llama.cpp's name for how this tokenizer splits text before merging; raises SuiteError when it has none."""
    splits = _splits(tokenizer.get("pre_tokenizer") or {})
    name = PRE_TOKENIZERS.get(hashlib.sha256("".join(splits).encode()).hexdigest())
    if name is None:
        raise SuiteError(
            "llama.cpp has no such pre-tokenizer, and would split text otherwise than this model was trained",
            where=str(folder / "tokenizer.json"),
            hint="export to hf instead; known: " + ", ".join(PRE_TOKENIZERS.values()),
        )
    return name


def telling_name(name: str, folder: Path) -> str:
    """`name` as llama.cpp must read it to treat special tokens as the tokenizer in `folder` does.

    Where a name has "phi-3" or "phi3" in it, llama.cpp drops the spaces after special tokens, but for three, and cannot
    load a tokenizer without these.
    """
    tokenizer = read_json(folder / "tokenizer.json")
    tokens = {*tokenizer["model"]["vocab"], *(a["content"] for a in tokenizer.get("added_tokens", ()))}
    special = [a for a in tokenizer.get("added_tokens", ()) if a["special"] and a["content"] not in PHI3_KEEPS]
    as_phi3 = {"</s>", *PHI3_KEEPS} <= tokens and all(a["rstrip"] for a in special)
    if not as_phi3:
        return PHI3.sub("phi_3", name)
    return name if PHI3.search(name) else f"{name} (phi-3)"


def _splits(pre: dict[str, Any]) -> list[str]:
    """The regexes by which a byte-level pre-tokenizer splits text, in order; empty for another kind."""
    parts = pre.get("pretokenizers", [pre])
    splits = []
    for part in parts[:-1]:
        whole = (part.get("behavior"), part.get("invert")) in (("Isolated", False), ("Removed", True))
        if part.get("type") == "Split" and whole and "Regex" in part["pattern"]:
            splits.append(part["pattern"]["Regex"])
        elif part.get("type") == "Digits" and part.get("individual_digits"):
            splits.append(DIGIT)
        else:
            return []
    last = parts[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return []
    return [*splits, GPT2] if last.get("use_regex", True) else splits


def _tokens(tokenizer: dict[str, Any], size: int, folder: Path) -> tuple[list[str], list[int]]:
    tokens, types = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    ids = {**tokenizer["model"]["vocab"], **{a["content"]: a["id"] for a in tokenizer.get("added_tokens", ())}}
    if beyond := next((token for token, i in ids.items() if i >= size), None):
        raise SuiteError(
            f"the tokenizer gives {beyond!r} the id {ids[beyond]}, and the model has {size} tokens",
            where=str(folder / "tokenizer.json"),
            hint="resize the model's embeddings to its tokenizer",
        )
    for token, i in tokenizer["model"]["vocab"].items():
        tokens[i] = token
        types[i] = BYTE if len(token) == 6 and token.startswith("<0x") and token.endswith(">") else NORMAL
    for added in tokenizer.get("added_tokens", ()):
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
        if added["content"] == tokenizer["model"].get("unk_token"):
            types[added["id"]] = UNKNOWN
    return tokens, types


def adds_space_once(tokenizer: dict[str, Any]) -> bool:
    """Whether a space is put before a text, but not before what follows a special token; llama.cpp has no such way."""
    return '"prepend_scheme": "first"' in json.dumps(tokenizer.get("pre_tokenizer"))


def _adds_space(tokenizer: dict[str, Any]) -> bool:
    """Whether a space is put before each text, also after special tokens, as llama.cpp understands it."""
    text = json.dumps([tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "always"' in text


def _add_special(writer: Any, folder: Path, tokenizer: dict[str, Any]) -> None:
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    ids = {**tokenizer["model"]["vocab"], **{a["content"]: a["id"] for a in tokenizer.get("added_tokens", ())}}
    special: dict[str, int] = {}
    for name in ("bos", "eos", "pad", "unk"):
        token = settings.get(f"{name}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if text in ids:
            special[name] = ids[text]
    stops = list(ends(folder))
    if stops:
        special.setdefault("eos", stops[0])  # else llama.cpp takes token 11 or 2, whatever that is
    add = {name: getattr(writer, f"add_{name}_token_id") for name in ("bos", "eos", "pad", "unk", "eot", "eom")}
    for name, number in special.items():
        add[name](number)
    # an answer may end with other tokens than a text; llama.cpp stops at all three that the format can name
    others = [i for i in stops if i != special.get("eos")]
    for name, number in zip(("eot", "eom"), others, strict=False):
        add[name](number)
    # said openly, because llama.cpp's own default depends on the kind of tokenizer
    post = json.dumps(tokenizer.get("post_processor") or {}, ensure_ascii=False)
    bos = next((text for text, i in ids.items() if i == special.get("bos")), None)
    writer.add_add_bos_token(bos is not None and json.dumps(bos, ensure_ascii=False) in post)
    if template := chat_template(folder):
        writer.add_chat_template(template)


def chat_template(folder: Path) -> str:
    """The model's Jinja chat template; empty when it has none."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    config = folder / "tokenizer_config.json"
    template = read_json(config).get("chat_template") if config.is_file() else None
    return template if isinstance(template, str) else ""
