"""Our matcher says what `re` says, and never takes long about it."""

import re
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from granatum.adapters_store.pattern import Budget, Pattern, PatternError

ATOMS = st.sampled_from(
    ["a", "b", ".", r"\.", "[ab]", "[^a]", r"\d", r"\w", "[a-c0-9]", "^", "$", r"\b", r"\B", ""]
)


def _larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    suffix = st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,3}", "{0}", "{2,}"])
    return st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inner, suffix).map(lambda pair: f"({pair[0]}){pair[1]}"),
        inner.map(lambda text: f"(?={text})"),
        inner.map(lambda text: f"(?!{text})"),
        inner.map(lambda text: f"(?i:{text})"),
    )


PATTERNS = st.recursive(ATOMS, _larger, max_leaves=6)


@given(pattern=PATTERNS, text=st.text("abA.c01_", min_size=1, max_size=7))
@settings(max_examples=600, deadline=None, derandomize=True)
def test_says_what_re_says(pattern: str, text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = re.fullmatch(pattern, text) is not None
        assert Pattern(pattern).matches(text, [0], Budget()) == expected


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.layers\.(0|1)\.self_attn\.(q|v)_proj",
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|k_proj).*?)|"
        r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|up_proj)))",
        r"^model\.layers\.(?!0\.)\d+\.mlp\..*(?<=up)_proj$",
        r"(?i)MODEL\..*\.Q_PROJ",
        r"model.layers.[^0].self_attn.[^KVO]_proj",
    ],
)
def test_real_patterns(pattern: str) -> None:
    names = [
        f"model.layers.{layer}.{module}"
        for layer in (0, 1, 12)
        for module in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
    ]
    ours = [Pattern(pattern).matches(name, [0], Budget()) for name in names]
    assert ours == [re.fullmatch(pattern, name) is not None for name in names]


@pytest.mark.parametrize(
    "pattern",
    [r"(a+)+$", r"(.*)*x", r"(((((a*)*)*)*)*)*b", r"(a|a)*b", ".*" * 200 + "x", "(a{9}){9}"],
)
def test_hostile_patterns_end_soon(pattern: str) -> None:
    begun = time.process_time()
    try:
        Pattern(pattern).matches("a" * 45, [0], Budget())
    except PatternError as error:
        assert "too long" in str(error)  # noqa: PT017 - either outcome is right, if it is quick
    assert time.process_time() - begun < 10


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "no regular expression"),
        ("a{99999999999}", "no regular expression"),
        ("(" * 490 + ")" * 490, "no regular expression|nested"),
        ("a" * 2000, "longer"),
        (r"(a)\1", "groupref"),
        ("(?>a)", "atomic_group"),
        ("a*+", "possessive_repeat"),
    ],
)
def test_refused_patterns(pattern: str, message: str) -> None:
    with pytest.raises(PatternError, match=message):
        Pattern(pattern).matches("a", [0], Budget())
