"""The torch twins of sampling, by sorting: specification and CPU backend.

Arguments and effects are those of the launchers of the same names.
"""

import torch


def greedy(logits: torch.Tensor, out: torch.Tensor) -> None:
    """As `sampling.greedy`."""
    best = logits == logits.amax(1, keepdim=True)
    tokens = torch.arange(logits.shape[1], device=logits.device)
    out.copy_(torch.where(best, tokens, logits.shape[1]).amin(1))


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniform: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """As `sampling.sample`; sums are float64."""
    greedy(logits, out)
    rows = (temperature > 0).nonzero().squeeze(1)
    if len(rows):
        values = logits[rows].double()
        weights = values - values.amax(1, keepdim=True)
        weights = torch.exp(weights / temperature[rows].double().unsqueeze(1))
        weights = _top_k(values, weights, top_k[rows])
        weights = _top_p(values, weights, top_p[rows].double())
        weights = weights * (weights >= min_p[rows].double().unsqueeze(1))
        running = weights.cumsum(1)
        target = uniform[rows].double().unsqueeze(1) * running[:, -1:]
        out[rows] = (running <= target).sum(1).to(out.dtype)


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
    return weights * ((values >= threshold) | (p >= 1).unsqueeze(1))


def penalize(
    logits: torch.Tensor,
    counts: torch.Tensor,
    slots: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
) -> None:
    """As `sampling.penalize`."""
    rows = (slots >= 0).nonzero().squeeze(1)
    state = counts[slots[rows].long()]
    values = logits[rows].float()
    factor = repetition[rows].unsqueeze(1)
    repeated = torch.where(values > 0, values / factor, values * factor)
    values = torch.where(state != 0, repeated, values)
    times = state.bitwise_and(torch.iinfo(torch.int32).max)
    values -= frequency[rows].unsqueeze(1) * times
    values -= presence[rows].unsqueeze(1) * (times > 0)
    logits[rows] = values.to(logits.dtype)


def count_tokens(counts: torch.Tensor, slots: torch.Tensor, tokens: torch.Tensor) -> None:
    """As `sampling.count_tokens`."""
    rows = (slots >= 0).nonzero().squeeze(1)
    counts[slots[rows].long(), tokens[rows].long()] += 1
