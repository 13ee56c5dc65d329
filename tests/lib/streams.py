"""Streams of the example adapters over a real cluster, and what they must come to."""

import asyncio
from collections.abc import Sequence

from granatum.client.client import Client, Generation
from granatum.client.records import Completion, RunnerStatus
from granatum.examples.tasks import ADAPTER_TASKS, held_out_words

TOKENS = 150
MINE = [task for task in ADAPTER_TASKS if task.tenant == "acme"]
Request = tuple[str, str]


def requests(number: int) -> list[Request]:
    """Prompts with the adapter of each: every one of the tenant's, and the base model."""
    adapters = ["", *(task.name for task in MINE)]
    words = held_out_words(number)
    return [(f"{word}>", adapters[i % len(adapters)]) for i, word in enumerate(words)]


async def upload_mine(client: Client) -> None:
    """Upload every adapter of the tenant acme."""
    for task in MINE:
        await client.upload(task.name, task.path)


def long(client: Client, request: Request, tokens: int = TOKENS) -> Generation:
    """A stream of exactly `tokens` tokens, half of them sampled."""
    prompt, adapter = request
    warm = 0.8 if len(prompt) % 2 else 0.0
    return client.generate(
        prompt,
        adapter=adapter,
        max_tokens=tokens,
        ignore_eos=True,
        temperature=warm,
        seed=7,
        timeout=120,
    )


async def finish(generation: Generation) -> Completion:
    """The whole stream."""
    tokens = tuple([token async for token in generation])
    assert generation.start is not None
    assert generation.end is not None
    return Completion(tokens, generation.start, generation.end)


async def all_of(client: Client, wanted: Sequence[Request]) -> list[Completion]:
    """The whole streams of these requests, side by side."""
    return list(await asyncio.gather(*(finish(long(client, request)) for request in wanted)))


async def begun(generations: Sequence[Generation], tokens: int) -> list[asyncio.Task[Completion]]:
    """The streams as tasks, each past `tokens` of its tokens."""
    past = [asyncio.Event() for _ in generations]

    async def follow(generation: Generation, reached: asyncio.Event) -> Completion:
        seen = []
        async for token in generation:
            seen.append(token)
            if len(seen) > tokens:
                reached.set()
        assert generation.start is not None
        assert generation.end is not None
        return Completion(tuple(seen), generation.start, generation.end)

    tasks = [asyncio.create_task(follow(g, e)) for g, e in zip(generations, past, strict=True)]
    await asyncio.gather(*(event.wait() for event in past))
    return tasks


def same(one: Sequence[Completion], other: Sequence[Completion]) -> None:
    """Both made the same tokens and the same text."""
    assert [[t.id for t in c.tokens] for c in one] == [[t.id for t in c.tokens] for c in other]
    assert [c.text for c in one] == [c.text for c in other]


async def interrupted(
    client: Client, operator: Client, number: int
) -> tuple[list[Request], list[Completion], list[asyncio.Task[Completion]], RunnerStatus]:
    """Streams under way on two runners, to be disturbed.

    Returned are the requests, what they come to undisturbed, their tasks, and the busier runner.
    """
    await upload_mine(client)
    wanted = requests(number)
    undisturbed = await all_of(client, wanted)
    tasks = await begun([long(client, request) for request in wanted], 5)
    busiest = max((await figures(operator)).values(), key=lambda runner: runner.reserved)
    return wanted, undisturbed, tasks, busiest


async def figures(client: Client) -> dict[str, RunnerStatus]:
    """The live runners by their ids."""
    return {runner.id: runner for runner in await client.runners()}
