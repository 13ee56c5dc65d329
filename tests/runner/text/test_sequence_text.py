"""Text of streams: stop strings, halves, and going on where another runner left off."""

import random
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from granatum.examples.tokenizer import byte_tokenizer
from granatum.runner.records import Finish, Submit, TokenLogprobs
from granatum.runner.text.sequence_text import SequenceText
from granatum.runner.text.stop_strings import StopStrings
from granatum.runner.text.tokenizer import Tokenizer

EOS = 258


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(directory)
    return Tokenizer(directory)


def submit(generated: Iterable[int] = b"", min_tokens: int = 0) -> Submit:
    return Submit(1, tuple(b"prompt"), tuple(generated), min_tokens=min_tokens)


@settings(max_examples=400, deadline=None)
@given(
    st.text(alphabet="ab", max_size=30),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.randoms(),
)
def test_text_ends_before_the_first_stop_string(
    text: str, strings: list[str], rng: random.Random
) -> None:
    stops, out, rest = StopStrings(strings, {}), "", text
    stopped = False
    while rest and not stopped:
        cut = rng.randint(1, 4)
        piece, rest = rest[:cut], rest[cut:]
        given_, stopped = stops.push(piece)
        out += given_
    found = [at for at in map(text.find, strings) if at >= 0]
    if not found:
        assert not stopped
        assert out + stops.flush() == text
        return
    assert stopped
    ends = [text.find(s) + len(s) for s in strings if s in text]
    assert len(out) <= min(ends), "nothing of a complete stop string goes out"
    assert text.startswith(out)
    assert not any(s in out for s in strings)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.text(alphabet="ab", max_size=5), max_size=12),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=6), min_size=1, max_size=4),
)
def test_exactly_what_may_become_a_stop_string_is_kept(
    pieces: list[str], strings: list[str]
) -> None:
    stops, text, out = StopStrings(strings, {}), "", ""
    for piece in pieces:
        text += piece
        given_, stopped = stops.push(piece)
        out += given_
        if stopped:
            return
        ends = [
            end for end in range(len(text) + 1) if any(s.startswith(text[end:]) for s in strings)
        ]
        assert out == text[: min(ends)]


def test_stop_string_across_tokens_is_cut(tokenizer: Tokenizer) -> None:
    text = SequenceText(tokenizer, submit(), ["END"])
    taken = text.take(b"abENDcd")
    assert [token.text for token in taken] == ["a", "b", "", "", ""]
    assert text.stopped
    assert text.take(b"more") == []


def test_what_only_looked_like_a_stop_string_comes_with_a_later_token(
    tokenizer: Tokenizer,
) -> None:
    text = SequenceText(tokenizer, submit(), ["END"])
    assert [token.text for token in text.take(b"xENx")] == ["x", "", "", "ENx"]


def test_stop_string_does_not_count_before_min_tokens(tokenizer: Tokenizer) -> None:
    text = SequenceText(tokenizer, submit(min_tokens=4), ["x"])
    assert "".join(token.text for token in text.take(b"xxxaxb")) == "xxxa"
    assert text.stopped


def test_stop_token_has_no_text_but_brings_what_was_kept(tokenizer: Tokenizer) -> None:
    text = SequenceText(tokenizer, submit(), ["END"])
    assert [token.text for token in text.take(b"aEN")] == ["a", "", ""]
    (last,) = text.take([ord("!")], finish=Finish.STOP)
    assert (last.id, last.text) == (ord("!"), "EN")


def test_last_token_brings_what_was_kept(tokenizer: Tokenizer) -> None:
    text = SequenceText(tokenizer, submit(), ["END"])
    taken = text.take(b"aEN\xe2", finish=Finish.LENGTH)
    assert [token.text for token in taken] == ["a", "", "", "EN\ufffd"]


def test_log_probabilities_carry_texts(tokenizer: Tokenizer) -> None:
    text = SequenceText(tokenizer, submit(), [])
    entry = TokenLogprobs(-0.5, ((ord("a"), -0.5), (EOS, -2.0)))
    (token,) = text.take(b"a", [entry])
    assert token.logprob.value == -0.5
    assert [(t.id, t.text) for t in token.logprob.top] == [(ord("a"), "a"), (EOS, "</s>")]


NAMES = {256: "<pad>", 257: "<s>", EOS: "</s>"}


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.sampled_from([*b"xy", 256, EOS]), max_size=12),
    st.sampled_from(["</s>", "x</s>", "</s>y", "<pad></s>", "x<pad>y", "</s></s>", "<pad>", "xy"]),
)
def test_stop_string_of_special_tokens_ends_the_text_before_it(
    tokenizer: Tokenizer, ids: list[int], string: str
) -> None:
    """The oracle looks where the special tokens that the string names stand with their names."""

    def text_of(ids: list[int]) -> str:
        names = {token: name if name in string else "" for token, name in NAMES.items()}
        return "".join(names.get(token, chr(token)) for token in ids)

    text = SequenceText(tokenizer, submit(), [string])
    taken = text.take(ids, finish=Finish.LENGTH)
    whole = text_of(ids)
    assert text.stopped == (string in whole)
    before = whole[: whole.find(string)] if text.stopped else whole
    assert "".join(token.text for token in taken) == re.sub("<.*?>", "", before)
    made = next((n for n in range(len(ids)) if string in text_of(ids[:n])), len(ids))
    assert [token.id for token in taken] == ids[:made]


