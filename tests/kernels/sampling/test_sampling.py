"""Sampling against plain Python in float64, and against the distribution it shall draw from."""

import math
import random

import pytest
import torch

from granatum.kernels.sampling.greedy import greedy, greedy_workspace_elements
from granatum.kernels.sampling.penalties import count_tokens, penalize, start_counts
from granatum.kernels.sampling.sample import sample


def expected_tokens(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> dict[int, float]:
    """Each token that may be drawn, in vocabulary order, with its probability."""
    if temperature == 0:
        return {logits.index(max(logits)): 1.0}
    kept = {t: math.exp((x - max(logits)) / temperature) for t, x in enumerate(logits)}
    if 0 < top_k < len(logits):
        least = sorted(logits, reverse=True)[top_k - 1]
        kept = {t: w for t, w in kept.items() if logits[t] >= least}
    if top_p < 1:
        wanted, got = top_p * sum(kept.values()), 0.0
        for value in sorted({logits[t] for t in kept}, reverse=True):
            if got >= wanted:
                kept = {t: w for t, w in kept.items() if logits[t] > value}
                break
            got += sum(w for t, w in kept.items() if logits[t] == value)
    kept = {t: w for t, w in kept.items() if w >= min_p}
    return {t: w / sum(kept.values()) for t, w in kept.items()}


def draw(logits: torch.Tensor, rows: list[tuple[float, int, float, float, float]]) -> list[int]:
    """Tokens for rows of (temperature, top_k, top_p, min_p, uniform)."""
    columns = [torch.tensor(c, device=logits.device) for c in zip(*rows, strict=True)]
    temperature, top_k, top_p, min_p, uniform = columns
    out = torch.full((len(rows),), -1, dtype=torch.int32, device=logits.device)
    sample(logits, temperature, top_k.int(), top_p, min_p, uniform, out)
    tokens: list[int] = out.tolist()
    return tokens


SETTINGS = [
    (0.0, 0, 1.0, 0.0),
    (1.0, 0, 1.0, 0.0),
    (0.7, 5, 1.0, 0.0),
    (1.3, 0, 0.8, 0.0),
    (1.0, 0, 1.0, 0.2),
    (0.5, 0, 1e-6, 0.0),
    (2.0, 1, 1.0, 0.0),
    (0.9, 12, 0.6, 0.05),
    (1.0, 500, 1.0, 0.0),
]


@pytest.mark.parametrize("vocabulary", [37, 2049])
def test_draws_the_token_under_the_uniform_number(
    vocabulary: int, dtype: torch.dtype, device: torch.device
) -> None:
    logits = (2 * torch.randn(len(SETTINGS), vocabulary)).to(dtype)
    generator = random.Random(3)
    rows, wanted = [], []
    for line, setting in zip(logits.double().tolist(), SETTINGS, strict=True):
        allowed = expected_tokens(line, *setting)
        token = generator.choice(list(allowed)[: vocabulary // 2])
        below = sum(p for t, p in allowed.items() if t < token)
        rows.append((*setting, below + allowed[token] / 2))
        wanted.append(token)
    assert draw(logits.to(device), rows) == wanted


def test_a_whole_vocabulary_is_drawn_from_by_its_float64_probabilities(
    device: torch.device,
) -> None:
    """Sums of many small probabilities lose nothing that could be noticed."""
    rows = [(1.0, 0, 1.0, 0.0, 0.9997), (0.7, 0, 0.95, 0.0, 0.5), (1.3, 0, 0.7, 1e-3, 0.98)]
    logits = 2 * torch.randn(len(rows), 32_003, generator=torch.Generator().manual_seed(2))
    tokens = draw(logits.to(device), rows)
    for line, token, (heat, _, top_p, min_p, uniform) in zip(logits, tokens, rows, strict=True):
        weights = torch.exp((line.double() - line.max()) / heat)
        ordered = weights.sort(descending=True).values
        nucleus = ordered[int((ordered.cumsum(0) >= top_p * ordered.sum()).int().argmax())]
        kept = weights * ((weights >= nucleus) | (top_p == 1)) * (weights >= min_p)
        ends = kept.cumsum(0) / kept.sum()
        assert ends[token] - kept[token] / kept.sum() - 1e-5 < uniform < ends[token] + 1e-5


def test_sampled_rows_follow_the_distribution(device: torch.device) -> None:
    rows = 17
    logits = torch.randn(11).expand(rows, 11).contiguous()
    allowed = expected_tokens(logits[0].double().tolist(), 0.8, 6, 0.9, 0.01)
    setting = (0.8, 6, 0.9, 0.01)
    tokens = draw(logits.to(device), [(*setting, (i + 0.5) / rows) for i in range(rows)])
    assert tokens == sorted(tokens)
    for token in range(11):
        assert abs(tokens.count(token) / rows - allowed.get(token, 0.0)) < 1.01 / rows


def test_equal_logits_stay_or_go_together(device: torch.device) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0, -0.0]], device=device)
    settings = [(1.0, 2, 1.0, 0.0), (1.0, 0, 0.3, 0.0), (1.0, 4, 1.0, 0.0)]
    for setting, kept in zip(settings, [[1, 2, 4], [1, 2, 4], [0, 1, 2, 4]], strict=True):
        found = {draw(logits, [(*setting, u / 8)])[0] for u in range(8)}
        assert sorted(found) == kept


