"""Answers of the registry's server that are damaged, foreign or cut: no more than Unavailable."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest
from placements import TERMS
from redis_proxy import wire_to
from router_box import CONFIG, Box
from scripted_runner import expected_ids

from granatum.router.placement.placement import Lease, LeaseKind, Placed, PlacementRequest
from granatum.router.placement.registry import Registry
from granatum.v1.cluster_pb2 import Runner
from granatum.v1.errors import Unavailable

RUNNER = Runner(
    id="a", address="x:1", max_batch=4, total_pages=9, free_pages=9, page_tokens=16, max_context=99
)
CLAIM = Lease(LeaseKind.CLAIM, "acme/x", "me")
CALLS: dict[str, Callable[[Registry], Awaitable[object]]] = {
    "place": lambda registry: registry.place(PlacementRequest("1", tokens=1)),
    "heartbeat": lambda registry: registry.heartbeat(RUNNER),
    "runners": lambda registry: registry.runners(),
    "alive": lambda registry: registry.alive("a"),
    "claim": lambda registry: registry.claim(CLAIM),
    "renew": lambda registry: registry.renew([CLAIM]),
    "release": lambda registry: registry.release([CLAIM]),
    "drain": lambda registry: registry.drain("b"),
    "ping": lambda registry: registry.ping(),
    "news": lambda registry: anext(registry.news()),
}
DAMAGE = {
    "a length that is no number": b"$abc\r\n",
    "an integer that is none": b":1x\r\n",
    "a negative length": b"*-7\r\n",
    "another type": b"+OK\r\n",
    "an empty list": b"*0\r\n",
    "a list of nothing": b"*2\r\n$-1\r\n*-1\r\n",
    "an unknown mark": b"\xff\xfe\x00\r\n",
    "no text": b"$4\r\n\xff\xff\xff\xff\r\n",
}


def flipped(piece: bytes, chance: random.Random) -> bytes:
    damaged = bytearray(piece)
    for _ in range(3):
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
    return bytes(damaged)


@pytest.mark.parametrize("call", CALLS)
async def test_a_damaged_answer_is_unavailable_and_the_next_one_is_right(
    redis_url: str, fleet: str, call: str
) -> None:
    async with wire_to(redis_url) as wire, Registry(wire.url, fleet, TERMS) as registry:
        await registry.heartbeat(RUNNER)
        for rubbish in DAMAGE.values():
            wire.damage = lambda _, rubbish=rubbish: rubbish
            # A pong may well be anything, and a subscription that failed is silent for a while.
            with suppress(Unavailable, TimeoutError):
                async with asyncio.timeout(0.2 if call == "news" else 5):
                    await CALLS[call](registry)
            wire.damage = None
            await registry.heartbeat(RUNNER)
            assert [s.runner.id for s in await registry.runners()] == ["a"]
        if call not in ("ping", "news"):
            wire.damage = lambda _: DAMAGE["an integer that is none"]
            with pytest.raises(Unavailable):
                await CALLS[call](registry)


async def test_no_call_ever_gets_the_answer_of_another(redis_url: str, fleet: str) -> None:
    """Some answers come twice, and from then on their connection is one answer behind."""
    chance = random.Random(1)
    async with wire_to(redis_url) as wire, Registry(wire.url, fleet, TERMS) as registry:
        await registry.heartbeat(RUNNER)
        await registry.claim(CLAIM)
        wire.damage = lambda piece: piece * 2 if chance.random() < 0.1 else piece
        heard = 0
        for n in range(60):
            with suppress(Unavailable):
                placed = await registry.place(PlacementRequest(str(n % 4), tokens=1))
                assert isinstance(placed, Placed)
                assert placed.reservation.member == str(n % 4)
                heard += 1
            with suppress(Unavailable):
                assert not await registry.claim(Lease(LeaseKind.CLAIM, "acme/x", f"{n}"))
            with suppress(Unavailable):
                assert await registry.alive("a")
        assert 20 < heard < 60


@pytest.mark.parametrize("seed", range(3))
async def test_flipped_bits_raise_nothing_else(redis_url: str, fleet: str, seed: int) -> None:
    chance = random.Random(seed)
    async with wire_to(redis_url) as wire, Registry(wire.url, fleet, TERMS) as registry:
        wire.damage = lambda piece: flipped(piece, chance) if chance.random() < 0.3 else piece
        for _ in range(60):
            with suppress(Unavailable, TimeoutError):
                async with asyncio.timeout(0.2):
                    await CALLS[chance.choice([c for c in CALLS if c != "news"])](registry)


async def test_a_router_outlasts_damaged_answers(
    redis_url: str, fleet: str, tmp_path: Path
) -> None:
    config = CONFIG | {"rms_norm_eps": 1 / int(fleet, 16)}
    async with wire_to(redis_url) as wire, Box(tmp_path, wire.url, config) as box:
        router = await box.router()
        await box.runner("a", max_batch=8)
        for rubbish in DAMAGE.values():
            met = asyncio.Event()

            def damage(_: bytes, rubbish: bytes = rubbish, met: asyncio.Event = met) -> bytes:
                met.set()
                return rubbish

            wire.damage = damage
            await asyncio.wait_for(met.wait(), 5)
        wire.damage = None
        assert not router.background.done()
        for prompt, answer in (await box.generate_many(4, 20)).items():
            assert answer.ids == expected_ids(prompt, 20)
        await box.idle()