def test_special_token_may_be_spelled_in_ordinary_tokens(tokenizer: Tokenizer) -> None:
    text = SequenceText(tokenizer, submit(), ["</s>x", "</s>"])
    assert "".join(token.text for token in text.take(b"a</s>x")) == "a"
    assert text.stopped


def test_end_token_completes_a_stop_string(tokenizer: Tokenizer) -> None:
    text = SequenceText(tokenizer, submit(), ["END</s>", "</s>!"])
    assert [token.text for token in text.take(b"aEND")] == ["a", "", "", ""]
    (last,) = text.take([EOS], finish=Finish.STOP)
    assert (last.id, last.text, text.stopped) == (EOS, "", True)


@pytest.mark.parametrize("moved", range(6))
def test_a_stop_string_may_begin_before_min_tokens(tokenizer: Tokenizer, moved: int) -> None:
    """It ends the text if it is complete with the last of them, or later."""
    for strings, tokens, expected in (
        (["END"], list(b"aEND"), "a"),
        (["END"], list(b"xaEND"), "xa"),
        (["</s>a"], [97, 98, EOS, 97], "ab"),
        (["aa", "aaab"], list(b"aac"), "aac"),
        (["x", "xyz"], list(b"xyab"), "xyab"),
    ):
        before = SequenceText(tokenizer, submit(min_tokens=4), strings)
        given_ = "".join(token.text for token in before.take(tokens[:moved]))
        rest = submit(tokens[:moved], min_tokens=4)
        after = SequenceText(tokenizer, rest, strings, len(given_))
        given_ += "".join(t.text for t in after.take(tokens[moved:], finish=Finish.LENGTH))
        if tokens[moved:]:
            assert given_ == expected
        assert after.stopped == (len(expected) < len([t for t in tokens if t != EOS]))


def test_special_token_before_min_tokens_begins_a_stop_string_after_it(
    tokenizer: Tokenizer,
) -> None:
    text = SequenceText(tokenizer, submit(min_tokens=3), ["</s>a"])
    taken = text.take([EOS, 97, EOS, EOS, 97, 98])
    assert [token.text for token in taken] == ["", "a", "", "", ""]


def test_names_within_names_are_taken_for_the_longest(tmp_path: Path) -> None:
    made = byte_tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["<s>>", "</s></s>"]})
    made.save_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    longer = tokenizer.special_tokens["<s>>"]
    text = SequenceText(tokenizer, submit(), ["<s>>x"])
    assert "".join(token.text for token in text.take([257, 62, 120, longer, 121])) == ">xy"
    assert not text.stopped
    text.take([longer, 120])
    assert text.stopped


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_stream_resumed_anywhere_is_the_stream_undisturbed(
    tokenizer: Tokenizer, data: st.DataObject
) -> None:
    """Even where its last token was made already and only its outcome was lost."""
    content = [*data.draw(st.text(alphabet="aENDé😀", max_size=20)).encode()]
    content += data.draw(st.lists(st.sampled_from([256, EOS, 69, 97]), max_size=3))
    content += data.draw(st.binary(max_size=4))
    stops = ["END", "a😀", "NN", "éé", "</s>", "E</s>", "</s>a", "<pad></s>"]
    strings = data.draw(st.lists(st.sampled_from(stops), max_size=2))
    whole = SequenceText(tokenizer, submit(), strings)
    expected = whole.take(content, finish=Finish.LENGTH)
    first = SequenceText(tokenizer, submit(), strings)
    cut = data.draw(st.integers(0, len(content)))
    before = first.take(content[:cut])
    if cut == len(content):
        before = expected
    elif first.stopped:
        return
    delivered = "".join(token.text for token in before)
    second = SequenceText(tokenizer, submit(content[:cut]), strings, len(delivered))
    after = second.take(content[cut:], finish=Finish.LENGTH)
    assert [t.id for t in before] + [t.id for t in after] == [t.id for t in expected]
    assert delivered + "".join(t.text for t in after) == "".join(t.text for t in expected)
    assert second.stopped == whole.stopped


@pytest.mark.parametrize(
    ("delivered", "expected"), [(0, "hello world"), (3, "lo world"), (7, "orld")]
)
def test_resumed_stream_goes_on_at_the_right_character(
    tokenizer: Tokenizer, delivered: int, expected: str
) -> None:
    text = SequenceText(tokenizer, submit(b"hello"), [], delivered)
    assert "".join(token.text for token in text.take(b" world")) == expected
