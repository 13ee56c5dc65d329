"""What a reference means: the store's answer, and memory only where the store itself fails."""

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field

import pytest

from granatum.adapters_store.catalog.catalog import Visibility
from granatum.adapters_store.catalog.manifest import Manifest
from granatum.router.services import resolver as module
from granatum.router.services.resolver import Resolver
from granatum.router.streams.deadline import Deadline
from granatum.v1.errors import DeadlineExceeded, NotFound, Unavailable

PATIENT = Deadline(0.0, None)


def manifest(version: int = 1) -> Manifest:
    return Manifest(
        tenant="acme",
        name="bot",
        version=version,
        digest=f"{version:064d}",
        size_bytes=1,
        max_rank=8,
        target_modules=("q_proj",),
        create_time=0.0,
        visibility=Visibility.PUBLISHED,
        aliases=(),
        base_fingerprint="f",
    )


@dataclass
class Store:
    """Answers with `found`, or its failure, when it is not stuck."""

    found: Manifest | Exception = field(default_factory=manifest)
    stuck: bool = False

    async def resolve(self, tenant: str, ref: str) -> Manifest:
        if self.stuck:
            await asyncio.Event().wait()
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def resolver(store: Store) -> Resolver:
    return Resolver(store, patience_s=10.0)  # type: ignore[arg-type]


def due(seconds: float) -> Deadline:
    return Deadline(0.0, asyncio.get_running_loop().time() + seconds)


async def test_the_answer_has_what_placement_needs(resolver: Resolver) -> None:
    resolved = await resolver.resolve("acme", "bot", PATIENT)
    assert (resolved.name, resolved.rank) == ("acme/bot@1", 8)
    assert (await resolver.resolve("acme", "", PATIENT)).rank == 0


async def test_tiny_deadlines_of_one_tenant_change_no_answer_of_another(
    resolver: Resolver, store: Store
) -> None:
    for tenant in ("globex", "initech"):
        await resolver.resolve(tenant, "acme/bot", PATIENT)
    store.found = NotFound("unpublished")
    store.stuck = True
    for _ in range(3):
        with pytest.raises(DeadlineExceeded):
            await resolver.resolve("initech", "acme/bot", due(0.001))
    store.stuck = False
    with pytest.raises(NotFound):
        await resolver.resolve("globex", "acme/bot", PATIENT)
    # Nor does the store's later failure bring back what it has taken away.
    store.found = Unavailable("away")
    with pytest.raises(Unavailable):
        await resolver.resolve("globex", "acme/bot", PATIENT)


@pytest.mark.parametrize("how", ["fails", "is stuck"])
async def test_while_the_store_fails_memory_serves_whom_the_store_told(
    resolver: Resolver, store: Store, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ANSWER_S", 0.02)
    told = await resolver.resolve("acme", "bot", PATIENT)
    store.found, store.stuck = Unavailable("away"), how == "is stuck"
    assert await resolver.resolve("acme", "bot", PATIENT) == told
    assert await resolver.resolve("acme", "bot", due(5)) == told
    with pytest.raises((Unavailable, DeadlineExceeded)):
        await resolver.resolve("globex", "bot", due(0.05))
    with pytest.raises((Unavailable, DeadlineExceeded)):
        await resolver.resolve("acme", "bot@1", due(0.05))


async def test_memory_is_at_most_a_few_seconds_old_however_often_it_serves(
    resolver: Resolver, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MEMORY_S", 0.1)
    await resolver.resolve("acme", "bot", PATIENT)
    told = asyncio.get_running_loop().time()
    store.found = Unavailable("away")
    served = 0
    with suppress(Unavailable):
        while asyncio.get_running_loop().time() < told + 5:
            await resolver.resolve("acme", "bot", PATIENT)
            served += 1
            await asyncio.sleep(0.005)
    assert served
    assert asyncio.get_running_loop().time() < told + 1
    store.found = manifest(2)
    assert (await resolver.resolve("acme", "bot", PATIENT)).name == "acme/bot@2"


async def test_a_store_that_never_answers_is_unavailable_with_a_hint(store: Store) -> None:
    store.stuck = True
    resolver = Resolver(store, patience_s=0.02)  # type: ignore[arg-type]
    with pytest.raises(Unavailable) as away:
        await resolver.resolve("acme", "bot", PATIENT)
    assert away.value.retry_after_s
