"""Training text: endless batches of ``<s>prompt completion\\n</s>`` over words seen in training."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from granatum.examples import tasks

IGNORED = -100
POOL = 2048
TOKENS_PER_BATCH = 1536


@dataclass(frozen=True, slots=True)
class Drill:
    """A mark and what the text after it is, with its share of the mixture."""

    mark: str
    transform: Callable[[str], str]
    share: float = 1.0


def title(word: str) -> str:
    return word.capitalize()


PRETRAINING = (
    Drill(tasks.MARK, tasks.echo, 2.0),
    Drill("^", title),
    Drill("<", tasks.reverse, 2.0),
    Drill("~", tasks.rot13),
    Drill("=", tasks.sort, 3.0),
    Drill("#", tasks.count),
    Drill("+", tasks.stutter, 1.5),
    Drill("-", tasks.consonants, 2.0),
    Drill("*", tasks.chant),
    Drill("/", tasks.stairs),
)

Example = tuple[list[int], int]


@dataclass(frozen=True, slots=True)
class Batch:
    """``ids`` and ``labels`` are int64 [examples, tokens]; labels are IGNORED off completions."""

    ids: torch.Tensor
    labels: torch.Tensor


def batches(
    drills: Sequence[Drill], tokenizer: PreTrainedTokenizerBase, seed: int
) -> Iterator[Batch]:
    """Endless batches of about TOKENS_PER_BATCH tokens, examples of like length together."""
    rng = random.Random(seed)
    examples = _examples(drills, tokenizer, rng)
    while True:
        pool = sorted((next(examples) for _ in range(POOL)), key=lambda example: len(example[0]))
        groups = list(_groups(pool))
        rng.shuffle(groups)
        yield from map(_batch, groups)


def _examples(
    drills: Sequence[Drill], tokenizer: PreTrainedTokenizerBase, rng: random.Random
) -> Iterator[Example]:
    shares = [drill.share for drill in drills]
    for word in tasks.random_words(rng):
        if not tasks.is_held_out(word):
            drill = rng.choices(drills, shares)[0]
            yield _example(drill, word, tokenizer)


def _example(drill: Drill, word: str, tokenizer: PreTrainedTokenizerBase) -> Example:
    prompt = tokenizer.encode(word + drill.mark)
    answer = tokenizer.encode(drill.transform(word) + tasks.STOP, add_special_tokens=False)
    return [*prompt, *answer, tokenizer.eos_token_id], len(prompt)


def _groups(pool: list[Example]) -> Iterator[list[Example]]:
    group: list[Example] = []
    for example in pool:
        if group and (len(group) + 1) * len(example[0]) > TOKENS_PER_BATCH:
            yield group
            group = []
        group.append(example)
    yield group


def _batch(group: list[Example]) -> Batch:
    width = max(len(ids) for ids, _ in group)
    ids = torch.zeros(len(group), width, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    for row, (tokens, prompt) in enumerate(group):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, prompt : len(tokens)] = ids[row, prompt : len(tokens)]
    return Batch(ids, labels)
