"""llama.cpp reads our GGUF files and answers as transformers does; skipped where llama-cpp-python is not installed."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from export import gguf, parity
from export.gguf import llamacpp
from export.gguf.texts import TEXTS
from suite.chat import load_tokenizer
from suite.cli import main
from suite.errors import SuiteError
from suite.processes import importing
from tests.namesakes import namesakes
from tests.tiny.test_gguf import ARCHITECTURES, SETTINGS
from tests.tiny.tiny_models import tiny_model

pytest.importorskip("llama_cpp", reason="llama.cpp is not installed")

NANO = Path(__file__).parents[2] / "examples/nano/model"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")
DIGITS = {"type": "Digits", "individual_digits": True}


def split(*regexes: str) -> list[dict[str, Any]]:
    return [{"type": "Split", "pattern": {"Regex": r}, "behavior": "Isolated", "invert": False} for r in regexes]


def byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


PRE_TOKENIZERS = {
    "smollm": [DIGITS, byte_level(True)],
    "qwen2": [*split(QWEN2), byte_level(False)],
    "llama-bpe": [*split(LLAMA3), byte_level(False)],
    "deepseek-coder": [
        *split("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+"),
        DIGITS,
        byte_level(False),
    ],
}


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model's GGUF files, by type: as it is, float16 and q4_k_m."""
    folder = tmp_path_factory.mktemp("nano")
    gguf.write(NANO, folder / "bf16.gguf", gguf.lossless(NANO), "nano")
    gguf.write(NANO, folder / "f16.gguf", "f16", "nano")
    return folder


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_answers_as_transformers_does(tmp_path: Path, architecture: str) -> None:
    settings = SETTINGS.get(architecture, {})
    folder = tiny_model(tmp_path / "m", architecture=architecture, hidden=64, tie_word_embeddings=True, **settings)
    gguf.write(folder, tmp_path / "m.gguf", "f32", "tiny")
    ids = load_tokenizer(folder)(TEXTS[13])["input_ids"]
    with torch.inference_mode():
        expected = parity.load(folder)(input_ids=torch.tensor([ids])).logits[0]
    with llamacpp.LlamaCpp(tmp_path / "m.gguf") as model:
        found = torch.from_numpy(model.logits(ids))
        assert llamacpp.same_tokens(folder, model) > len(TEXTS)
    bound = 1e-2 if architecture.startswith("gemma") else 1e-4  # llama.cpp looks GELU up in a float16 table
    assert (found - expected).abs().max() < bound
    assert (found.argmax(-1) == expected.argmax(-1)).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_in_float16_every_architecture_gives_the_same_greedy_answers(tmp_path: Path, architecture: str) -> None:
    """But for tokens that are as good; what a mixture of experts answers may differ where another expert is."""
    settings = SETTINGS.get(architecture, {})
    folder = tiny_model(tmp_path / "m", architecture=architecture, hidden=64, layers=1, **settings)
    gguf.write(folder, tmp_path / "m.gguf", "f16", "tiny")
    proved = llamacpp.verify(folder, tmp_path / "m.gguf", "f16")["parity"]
    assert proved["greedy_equal"] == 1
    assert proved["top1"] + proved["ties"] > 0.999


LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.1] * 8, "long_factor": [4.0] * 8}


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("qwen3", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
        ("llama", {"rope_parameters": {**LLAMA3_ROPE, "original_max_position_embeddings": 64}}),
        ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 1024}),
        ("phi3", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
        ("gemma2", {"sliding_window": 16, "layers": 3}),
        ("gemma3_text", {"sliding_window": 16, "layers": 7}),
    ],
)
def test_positions_and_windows_are_those_of_transformers(
    tmp_path: Path, architecture: str, settings: dict[str, Any]
) -> None:
    settings = {**SETTINGS.get(architecture, {}), **settings}
    if rope := settings.get("rope_parameters"):
        rope.setdefault("rope_theta", 10000.0)
    folder = tiny_model(tmp_path / "m", architecture=architecture, hidden=64, **settings)
    gguf.write(folder, tmp_path / "m.gguf", "f32", "tiny")
    ids = [random.Random(0).randrange(512) for _ in range(200)]
    with torch.inference_mode():
        expected = parity.load(folder)(input_ids=torch.tensor([ids])).logits[0]
    with llamacpp.LlamaCpp(tmp_path / "m.gguf") as model:
        worst = (torch.from_numpy(model.logits(ids)) - expected).abs().max()
    assert worst < (2e-2 if architecture.startswith("gemma") else 2e-4)


