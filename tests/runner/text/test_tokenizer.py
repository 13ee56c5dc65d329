"""Text in and out of tokens, against the tokenizer's own decoding of the whole."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from granatum.examples.tokenizer import byte_tokenizer
from granatum.runner.text.detokenizer import REPLACEMENT, Detokenizer
from granatum.runner.text.tokenizer import Tokenizer
from granatum.v1.errors import InvalidRequest, PreconditionFailed

CORPUS = ["the cat sat on the mat ", "größer, schöner 東京都 ", "naïve café 😀😁 €uro"] * 3
EXAMPLES = settings(max_examples=300, deadline=None)


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


def streamed(tokenizer: Tokenizer, prompt: list[int], tokens: list[int]) -> str:
    detokenizer = Detokenizer(tokenizer, prompt)
    return "".join(detokenizer.push(token) for token in tokens) + detokenizer.flush()


def whole(tokenizer: Tokenizer, prompt: list[int], tokens: list[int]) -> str:
    before = tokenizer.decode(prompt)
    after = tokenizer.decode(prompt + tokens)
    assert after.startswith(before)
    return after[len(before) :]


@EXAMPLES
@given(st.binary(max_size=40))
def test_any_bytes_come_out_as_full_decoding_gives_them(byte_level: Tokenizer, data: bytes) -> None:
    prompt = byte_level.encode("a prompt")
    assert streamed(byte_level, prompt, list(data)) == data.decode(errors="replace")


@EXAMPLES
@given(st.lists(st.integers(0, 399), max_size=30), st.text(max_size=8))
def test_any_merged_tokens_come_out_as_full_decoding_gives_them(
    merges: Tokenizer, tokens: list[int], text: str
) -> None:
    tokens = [token for token in tokens if token < merges.size]
    prompt = merges.encode(text)
    assert streamed(merges, prompt, tokens) == whole(merges, prompt, tokens)


@EXAMPLES
@given(st.text(max_size=25), st.text(alphabet="the cat 東€😀", max_size=12))
def test_sentencepiece_text_comes_out_with_its_spaces(
    sentencepiece: Tokenizer, text: str, before: str
) -> None:
    prompt = [1, *sentencepiece.encode(before)]
    tokens = sentencepiece.encode(text)
    assert streamed(sentencepiece, prompt, tokens) == whole(sentencepiece, prompt, tokens)


@EXAMPLES
@given(st.data())
def test_any_sentencepiece_tokens_come_out_as_full_decoding_gives_them(
    sentencepiece: Tokenizer, data: st.DataObject
) -> None:
    """Bytes among them at random, but no whole character before a bad byte of the same run."""
    piece = st.integers(259, sentencepiece.size - 1).map(lambda token: [token])
    bad = st.lists(st.integers(0x80, 0xBF).map(lambda byte: byte + 3), min_size=1, max_size=12)
    half = st.sampled_from(["東", "€", "😀"]).map(lambda c: [b + 3 for b in c.encode()[:-1]])
    special = st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=12)
    runs = st.one_of(bad, half, special)
    tokens: list[int] = []
    for _ in range(data.draw(st.integers(0, 5))):
        tokens += data.draw(runs) + data.draw(piece)
    prompt = sentencepiece.encode("the cat")
    assert streamed(sentencepiece, prompt, tokens) == whole(sentencepiece, prompt, tokens)


def test_characters_are_never_given_by_halves(byte_level: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_level, byte_level.encode("x"))
    texts = [detokenizer.push(byte) for byte in "a€😀".encode()]
    assert texts == ["a", "", "", "€", "", "", "", "😀"]


def test_endless_garbage_does_not_pile_up(byte_level: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_level, [65])
    texts = [detokenizer.push(0xFF) for _ in range(100)]
    assert len("".join(texts)) >= 95
    assert len(detokenizer._kept) <= 5


def test_special_tokens_have_no_text_and_do_not_pile_up(byte_level: Tokenizer) -> None:
    (end,) = byte_level.end_ids
    detokenizer = Detokenizer(byte_level, [end])
    assert [detokenizer.push(end) for _ in range(50)] == [""] * 50
    assert detokenizer.push(65) == "A"
    assert detokenizer.flush() == ""


def test_ids_that_the_tokenizer_lacks_have_no_text_and_do_not_pile_up(
    sentencepiece: Tokenizer,
) -> None:
    detokenizer = Detokenizer(sentencepiece, sentencepiece.encode("the"))
    assert [detokenizer.push(sentencepiece.size + i) for i in range(50)] == [""] * 50
    assert len(detokenizer._kept) <= 5
    (cat,) = sentencepiece.encode("cat")[-1:]
    assert detokenizer.push(cat) == " cat"


def test_a_run_that_one_byte_spoils_does_not_pile_up(sentencepiece: Tokenizer) -> None:
    """Llama 2's decoder writes all bytes of a run as garbage if one of them is."""
    spoilt, letter = 3 + 0xA0, 3 + ord("s")
    detokenizer = Detokenizer(sentencepiece, [spoilt])
    given, kept = "", 0
    for _ in range(500):
        given += detokenizer.push(letter)
        kept = max(kept, len(detokenizer._kept))
    assert (len(given + detokenizer.flush()), kept) == (500, 63)


