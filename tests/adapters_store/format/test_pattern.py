"""Patterns mean what they mean to PEFT, and never take long."""

import re
import resource
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key, match_target_against_key

from granatum.adapters_store.format import pattern
from granatum.adapters_store.format.pattern import PatternError, Question, ask

MODULES = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj", "mlp")
NAMES = (
    *(f"model.layers.{layer}.{module}" for layer in (0, 1, 12) for module in MODULES),
    *("model", "lm_head", "model.layers"),
)
REAL = [
    r".*\.layers\.(0|1)\.self_attn\.(q|v)_proj",
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|k_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|up_proj)))",
    r"^model\.layers\.(?!0\.)\d+\.mlp\..*(?<=up)_proj$",
    r"(?i)MODEL\..*\.Q_PROJ",
    r"model.layers.[^0].self_attn.[^KVO]_proj",
    r".*(\w)\1.*",  # what only backtracking can match
    r"(?>model)\..*+",
    "model.layers.1.mlp.up_proj",
    "lm.head",
    "q_proj",
    r"a)|(.*q_proj",  # balanced only where PEFT wraps it
]


def _of_peft(text: str, *, whole: bool) -> list[int | None] | None:
    """What PEFT says; None if it raises."""
    try:
        if whole:
            found = [match_target_against_key(text, name) is not None for name in NAMES]
        else:
            found = [get_pattern_key([text, name + "!"], name) == text for name in NAMES]
    except re.error:
        return None
    return [0 if matches else None for matches in found]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("text", REAL)
def test_a_pattern_means_what_it_means_to_peft(text: str, whole: bool) -> None:
    question = Question("target_modules", (text,), NAMES, whole)
    expected = _of_peft(text, whole=whole)
    if expected is None:
        with pytest.raises(PatternError, match="no regular expression"):
            ask([question])
    else:
        assert ask([question]) == [expected]


PLAIN = st.lists(st.text("qk_p.01", min_size=1, max_size=5), min_size=1, max_size=6, unique=True)


@given(patterns=PLAIN, names=st.lists(st.text("qk_p.01", min_size=1, max_size=7), min_size=1))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_words_and_dots_are_matched_without_a_process(
    patterns: list[str], names: list[str]
) -> None:
    for whole, form in ((True, "{}"), (False, r"(.*\.)?({})")):
        question = Question("rank_pattern", tuple(patterns), tuple(names), whole)
        expected = [
            next((i for i, p in enumerate(patterns) if re.fullmatch(form.format(p), name)), None)
            for name in names
        ]
        assert question.plain_answer() == expected


def test_the_first_pattern_counts_and_questions_are_apart() -> None:
    names = ("a.b", "a.c", "d")
    first = Question("rank_pattern", ("[b]", "[bc]", ".*"), names, whole=False)
    plain = Question("alpha_pattern", ("c", "a.c"), names, whole=False)
    last = Question("rank_pattern", ("x+", "[d]"), names, whole=False)
    assert ask([first, plain, last]) == [[0, 1, 2], [None, 0, None], [None, None, 1]]


HOSTILE = {
    "nested repeats": "(((((.*)*)*)*)*)*x!",
    "counted repeats": "(?:(?:(?:.{1,1000}){1,1000}){1,1000}){1,1000}x!",
    "back references": r"(.*)(.*)(.*)(.*)(.*)\1\2\3\4\5\1\2\3!",
    "alternatives": "(a|m|.)*" * 100 + "!",
    "optional": "(.*a?)" * 150 + "x",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_pattern_costs_others_nothing(case: str) -> None:
    """Little of this process's time, and a bounded time of another's."""
    question = Question("target_modules", (HOSTILE[case],), NAMES * 20, whole=True)
    ours, theirs = time.process_time(), _children_s()
    with pytest.raises(PatternError, match="takes too long") as error:
        ask([question])
    assert (error.value.field, error.value.pattern) == ("target_modules", HOSTILE[case])
    assert time.process_time() - ours < 0.1
    assert _children_s() - theirs < 2 * pattern.CPU_S


@pytest.mark.parametrize(
    "patterns",
    [
        tuple(f"{'[a-z]?' * 160}x{i}" for i in range(200)),
        tuple(
            "[" + "".join(chr(0x4E00 + 2 * j) for j in range(900)) + f"]*x{i}" for i in range(200)
        ),
        tuple("(?i:" + r"[\x00-\U0010ffff]" * i + ")" for i in range(50)),
        tuple("." * 31 + f"{i:05d}" for i in range(2000)),
        tuple("model.layers" + "." * i + "x" * (18 - i) for i in range(18)) * 100,
    ],
)
def test_many_patterns_cost_others_little(patterns: tuple[str, ...]) -> None:
    names = tuple(f"model.layers.{i}.self_attn.q_proj" for i in range(560))
    ours, theirs = time.process_time(), _children_s()
    try:
        ask([Question("rank_pattern", patterns, names, whole=False)])
    except PatternError as error:
        assert "takes too long" in str(error)  # noqa: PT017 - either outcome is right
    assert time.process_time() - ours < 0.3
    assert _children_s() - theirs < 2 * pattern.CPU_S


@pytest.mark.parametrize(
    "text", ["(", "a{99999999999}", "(?P<n>", "*", "[z-a]", r"\p{L}", "(?<=a*)b", "\ud800("]
)
def test_what_is_no_regular_expression(text: str) -> None:
    with pytest.raises(PatternError, match="no regular expression"):
        ask([Question("exclude_modules", ("fine.*", text), NAMES, whole=True)])


def test_what_was_matched_once_is_remembered() -> None:
    question = Question("target_modules", (r".*\.remembered[_]proj",), NAMES, whole=True)
    answer, theirs = ask([question]), _children_s()
    assert ask([question]) == answer
    assert _children_s() == theirs


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.fixture(autouse=True)
def _quiet() -> None:
    warnings.simplefilter("ignore")