def test_extreme_numbers(device: torch.device) -> None:
    logits = torch.randn(4, 40)
    logits[:, 7] = -math.inf
    logits[2] = 1e30
    ones = [(1e-4, 0, 1.0, 0.0, 0.999), (1.0, 0, 1.0, 1.0, 0.5)]
    ends = [(1.0, 0, 1.0, 0.0, 1 - 2**-24), (100.0, 0, 0.999, 0.0, 0.0)]
    tokens = draw(logits.to(device), [*ones, *ends])
    best = logits.argmax(1).tolist()
    assert tokens[:2] == best[:2]
    assert tokens[2] == 39
    assert 0 <= tokens[3] < 40
    assert 7 not in tokens


@pytest.mark.parametrize("vocabulary", [5, 4096, 9001])
def test_greedy_takes_the_lowest_of_the_best(
    vocabulary: int, dtype: torch.dtype, device: torch.device
) -> None:
    logits = torch.randn(3, vocabulary).to(dtype)
    logits[0] = -5.0
    logits[1, [vocabulary - 1, vocabulary // 2]] = 9.0
    logits[2, 3] = math.inf
    out = torch.full((3,), -1, dtype=torch.int64, device=device)
    elements = greedy_workspace_elements(3, vocabulary)
    workspace = torch.full((elements,), 2**62, device=device)
    last = torch.full((4,), -1, dtype=torch.int32, device=device)
    seats = torch.tensor([2, 0, 3], dtype=torch.int32, device=device)
    greedy(logits.to(device), out, workspace, last, seats)
    assert out.tolist() == [0, vocabulary // 2, 3]
    assert last.tolist() == [vocabulary // 2, -1, 0, 3]


NAN, NEGATIVE_NAN = 0x7FC00000, 0xFFC00000 - (1 << 32)
"""The bits of a float32, as Python's numbers keep no sign of a NaN."""


def hostile(vocabulary: int, dtype: torch.dtype) -> tuple[torch.Tensor, list[int], list[int]]:
    """Rows of numbers that no model should make, the token of each, and whether it is sound."""
    nan, negative = torch.tensor([NAN, NEGATIVE_NAN], dtype=torch.int32).view(torch.float32)
    far = vocabulary - 1
    rows: list[tuple[dict[int, torch.Tensor | float], int, int]] = [
        ({far: nan}, far, 0),
        ({2: negative, far: math.inf}, 2, 0),
        ({1: math.inf, far: math.inf}, 1, 0),
        ({3: -math.inf, far: 5.0}, far, 1),
        ({0: -math.inf, 4: 3e4}, 4, 1),
        ({}, 1, 1),
    ]
    logits = torch.zeros(len(rows) + 3, vocabulary)
    for row, (changes, _, _) in enumerate(rows):
        logits[row, 1] = 2.0
        for at, value in changes.items():
            logits[row, at] = value
    logits[-3], logits[-2], logits[-1] = nan, negative, -math.inf
    tokens = [token for _, token, _ in rows] + [0, 0, 0]
    return logits.to(dtype), tokens, [sound for _, _, sound in rows] + [0, 0, 0]


@pytest.mark.parametrize("vocabulary", [5, 4096, 9001])
def test_greedy_flags_rows_that_are_not_finite(
    vocabulary: int, dtype: torch.dtype, device: torch.device
) -> None:
    logits, tokens, expected = hostile(vocabulary, dtype)
    rows = len(tokens)
    out, sound, seats = torch.arange(3 * rows, dtype=torch.int32, device=device).view(3, rows)
    last = torch.full((3 * rows,), -1, dtype=torch.int32, device=device)
    elements = greedy_workspace_elements(rows, vocabulary)
    workspace = torch.zeros(elements, dtype=torch.int64, device=device)
    greedy(logits.to(device), out, workspace, last, seats, sound)
    assert (out.tolist(), sound.tolist()) == (tokens, expected)
    assert last[2 * rows :].tolist() == tokens


@pytest.mark.parametrize("vocabulary", [5, 2048, 2500])
@pytest.mark.parametrize("setting", [(0.0, 0, 1.0, 0.0), (1e-39, 0, 1.0, 0.0), (0.1, 2, 0.9, 0.1)])
def test_sampled_rows_that_are_not_finite(
    vocabulary: int,
    setting: tuple[float, int, float, float],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    logits, tokens, expected = hostile(vocabulary, dtype)
    parameters = [torch.full((len(tokens),), x, device=device) for x in (*setting, 0.5)]
    temperature, top_k, top_p, min_p, uniform = parameters
    out, sound = torch.full((2, len(tokens)), -1, dtype=torch.int32, device=device)
    sample(logits.to(device), temperature, top_k.int(), top_p, min_p, uniform, out, sound)
    assert (out.tolist(), sound.tolist()) == (tokens, expected)


def test_no_parameter_draws_beyond_the_vocabulary(device: torch.device) -> None:
    """Rows of one likeliest token, which is what remains where a filter leaves nothing."""
    settings = [
        (1e-45, 0, 1.0, 0.0, 0.999),
        (1.0, 0, 0.0, 0.0, 0.999),
        (1.0, 0, -1.0, 0.0, 0.999),
        (1.0, 0, 1e-45, 0.0, 0.999),
        (1.0, 0, 1.0, 2.0, 0.5),
        (1.0, 0, 1.0, math.nan, 0.5),
        (math.nan, 0, 1.0, 0.0, 0.5),
        (-1.0, 0, 1.0, 0.0, 0.5),
        (1.0, -7, 1e-9, 0.0, 0.5),
    ]
    logits = torch.zeros(len(settings), 41, device=device)
    logits[:, 17] = 3.0
    assert draw(logits, settings) == [17] * len(settings)
    odd = [(math.inf, 0, 1.0, 0.0, 0.5), (3e38, 0, 1.0, 0.0, 0.999), (1.0, 0, math.nan, 0.0, 1.0)]
    logits = torch.full((3, 41), -math.inf, device=device)
    logits[:, :20] = 0.0
    tokens = draw(logits, odd)
    assert tokens[1:] == [19, 19]
    assert tokens[0] in (9, 10)


def test_penalties_that_overflow_make_a_row_unsound(
    dtype: torch.dtype, device: torch.device
) -> None:
    logits = torch.zeros(4, 9, dtype=dtype, device=device)
    logits[:, 3] = 4.0
    counts = torch.zeros(4, 9, dtype=torch.int32, device=device)
    for row in range(4):
        start_counts(
            counts, row, torch.tensor([3, 5], device=device), torch.tensor([5], device=device)
        )
    slots = torch.arange(4, dtype=torch.int32, device=device)
    repetition = torch.tensor([1e-40, 1.0, 1.0, 1.0], device=device)
    presence = torch.tensor([0.0, -math.inf, math.inf, 0.0], device=device)
    frequency = torch.tensor([0.0, 0.0, 0.0, math.inf], device=device)
    penalize(logits, counts, slots, repetition, presence, frequency)
    out, sound, top_k = torch.zeros(3, 4, dtype=torch.int32, device=device)
    zeros, ones = torch.zeros(4, device=device), torch.ones(4, device=device)
    sample(logits, zeros, top_k, ones, zeros, zeros, out, sound)
    assert sound.tolist() == [0, 0, 1, 0]  # +inf, +inf, a token of -inf among others, inf * 0
    assert out.tolist() == [3, 5, 3, 3]
    assert logits[:, [0, 1, 2, 4, 6, 7, 8]].eq(0).all()


def test_tokens_beyond_the_vocabulary_are_not_counted(device: torch.device) -> None:
    counts = torch.zeros(3, 6, dtype=torch.int32, device=device)
    slots = torch.tensor([1, 0, -1, 2], dtype=torch.int32, device=device)
    tokens = torch.tensor([-1, 6, 3, 5], dtype=torch.int32, device=device)
    count_tokens(counts, slots, tokens)
    assert counts.nonzero().tolist() == [[2, 5]]


def test_penalties(dtype: torch.dtype, device: torch.device) -> None:
    vocabulary = 50
    logits = torch.randn(3, vocabulary).to(dtype)
    counts = torch.full((4, vocabulary), 99, dtype=torch.int32, device=device)
    prompt, output = [1, 2, 2, 3], [3, 4, 4, 49]
    start_counts(
        counts, 2, torch.tensor(prompt, device=device), torch.tensor(output[:2], device=device)
    )
    start_counts(
        counts,
        0,
        torch.tensor([0], device=device),
        torch.tensor([], dtype=torch.int64, device=device),
    )
    slots = torch.tensor([2, -1, 0], dtype=torch.int32, device=device)
    for token in output[2:]:
        new = torch.tensor([token, 1, 1], dtype=torch.int32, device=device)
        count_tokens(counts, torch.where(slots == 2, slots, -1), new)
    on_device = logits.clone().to(device)
    repetition, presence, frequency = (
        torch.tensor(values, device=device) for values in ([1.3] * 3, [0.5] * 3, [-0.25] * 3)
    )
    penalize(on_device, counts, slots, repetition, presence, frequency)

    expected = logits.double()
    for row, seen, made in ((0, {1, 2, 3, 4, 49}, output), (2, {0}, [])):
        for token in seen:
            value = expected[row, token]
            value = value / 1.3 if value > 0 else value * 1.3
            value = value - (-0.25) * made.count(token) - 0.5 * (token in made)
            expected[row, token] = value
    tolerance = {torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float32: 1e-6}[dtype]
    torch.testing.assert_close(on_device.double().cpu(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(counts[1], torch.full_like(counts[1], 99))


@pytest.mark.gpu
def test_graph_replays_other_parameters() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    device = torch.device("cuda")
    logits = torch.randn(2, 1000, device=device)
    temperature, top_p, min_p, uniform = torch.zeros(4, 2, device=device)
    top_k, out = torch.zeros(2, 2, dtype=torch.int32, device=device)

    def run() -> None:
        sample(logits, temperature, top_k, top_p, min_p, uniform, out)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for temperatures, k in (([0.0, 1.0], 1), ([1.0, 0.0], 0)):
        temperature.copy_(torch.tensor(temperatures))
        top_k.fill_(k)
        top_p.fill_(1e-6 if k == 0 else 1.0)
        logits.normal_()
        graph.replay()
        assert out.tolist() == logits.argmax(1).tolist()
