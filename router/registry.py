"""What routers know together: live runners, reservations, the queue. Redis, and nothing durable.

`registry.lua` beside this file has the keys and every read-modify-write.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import RedisError

from granatum.router.placement import (
    Full,
    Lease,
    LeaseKind,
    Outcome,
    Placed,
    PlacementRequest,
    Queued,
    Unreachable,
)
from granatum.v1.cluster_pb2 import Runner, RunnerStatus
from granatum.v1.errors import InvalidRequest, Unavailable

_SCRIPT = Path(__file__).with_suffix(".lua").read_text(encoding="utf-8")
_TIMEOUT_S = 1.0
_RETRIES = 1
_CONNECTIONS = 32
_LEASES_PER_CALL = 500


class Registry:
    """The fleet of one base model as every router sees it; fleets share a server by fingerprint.

    Every method raises `Unavailable` while the server is away.
    """

    def __init__(
        self,
        url: str,
        fingerprint: str,
        *,
        lease_s: float = 6.0,
        runner_lease_s: float = 4.0,
        max_queue: int = 1024,
    ) -> None:
        self.lease_s = lease_s
        self._lease_ms = round(lease_s * 1000)
        self._runner_lease_ms = round(runner_lease_s * 1000)
        self._max_queue = max_queue
        self._prefix = f"{{granatum:{fingerprint}}}"
        self._redis = Redis(connection_pool=_pool(url))
        self._script = self._redis.register_script(_SCRIPT)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.aclose(close_connection_pool=True)

    async def place(self, request: PlacementRequest) -> Outcome:
        """Reserve room on the largest working set that has it, or queue in order of arrival."""
        reply = await self._run("place", json.dumps(self._placement_arguments(request)))
        kind, entry = reply[0], reply[1].decode()
        if kind == b"placed":
            runner_id, pages = reply[2].decode(), int(reply[4])
            reservation = Lease(LeaseKind.RESERVATION, runner_id, request.id, pages)
            return Placed(runner_id, reply[3].decode(), entry, reservation)
        if kind == b"full":
            return Full(int(reply[2]))
        return (Queued if kind == b"queued" else Unreachable)(entry, int(reply[2]))

    async def claim(self, lease: Lease) -> bool:
        """Take a name for its owner; False if another one holds it."""
        assert lease.kind is LeaseKind.CLAIM
        return bool(await self._run("claim", lease.name, lease.member, self._lease_ms))

    async def renew(self, leases: Iterable[Lease]) -> None:
        """Keep them for another lease; what a restarted server forgot is there again."""
        for batch in _batches(leases):
            await self._run("renew", self._lease_ms, batch)

    async def release(self, leases: Iterable[Lease]) -> None:
        """Let go of them, and tell whoever waits."""
        for batch in _batches(leases):
            await self._run("release", batch)

    async def heartbeat(self, runner: Runner) -> bool:
        """Register a runner or renew its lease; whether an operator wants it to drain."""
        figures = {
            "id": runner.id,
            "address": runner.address,
            "max_batch": runner.max_batch,
            "available_pages": runner.free_pages + runner.reclaimable_pages,
            "page_tokens": runner.page_tokens,
            "max_context": runner.max_context,
            "draining": runner.draining,
        }
        record = runner.SerializeToString()
        return bool(
            await self._run("heartbeat", self._runner_lease_ms, json.dumps(figures), record)
        )

    async def deregister(self, runner_id: str) -> None:
        """Forget a runner, and that it was to drain."""
        await self._run("deregister", runner_id)

    async def alive(self, runner_id: str) -> bool:
        """Whether a runner's lease holds."""
        return bool(await self._run("alive", runner_id))

    async def drain(self, runner_id: str) -> bool:
        """Place nothing more on a runner; False if there is none of that id."""
        return bool(await self._run("drain", runner_id))

    async def resume(self, runner_id: str) -> bool:
        """Place on a drained runner again; False if there is none of that id."""
        return bool(await self._run("resume", runner_id))

    async def runners(self) -> list[RunnerStatus]:
        """The runners whose leases hold, sorted by id."""
        statuses = []
        for record, reserved, age_ms, drain in await self._run("runners"):
            runner = Runner.FromString(record)
            runner.draining = runner.draining or bool(drain)
            statuses.append(
                RunnerStatus(runner=runner, reserved=reserved, heartbeat_age_s=age_ms / 1000)
            )
        return sorted(statuses, key=lambda status: status.runner.id)

    async def ping(self) -> None:
        """Prove that the server answers."""
        with _translated():
            await self._redis.ping()

    async def news(self) -> AsyncGenerator[None]:
        """Yield at once, and then whenever room may have come free for whoever waits."""
        with _translated():
            async with self._redis.pubsub() as subscription:
                await subscription.subscribe(f"{self._prefix}:room")
                _heed_cancellation()
                while True:
                    if await subscription.get_message(timeout=_TIMEOUT_S):
                        yield
                    _heed_cancellation()

    def _placement_arguments(self, request: PlacementRequest) -> dict[str, Any]:
        return {
            "id": request.id,
            "entry": request.entry,
            "priority": request.priority,
            "tokens": request.tokens,
            "exclude": list(request.exclude),
            "avoid": list(request.avoid),
            "lease_ms": self._lease_ms,
            "max_queue": self._max_queue,
        }

    async def _run(self, *arguments: str | int | bytes) -> Any:
        with _translated():
            return await self._script(keys=[self._prefix], args=arguments)


def _pool(url: str) -> BlockingConnectionPool:
    try:
        return BlockingConnectionPool.from_url(
            url,
            max_connections=_CONNECTIONS,
            timeout=2 * _TIMEOUT_S,
            socket_timeout=_TIMEOUT_S,
            socket_connect_timeout=_TIMEOUT_S,
            retry=Retry(ExponentialBackoff(cap=0.1, base=0.02), _RETRIES),
        )
    except ValueError:  # which quotes what may be a part of the password
        raise InvalidRequest(
            "the Redis URL cannot be read: give redis://, rediss:// or unix://, a port that is a "
            "number, and what is special in a password as %xx"
        ) from None


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
        _heed_cancellation()
    except (RedisError, OSError, TimeoutError) as error:
        _heed_cancellation()
        raise Unavailable(
            "the registry does not answer: try again, and see to the Redis server if it lasts",
            reason="REGISTRY_UNAVAILABLE",
            retry_after_s=1.0,
        ) from error


def _heed_cancellation() -> None:
    """Raise the cancellation that the Redis client takes for a failure while it connects."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _batches(leases: Iterable[Lease]) -> Iterator[str]:
    records = [{**asdict(lease), "kind": lease.kind.value} for lease in leases]
    for start in range(0, len(records), _LEASES_PER_CALL):
        yield json.dumps(records[start : start + _LEASES_PER_CALL])
