"""Tokens to text as they come, against the tokenizer's own decoding of the whole."""

from hypothesis import given, settings
from hypothesis import strategies as st

from granatum.runner.text.detokenizer import REPLACEMENT, Detokenizer
from granatum.runner.text.tokenizer import Tokenizer

EXAMPLES = settings(max_examples=300, deadline=None)


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