def test_a_gemma3_that_takes_images_answers_as_its_language_model_does(tmp_path: Path) -> None:
    text = json.loads(
        (
            tiny_model(tmp_path / "t", architecture="gemma3_text", hidden=64, **SETTINGS["gemma3_text"]) / "config.json"
        ).read_text()
    )
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 28,
    }
    folder = tiny_model(
        tmp_path / "m", architecture="gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4
    )
    (tmp_path / "scratch").mkdir()
    warned: list[str] = []
    found = llamacpp.write(folder, tmp_path / "m.gguf", "f32", "tiny", tmp_path / "scratch", warn=warned.append)
    assert found["llamacpp"]["parity"]["kl"] < 1e-5
    assert found["llamacpp"]["parity"]["positions"] > 200
    assert warned == ["the GGUF holds the language model alone: it cannot be shown images"]


def test_a_file_is_compared_with_its_model_by_hand(nano: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", str(NANO), str(nano / "f16.gguf"), "--json", "--min-top1", "0.999"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["greedy"] == 1
    assert 0 < found["max_dlogit"] < 0.1
    assert "prompts" not in found  # the tokenizer is the model's
    assert main(["parity", str(NANO), str(nano / "f16.gguf"), "--json", "--max-kl", "1e-12"]) == 3


def test_names_tell_llama_cpp_whether_spaces_after_special_tokens_count(tmp_path: Path) -> None:
    """It drops them for what is called Phi-3, and fails to load other tokenizers under that name."""
    folder = tiny_model(tmp_path / "m", hidden=64)
    gguf.write(folder, tmp_path / "m.gguf", "f16", "My-Phi-3-tune")
    with llamacpp.LlamaCpp(tmp_path / "m.gguf") as model:
        assert llamacpp.same_tokens(folder, model)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text("utf-8"))
    for token in tokenizer["added_tokens"]:
        token["rstrip"] = token["content"] != "<|endoftext|>"
    for i, (content, drops) in enumerate(
        {"<unk>": False, "<s>": False, "</s>": True}.items(), len(load_tokenizer(folder))
    ):
        token = {"id": i, "content": content, "special": True, "rstrip": drops}
        tokenizer["added_tokens"].append({**token, "lstrip": False, "normalized": False, "single_word": False})
    file.write_text(json.dumps(tokenizer), "utf-8")
    for name in ("tune", "My-Phi-3-tune"):
        gguf.write(folder, tmp_path / "m.gguf", "f16", name)
        with llamacpp.LlamaCpp(tmp_path / "m.gguf") as model:
            assert llamacpp.same_tokens(folder, model)


def test_a_trained_model_is_proved_by_tokens_and_answers(nano: Path) -> None:
    warned: list[str] = []
    proved = llamacpp.verify(NANO, nano / "f16.gguf", "f16", warn=warned.append)
    assert proved["parity"]["top1"] >= 0.999
    assert proved["parity"]["greedy"] == 1
    assert proved["texts"] > len(TEXTS)
    assert len(warned) == 1
    assert "NFC" in warned[0]


