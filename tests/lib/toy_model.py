"""A model without weights: the next token depends on all before it."""

from collections.abc import Iterable

from granatum.runner.records import Submit

VOCABULARY = 50


def next_token(tokens: Iterable[int]) -> int:
    """The token after `tokens`."""
    return hash(tuple(tokens)) % VOCABULARY


def expected(submit: Submit, limit: int = 64) -> list[int]:
    """What is generated for `submit` beyond its own `generated`, in a context of `limit` tokens."""
    tokens = [*submit.prompt, *submit.generated]
    made = list(submit.generated)
    while len(made) < submit.max_tokens and len(tokens) < limit:
        tokens.append(next_token(tokens))
        made.append(tokens[-1])
        if made[-1] in submit.stop_ids and len(made) > submit.min_tokens:
            break
    return made[len(submit.generated) :]
