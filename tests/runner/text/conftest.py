"""Tokenizers of three kinds."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from granatum.examples.tokenizer import byte_tokenizer
from granatum.runner.text.tokenizer import Tokenizer

CORPUS = ["the cat sat on the mat ", "größer, schöner 東京都 ", "naïve café 😀😁 €uro"] * 3


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One token per byte, as the example model has it."""
    directory = tmp_path_factory.mktemp("byte")
    byte_tokenizer().save_pretrained(directory)
    return Tokenizer(directory)


@pytest.fixture(scope="module")
def merges(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Byte-level BPE with merges across characters' bytes."""
    trained = FastTokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<eos>"],
        show_progress=False,
    )
    trained.train_from_iterator(CORPUS, trainer)
    return saved(trained, tmp_path_factory.mktemp("merges"))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Pieces with a leading space and bytes for the rest, decoded as Llama 2 does."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted({c for text in CORPUS[:2] for c in text.replace(" ", "▁")})
    words = ["▁t", "▁th", "▁the", "▁c", "▁ca", "▁cat", "▁s", "▁sa"]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, *letters, *words])}
    pairs = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "c"), ("▁c", "a"), ("▁ca", "t")]
    made = FastTokenizer(
        models.BPE(vocab=vocabulary, merges=pairs, unk_token="<unk>", byte_fallback=True)
    )
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return saved(made, tmp_path_factory.mktemp("sentencepiece"))


def saved(trained: FastTokenizer, directory: Path) -> Tokenizer:
    PreTrainedTokenizerFast(tokenizer_object=trained).save_pretrained(directory)
    return Tokenizer(directory)