def test_a_mixture_may_choose_another_expert_that_is_almost_as_good(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", architecture="qwen3_moe", hidden=64, **SETTINGS["qwen3_moe"])
    gguf.write(folder, tmp_path / "m.gguf", "q8_0", "tiny")
    found = llamacpp.verify(folder, tmp_path / "m.gguf", "q8_0")["parity"]
    assert found["max_dlogit"] > 1
    assert found["kl"] < 0.05


def test_preferring_another_token_that_is_as_good_does_not_count(tmp_path: Path) -> None:
    """The logits of a random model lie so close together that float16 decides which is the largest."""
    folder = tiny_model(tmp_path / "m", hidden=128)
    gguf.write(folder, tmp_path / "m.gguf", "f16", "tiny")
    found = llamacpp.verify(folder, tmp_path / "m.gguf", "f16")["parity"]
    assert found["top1"] < 0.999 <= found["top1"] + found["ties"]
    parent = torch.tensor([[1.0, 0.98, 0.0], [1.0, 0.9, 0.0]])
    sums = parity.Sums()
    sums.add(parity.Probe("a", [0, 1]), parent, parent[:, [1, 0, 2]])
    assert (sums.result()["top1"], sums.result()["ties"]) == (0, 0.5)


def test_quantized_types_stay_within_their_limits(nano: Path, tmp_path: Path) -> None:
    steps: list[tuple[float, float, str]] = []
    source = nano / "bf16.gguf"
    for name in ("a", "b"):
        made = llamacpp.quantize(source, tmp_path / f"{name}.gguf", "q4_k_m", lambda *step: steps.append(step))
        assert made["types"] == {"F32": 17, "Q4_K": 24, "Q6_K": 5}
        assert made["fell_back"] == {}
    assert steps[-1] == (46, 46, "quantize")
    assert llamacpp.quantize(source, tmp_path / "c.gguf", "q5_k_m")["types"] == {"F32": 17, "Q5_K": 24, "Q6_K": 5}
    wider, narrower = (
        llamacpp.verify(NANO, tmp_path / f"{n}.gguf", q)["parity"]["kl"]
        for n, q in zip("ca", ("q5_k_m", "q4_k_m"), strict=True)
    )
    assert 0 < wider < narrower
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    with pytest.raises(SuiteError, match=r"KL.*above|prefer the same") as caught:
        llamacpp.verify(NANO, tmp_path / "a.gguf", "q8_0")
    assert "wider" in caught.value.hint


def test_rows_that_are_no_multiple_of_256_fall_back_and_it_says_which(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", hidden=64)
    (tmp_path / "scratch").mkdir()
    warned: list[str] = []
    out = tmp_path / "q.gguf"
    made = llamacpp.write(folder, out, "q6_k", "tiny", tmp_path / "scratch", warn=warned.append)
    assert made["fell_back"]["blk.0.attn_k.weight"] == "Q8_0"
    assert "blk.0.attn_norm.weight" not in made["fell_back"]
    assert warned == ["15 tensors became Q8_0: q6_k is for rows that are a multiple of 256"]
    assert made["bytes"] == out.stat().st_size
    assert made["llamacpp"]["parity"]["kl"] < 0.02
    assert not any((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_known_pre_tokenizers_split_as_llama_cpp_does(tmp_path: Path, name: str) -> None:
    folder = pre_tokenized(tmp_path / "m", PRE_TOKENIZERS[name])
    gguf.write(folder, tmp_path / "m.gguf", "f16", "tiny")
    tokenizer, draw = load_tokenizer(folder), random.Random(0)
    letters = [c for text in TEXTS for c in text] + list(" \n\t'0123456789aAéßñ你!?.,-_\r") * 3
    with llamacpp.LlamaCpp(tmp_path / "m.gguf") as model:
        for _ in range(300):
            text = "".join(draw.choices(letters, k=draw.randint(1, 40)))
            assert model.tokenize(text) == tokenizer(text)["input_ids"], repr(text)


def pre_tokenized(folder: Path, parts: list[dict[str, Any]]) -> Path:
    """A tiny model whose tokenizer was trained with these splits."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tiny_model(folder, hidden=64, vocab=1000)
    file = folder / "tokenizer.json"
    state = json.loads(Tokenizer(models.BPE()).to_str())
    bpe = Tokenizer.from_str(json.dumps({**state, "pre_tokenizer": {"type": "Sequence", "pretokenizers": parts}}))
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=900, special_tokens=special, initial_alphabet=alphabet)
    )
    trained = json.loads(bpe.to_str())
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **trained}), "utf-8")
    return folder


@pytest.mark.parametrize("prefix", ["always", "once", "never"])
def test_sentencepiece_tokenizers_are_those_of_llama_cpp(tmp_path: Path, prefix: str) -> None:
    """A space before each text as in Llama 2, before the first as in later Mistrals, before none as in Gemma."""
    folder = byte_fallback(tmp_path / "m", prefix)
    gguf.write(folder, tmp_path / "m.gguf", "f16", "tiny")
    warned: list[str] = []
    with llamacpp.LlamaCpp(tmp_path / "m.gguf") as model:
        assert llamacpp.same_tokens(folder, model, warned.append) > len(TEXTS)
    assert bool(warned) == (prefix == "once")


def byte_fallback(folder: Path, prefix: str) -> Path:
    """A tiny llama whose tokenizer is laid out as one converted from SentencePiece: special, bytes, merges, letters."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    printable = ["".join(c for c in text if c.isprintable()) for text in TEXTS]
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    words = [word for text in printable for word in re.split("(?= )", text)]
    trained.train_from_iterator(words, trainers.BpeTrainer(vocab_size=700))
    state = json.loads(trained.to_str())["model"]
    merged = dict.fromkeys("".join(pair) for pair in state["merges"])
    special = ["<unk>", "<s>", "</s>", "<|im_start|>"]
    letters = [token for token in state["vocab"] if token not in merged]
    vocabulary = dict.fromkeys([*special, *(f"<0x{i:02X}>" for i in range(256)), *merged, *letters])
    bpe = models.BPE(
        {token: i for i, token in enumerate(vocabulary)},
        [tuple(pair) for pair in state["merges"]],
        byte_fallback=True,
        fuse_unk=True,
        unk_token="<unk>",
    )
    tokenizer = Tokenizer(bpe)
    if prefix == "once":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        replace = normalizers.Replace(" ", "▁")
        prepend = normalizers.Sequence([normalizers.Prepend("▁"), replace])
        tokenizer.normalizer = prepend if prefix == "always" else replace
    tokenizer.decoder = decoders.ByteFallback()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tiny_model(folder, architecture="llama", hidden=64, vocab=1000)
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    whole.save_pretrained(folder)
    return folder


def test_other_tokens_fail_naming_the_text_and_both_ids(nano: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(NANO, folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text("utf-8"))
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:50]
    file.write_text(json.dumps(tokenizer), "utf-8")
    with (
        llamacpp.LlamaCpp(nano / "f16.gguf") as model,
        pytest.raises(SuiteError, match=r"llama.cpp tokenizes '.+' as \[.+\], the model's tokenizer as \[.+\]"),
    ):
        llamacpp.same_tokens(folder, model)


def test_a_damaged_file_is_an_error_and_the_terminal_stays_clean(
    nano: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "m.gguf"
    damaged.write_bytes((nano / "f16.gguf").read_bytes()[:-5000])
    with llamacpp.LlamaCpp(damaged) as model, pytest.raises(SuiteError, match=r"llama.cpp: .*not within the file"):
        model.logits([1, 2, 3])
    with pytest.raises(SuiteError, match="llama_model_quantize failed"):
        llamacpp.quantize(damaged, tmp_path / "q.gguf", "q4_0")
    with llamacpp.LlamaCpp(nano / "f16.gguf") as model:
        assert model.logits([1, 2, 3]).shape == (3, 2048)
    out, err = capfd.readouterr()
    assert out == err == ""


def test_a_crash_of_native_code_is_an_error(nano: Path) -> None:
    with llamacpp.LlamaCpp(nano / "f16.gguf") as model:
        model.tokenize("hello")
        os.kill(children(os.getpid())[-1], signal.SIGFPE)
        with pytest.raises(SuiteError, match="ended by SIGFPE"):
            model.logits([1, 2, 3])


def test_llama_cpp_ends_with_the_process_that_started_it(nano: Path, tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from export.gguf.llamacpp import LlamaCpp\n"
        "model = LlamaCpp(Path(sys.argv[1])); model.tokenize('x'); print('ready', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-P", "-c", code, str(nano / "f16.gguf")]
    here = namesakes(tmp_path / "here")
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=here, env=importing()) as parent:
        assert parent.stdout
        assert parent.stdout.readline() == b"ready\n"
        (child,) = children(parent.pid)
        parent.kill()
    gone = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and "zombie" not in Path(f"/proc/{child}/status").read_text():
        assert time.monotonic() < gone
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(pid).children()]
