"""The torch twins of sampling, by sorting: specification and CPU backend.

Arguments and effects are those of the launchers of the same names.
"""

import torch


def greedy(logits: torch.Tensor, out: torch.Tensor, sound: torch.Tensor | None = None) -> None:
    """As `sampling.greedy`."""
    largest = logits.amax(1, keepdim=True)  # NaN if any is
    best = (logits == largest) | logits.isnan()
    tokens = torch.arange(logits.shape[1], device=logits.device)
    out.copy_(torch.where(best, tokens, logits.shape[1]).amin(1))
    if sound is not None:
        sound.copy_(largest.isfinite()[:, 0])


def sample(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor,
    min_p: torch.Tensor, uniform: torch.Tensor, out: torch.Tensor,
    sound: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """As `sampling.sample`; sums are float64."""
    greedy(logits, out, sound)
    rows = ((temperature > 0) & logits.amax(1).isfinite()).nonzero().squeeze(1)
    if len(rows):
        values = logits[rows].double()
        weights = values - values.amax(1, keepdim=True)
        heat = temperature[rows].double().clamp(2.0**-126, 2.0**126)
        weights = torch.exp(weights / heat.unsqueeze(1))
        weights = _top_k(values, weights, top_k[rows])
        weights = _top_p(values, weights, top_p[rows].double())
        weights = weights * (weights >= min_p[rows].double().unsqueeze(1))
        running = weights.cumsum(1)
        target = uniform[rows].double().unsqueeze(1) * running[:, -1:]
        kept = weights > 0
        tokens = torch.arange(logits.shape[1], device=logits.device)
        last = torch.where(kept, tokens, -1).amax(1)
        drawn = torch.minimum((~(running > target)).sum(1), last).to(out.dtype)
        out[rows] = torch.where(kept.any(1), drawn, out[rows])


def _top_k(values: torch.Tensor, weights: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Weights without those of values below the k-th largest."""
    vocabulary = values.shape[1]
    last = torch.where((k > 0) & (k < vocabulary), k, vocabulary).long() - 1
    threshold = values.sort(1, descending=True).values.gather(1, last.unsqueeze(1))
    return weights * (values >= threshold)


def _top_p(values: torch.Tensor, weights: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Weights without those of values below the nucleus."""
    order = values.sort(1, descending=True)
    running = weights.gather(1, order.indices).cumsum(1)
    enough = running >= p.unsqueeze(1) * running[:, -1:]
    threshold = order.values.gather(1, enough.int().argmax(1, keepdim=True))
    return weights * ((values >= threshold) | ~(p < 1).unsqueeze(1))


def penalize(
    logits: torch.Tensor, counts: torch.Tensor, slots: torch.Tensor, repetition: torch.Tensor,
    presence: torch.Tensor, frequency: torch.Tensor,
) -> None:  # fmt: skip
    """As `sampling.penalize`."""
    rows = (slots >= 0).nonzero().squeeze(1)
    state = counts[slots[rows].long()]
    values = logits[rows].float()
    factor = repetition[rows].unsqueeze(1)
    changed = torch.where(values > 0, values / factor, values * factor)
    times = state.bitwise_and(torch.iinfo(torch.int32).max)
    changed -= frequency[rows].unsqueeze(1) * times
    changed -= torch.where(times > 0, presence[rows].unsqueeze(1), 0.0)
    logits[rows] = torch.where(state != 0, changed, values).to(logits.dtype)


def count_tokens(counts: torch.Tensor, slots: torch.Tensor, tokens: torch.Tensor) -> None:
    """As `sampling.count_tokens`."""
    inside = (tokens >= 0) & (tokens < counts.shape[1])
    rows = ((slots >= 0) & inside).nonzero().squeeze(1)
    counts[slots[rows].long(), tokens[rows].long()] += 1