def test_half_character_at_the_end_is_a_replacement_character(byte_level: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_level, [65])
    assert detokenizer.push(0xE2) == ""
    assert detokenizer.flush() == REPLACEMENT


def test_prompt_gets_its_special_tokens_once(byte_level: Tokenizer) -> None:
    bos = byte_level.encode("")
    assert len(bos) == 1
    assert byte_level.encode("hi") == [*bos, *b"hi"]
    chat = byte_level.encode_chat([("system", "no"), ("user", "hi")])
    assert chat == [*bos, *b"hi>"]


def test_chat_without_template_says_so(merges: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="no chat template"):
        merges.encode_chat([("user", "hi")])


def test_template_that_refuses_is_the_callers_error(tmp_path: Path) -> None:
    made = byte_tokenizer()
    made.chat_template = "{{ raise_exception('roles must alternate') }}"
    made.save_pretrained(tmp_path)
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        Tokenizer(tmp_path).encode_chat([("user", "hi")])


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content.nonsense.path }}",
        "{{ 1 / 0 }}",
        "{% for x in messages %}{% if %}",
        "{{ ''.__class__.__mro__ }}{{ cycler.__init__.__globals__ }}",
    ],
)
def test_what_fails_within_a_template_stays_there(tmp_path: Path, template: str) -> None:
    made = byte_tokenizer()
    made.chat_template = template
    made.save_pretrained(tmp_path)
    with pytest.raises(InvalidRequest) as refused:
        Tokenizer(tmp_path).encode_chat([("user", "hi")])
    assert refused.value.field == "chat.messages"
    assert refused.value.message == (
        "chat.messages: the model's chat template cannot write them: "
        "check their roles and their order"
    )


def test_template_may_not_make_a_flood(tmp_path: Path) -> None:
    made = byte_tokenizer()
    made.chat_template = "{{ messages[0]['content'] * 100 }}"
    made.save_pretrained(tmp_path)
    with pytest.raises(InvalidRequest, match="characters"):
        Tokenizer(tmp_path).encode_chat([("user", "x" * 1_000_000)])


def test_panic_of_the_library_is_an_ordinary_error(
    byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})

    class Panics:
        def decode(self, *_: object, **__: object) -> str:
            raise panic("at /src/lib.rs")

    monkeypatch.setattr(byte_level, "_fast", Panics())
    with pytest.raises(RuntimeError):
        byte_level.decode([1])


def test_directory_without_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(PreconditionFailed, match="tokenizer"):
        Tokenizer(tmp_path)


def test_end_tokens_of_model_and_generation_settings_count(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')
    assert Tokenizer(tmp_path).end_ids == {7, 8, 9, 258}


def test_text_of_a_token_alone(byte_level: Tokenizer, sentencepiece: Tokenizer) -> None:
    assert byte_level.token_text(65) == "A"
    assert byte_level.token_text(258) == "</s>"
    assert sentencepiece.token_text(sentencepiece.encode("the")[0]) == " the"
