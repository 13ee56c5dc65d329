"""What users saw: when each token came, and the percentiles of that."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from traffic import Request, User

Floats = npt.NDArray[np.float64]

_EARLIER = 1e-3
"""How much earlier than its twin a token may seem to come, by the noise of two processes."""


@dataclass(slots=True)
class Record:
    """One request of one user. Times are seconds of one monotonic clock."""

    user: int
    index: int
    """Of the request among its user's."""
    request: Request
    sent: float
    times: list[float] = field(default_factory=list)
    """Of each token's arrival."""


def summary(records: Sequence[Record]) -> dict[str, float]:
    """Milliseconds to the first token, from token to token and to the end, and tokens per second.

    The throughput counts prompts and outputs, from the first request to the last token.
    """
    done = [record for record in records if record.times]
    first = [record.times[0] - record.sent for record in done]
    ended = [r.times[-1] - r.sent for r in done if len(r.times) == r.request.output]
    begin, end = min(r.sent for r in done), max(r.times[-1] for r in done)
    tokens = sum(record.request.prompt + len(record.times) for record in done)
    return {
        "requests": len(done),
        **percentiles("ttft_ms", first),
        **percentiles("inter_token_ms", gaps(done)),
        **percentiles("end_to_end_ms", ended),
        "tokens_per_s": round(tokens / (end - begin), 1),
    }


def steady_tokens_per_s(records: Sequence[Record], users: Sequence[User]) -> float:
    """(prompt + output) tokens per second once every user is under way, until the first ends."""
    firsts = {record.user: record for record in reversed(records) if record.times}
    assert len(firsts) == len(users), "a user got nothing: measure for longer"
    begin = max(record.times[0] for record in firsts.values())
    lasts = {
        user: max(r.times[-1] for r in records if r.user == user and r.times) for user in firsts
    }
    end = min(lasts.values())
    tokens = 0
    for record in records:
        times = np.array(record.times)
        tokens += int(((times > begin) & (times <= end)).sum())
        if record.times and begin < record.times[0] <= end:
            tokens += record.request.prompt
    return round(tokens / (end - begin), 1)


def gaps(records: Sequence[Record], after_s: float = 0.0) -> Floats:
    """Seconds from token to token, from `after_s` after a record's first token on."""
    parts = [np.zeros(0)]
    for record in records:
        times = np.array(record.times)
        parts.append(np.diff(times[times >= times[0] + after_s]) if len(times) else times)
    return np.concatenate(parts)


def percentiles(name: str, seconds: Sequence[float] | Floats) -> dict[str, float]:
    """The 50th, 90th and 99th, in milliseconds."""
    if not len(seconds):
        return {}
    values = np.percentile(np.asarray(seconds) * 1e3, (50, 90, 99))
    return {f"{name}_p{p}": round(float(v), 3) for p, v in zip((50, 90, 99), values, strict=True)}


def lags(twin: Record, records: Sequence[Record]) -> Floats:
    """Seconds by which tokens came after those that `twin` got of the same engine steps.

    A sequence that decodes makes one token in every step, so that all of a record's tokens are the
    same number of steps away from the twin's; which number is what makes the lags least without
    making them negative.
    """
    reference, found = np.array(twin.times), []
    for record in records:
        times = np.array(record.times)[1:]  # what follows the prompt's own step
        times = times[(times > reference[4]) & (times < reference[-4])]
        if len(times) < 16:
            continue
        first = int(np.searchsorted(reference, times[0]))
        found.append(_least(reference, times, first))
    return np.concatenate(found) if found else np.zeros(0)


def _least(reference: Floats, times: Floats, first: int) -> Floats:
    best: Floats | None = None
    for start in range(max(first - 4, 0), first + 2):
        count = min(len(times), len(reference) - start)
        lag = times[:count] - reference[start : start + count]
        middle = float(np.median(lag))
        if middle >= -_EARLIER and (best is None or middle < float(np.median(best))):
            best = lag
    return np.zeros(0) if best is None else best
