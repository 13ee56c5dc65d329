"""Small tokenizers of the kinds that published models bring, each as a folder with its files.

A kind is a tokenizer.json, and the tokenizer_config.json that names its class. transformers would
make the tokenizers of most of these classes anew and lose what tokenizer.json says.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    *[
        "the cat sat on the mat",
        "größer, schöner 東京都",
        "naïve café 😀😁 €uro",
        "[INST] hi [/INST]",
    ],
    *["def f(x):\n    return 12345 + x", "1. one space\n2. two  spaces", "hi there  hi", "123 45"],
] * 3
ENDS = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
DIGIT_GROUPS = Regex(r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+")


def _bpe(pre: pre_tokenizers.PreTokenizer, first: list[str], alphabet: list[str]) -> dict[str, Any]:
    """A trained BPE's vocabulary, which begins with `first`, and its merges."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre
    trainer = trainers.BpeTrainer(
        vocab_size=len(first) + 450,
        initial_alphabet=alphabet,
        special_tokens=first,
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    model = json.loads(made.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(pair) for pair in model["merges"]]}


def _sentencepiece(prefix: str) -> Tokenizer:
    """As Llama 2 has it; `prefix` says where a blank is put before a text: always, first, never."""
    pieces = _bpe(pre_tokenizers.Metaspace(), [*ENDS, *BYTES], [])
    made = Tokenizer(models.BPE(**pieces, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if prefix == "always":
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    strip = [] if prefix == "never" else [decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    made.add_special_tokens(ENDS)
    _begin(made, "<s>")
    return made


def _byte_level(
    *split: pre_tokenizers.PreTokenizer, regex: bool, prefix: bool = False, end: str = "<|end|>"
) -> Tokenizer:
    """As GPT-2 and all after it have it: bytes, after `split`."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex)
    # Trained without the splits: there are pieces of many digits.
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made = Tokenizer(models.BPE(**_bpe(words, [], pre_tokenizers.ByteLevel.alphabet())))
    made.pre_tokenizer = pre_tokenizers.Sequence([*split, level])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|start|>", end])
    return made


def _begin(made: Tokenizer, token: str) -> None:
    made.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, made.token_to_id(token))]
    )


def _gpt2_digits() -> Tokenizer:
    return _byte_level(pre_tokenizers.Digits(individual_digits=True), regex=True)


def _groups() -> Tokenizer:
    made = _byte_level(pre_tokenizers.Split(DIGIT_GROUPS, "isolated"), regex=False)
    _begin(made, "<|start|>")
    return made


def _qwen2() -> Tokenizer:
    """Unlike the class Qwen2Tokenizer, it leaves accents that stand alone as they are."""
    return _byte_level(pre_tokenizers.Split(DIGIT_GROUPS, "isolated"), regex=False)


def _prefix_space() -> Tokenizer:
    return _byte_level(regex=True, prefix=True)


def _added_tokens() -> Tokenizer:
    """Added tokens that swallow blanks around them, or are sought in the normalized text."""
    made = _byte_level(regex=True)
    made.normalizer = normalizers.Lowercase()
    made.add_tokens(
        [
            AddedToken("<tool>", normalized=False),
            AddedToken("<left>", lstrip=True, normalized=False),
            AddedToken("<word>", single_word=True, normalized=False),
            AddedToken("sat on", normalized=True),
        ]
    )
    made.add_special_tokens(
        [AddedToken("<right>", rstrip=True), AddedToken("<both>", lstrip=True, rstrip=True)]
    )
    return made


_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_ENDED = {"eos_token": "<|end|>"}
KINDS: dict[str, tuple[Callable[[], Tokenizer], dict[str, Any]]] = {
    "LlamaTokenizer": (
        lambda: _sentencepiece("always"),
        {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, **_LLAMA},
    ),
    "LlamaTokenizerFast": (
        lambda: _sentencepiece("first"),
        {"tokenizer_class": "LlamaTokenizerFast", "legacy": True, **_LLAMA},
    ),
    "LlamaTokenizer without prefix": (
        lambda: _sentencepiece("never"),
        {"tokenizer_class": "LlamaTokenizer", "legacy": False, **_LLAMA},
    ),
    "LlamaTokenizerFast of bytes": (
        _groups,
        {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<|start|>", **_ENDED},
    ),
    "GPT2Tokenizer with digits": (_gpt2_digits, {"tokenizer_class": "GPT2Tokenizer", **_ENDED}),
    "GPT2Tokenizer with prefix": (_prefix_space, {"tokenizer_class": "GPT2Tokenizer", **_ENDED}),
    "Qwen2Tokenizer": (_qwen2, {"tokenizer_class": "Qwen2Tokenizer", **_ENDED}),
    "PreTrainedTokenizerFast": (
        _groups,
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|start|>", **_ENDED},
    ),
    "added tokens": (_added_tokens, {"tokenizer_class": "GPT2Tokenizer", **_ENDED}),
}
"""What makes the tokenizer of a kind, and its tokenizer_config.json."""
_MODEL_TYPES = {"Llama": "llama", "GPT2": "llama", "Qwen2": "qwen2"}


def write_tokenizer(kind: str, folder: Path) -> Path:
    """Write a kind's tokenizer.json, tokenizer_config.json and config.json; gives the folder."""
    make, settings = KINDS[kind]
    folder.mkdir(parents=True, exist_ok=True)
    make().save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.content }}" + settings["eos_token"] + "\n{% endfor %}"
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**settings, "chat_template": template})
    )
    named = [t for name, t in _MODEL_TYPES.items() if kind.startswith(name)]
    (folder / "config.json").write_text(json.dumps({"model_type": (*named, "llama")[0]}))
    return folder
