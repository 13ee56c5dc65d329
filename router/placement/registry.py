"""What all routers know together: live runners, reservations, the queue. It lives in Redis.

`registry.lua` beside this file describes the keys. Every change that depends on what it reads is
made in Lua. All Lua files together are one script.
"""

import asyncio
import itertools
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import structlog
from google.protobuf.message import DecodeError
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import RedisError

from granatum.router.placement.placement import (
    Capped,
    Full,
    Lease,
    LeaseKind,
    Limited,
    Placed,
    PlacementOutcome,
    PlacementRequest,
    Queued,
    TenantFull,
    Terms,
    Unreachable,
    Unservable,
)
from granatum.v1.cluster_pb2 import Runner, RunnerStatus
from granatum.v1.errors import (
    DUPLICATE_RUNNER,
    RETRY_AFTER_S,
    InvalidRequest,
    PreconditionFailed,
    Unavailable,
)

_PARTS = ("registry", "queue", "placement", "leases", "runners")
_DISPATCH = "return {number, commands[command](unpack(ARGV, 3))}"
_SCRIPT = "\n".join(
    [
        *(Path(__file__).with_name(f"{part}.lua").read_text(encoding="utf-8") for part in _PARTS),
        _DISPATCH,
    ]
)
_TIMEOUT_S = 1.0
_RETRIES = 1
_SILENCES = 5
_CONNECTIONS = 32
_LEASES_PER_CALL = 500
_ASIDE: dict[bytes, type[Unreachable | Limited | Capped]] = {
    b"unreachable": Unreachable,
    b"limits": Limited,
    b"running": Capped,
}
_UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, DecodeError)
"""The errors that a corrupted answer raises, in the Redis client or here."""

log = structlog.get_logger(__name__)


class Registry:
    """The fleet of one base model, as every router sees it.

    Fleets may share a server: all keys begin with the model's fingerprint. Every method raises
    Unavailable while the server is away.
    """

    def __init__(self, url: str, fingerprint: str, terms: Terms) -> None:
        self.terms = terms
        self._lease_ms = round(terms.lease_s * 1000)
        self._entry_lease_ms = round(terms.entry_lease_s * 1000)
        self._runner_lease_ms = round(terms.runner_lease_s * 1000)
        self._numbers = itertools.count(1)
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

    async def place(self, request: PlacementRequest) -> PlacementOutcome:
        """Reserve room on the largest working set that has room, or queue for a turn.

        After Unavailable the same call may be made again: its effect is that of one call.
        """
        arguments = json.dumps(self._placement_arguments(request))
        async with self._answer("place", arguments) as reply:
            return self._outcome(request, reply)

    def _outcome(self, request: PlacementRequest, reply: list[Any]) -> PlacementOutcome:
        kind = reply[0]
        if kind == b"gone":
            raise Unavailable("the sequence was given up", reason="SEQUENCE_GONE")
        if kind == b"tenant_full":
            return TenantFull(self.terms.max_queued_per_tenant)
        if kind == b"unservable":
            return Unservable(int(reply[2]), int(reply[3]))
        entry = reply[1].decode()
        if kind == b"placed":
            runner_id, address, pages = reply[2].decode(), reply[3].decode(), int(reply[4])
            kept = Lease(LeaseKind.RESERVATION, runner_id, request.id, pages, request.tenant)
            return Placed(runner_id, address, entry, kept)
        if kind == b"full":
            return Full()
        if kind == b"queued":
            return Queued(entry, int(reply[2]))
        return _ASIDE[kind](entry)

    async def claim(self, lease: Lease) -> bool:
        """Take a name for its owner; False if another owner holds the name."""
        assert lease.kind is LeaseKind.CLAIM
        return await self._flag("claim", lease.name, lease.member, self._lease_ms)

    async def renew(self, leases: Iterable[Lease]) -> None:
        """Renew leases. What a restarted server forgot is there again."""
        for batch in _batches(leases):
            await self._run("renew", self._lease_ms, self._entry_lease_ms, batch)

    async def release(self, leases: Iterable[Lease]) -> None:
        """Release leases, and wake waiting sequences."""
        for batch in _batches(leases):
            await self._run("release", self._lease_ms, batch)

    async def heartbeat(self, runner: Runner) -> bool:
        """Register a runner or renew its lease; return whether an operator wants it to drain.

        Raises PreconditionFailed while another process with its id is alive.
        """
        figures = {
            "id": runner.id,
            "address": runner.address,
            "max_batch": runner.max_batch,
            "available_pages": runner.free_pages + runner.reclaimable_pages,
            "page_tokens": runner.page_tokens,
            "max_context": runner.max_context,
            "max_rank": runner.max_rank,
            "max_elements": runner.max_adapter_elements,
            "instance": runner.instance,
            "draining": runner.draining,
            "trouble": bool(runner.trouble),
        }
        record = runner.SerializeToString()
        arguments = (self._runner_lease_ms, json.dumps(figures), record)
        async with self._answer("heartbeat", *arguments) as (kind, said):
            if kind == b"duplicate":
                raise _duplicate(runner, said.decode())
            return bool(said)

    async def deregister(self, runner_id: str, instance: str = "") -> bool:
        """Forget a runner and its drain mark; False if another process has the id now."""
        return await self._flag("deregister", runner_id, instance)

    async def alive(self, runner_id: str) -> bool:
        """Whether a runner's lease holds."""
        return await self._flag("alive", runner_id)

    async def drain(self, runner_id: str) -> bool:
        """Place nothing more on a runner; False if there is none of that id."""
        return await self._flag("drain", runner_id)

    async def resume(self, runner_id: str) -> bool:
        """Place on a drained runner again; False if there is none of that id."""
        return await self._flag("resume", runner_id)

    async def runners(self) -> list[RunnerStatus]:
        """The runners whose leases hold, sorted by id."""
        async with self._answer("runners") as listed:
            statuses = [status for record in listed if (status := _status(record)) is not None]
        return sorted(statuses, key=lambda status: status.runner.id)

    async def ping(self) -> None:
        """Prove that the server answers."""
        with _translated():
            await self._redis.ping()

    async def news(self) -> AsyncGenerator[None]:
        """Yield at once, and then whenever there may be room for a waiting sequence.

        Ends after a silence, because a subscription may be lost without a word. Subscribe again.
        """
        with _translated():
            async with self._redis.pubsub() as subscription:
                await subscription.subscribe(f"{self._prefix}:room")
                _heed_cancellation()
                silences = 0
                while silences < _SILENCES:
                    silences += 1
                    if await subscription.get_message(timeout=_TIMEOUT_S):
                        silences = 0
                        yield
                    _heed_cancellation()

    def _placement_arguments(self, request: PlacementRequest) -> dict[str, Any]:
        return {
            "id": request.id,
            "entry": request.entry,
            "admitted": request.admitted,
            "priority": request.priority,
            "tokens": request.tokens,
            "avoid": list(request.avoid),
            "unreachable": list(request.unreachable),
            "tenant": request.tenant,
            "adapter": request.adapter,
            "rank": request.rank,
            "elements": request.elements,
            "lease_ms": self._lease_ms,
            "entry_ms": self._entry_lease_ms,
            "max_queue": self.terms.max_queue,
            "max_queued": self.terms.max_queued_per_tenant,
            "max_running": self.terms.max_running_per_tenant,
        }

    async def _run(self, *arguments: str | int | bytes) -> None:
        async with self._answer(*arguments):
            pass

    async def _flag(self, *arguments: str | int | bytes) -> bool:
        async with self._answer(*arguments) as flag:
            return bool(int(flag))

    @asynccontextmanager
    async def _answer(self, *arguments: str | int | bytes) -> AsyncIterator[Any]:
        """The answer of a command. If the body cannot read it, Unavailable is raised.

        After such a failure the idle connections are closed: one might still hold another call's
        answer.
        """
        with _translated():
            try:
                number = next(self._numbers)
                reply = await self._script(keys=[self._prefix], args=(number, *arguments))
                if int(reply[0]) != number:
                    raise ValueError("the answer is another call's")
                yield reply[1] if len(reply) > 1 else None
            except _UNREADABLE:
                await self._redis.connection_pool.disconnect(inuse_connections=False)
                raise


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
    except ValueError:  # its text may quote a part of the password
        raise InvalidRequest(
            "the Redis URL cannot be read: give redis://, rediss:// or unix://, a port that is a "
            "number, and what is special in a password as %xx"
        ) from None


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
        _heed_cancellation()
    except (RedisError, OSError, TimeoutError, *_UNREADABLE) as error:
        _heed_cancellation()
        if isinstance(error, _UNREADABLE):
            log.warning("the registry's answer cannot be read", error=repr(error))
        raise Unavailable(
            "the registry does not answer: try again, and see to the Redis server if it lasts",
            reason="REGISTRY_UNAVAILABLE",
            retry_after_s=RETRY_AFTER_S,
        ) from error


def _heed_cancellation() -> None:
    """Raise a pending cancellation.

    While the Redis client connects, it mistakes a cancellation for a connection failure.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _duplicate(runner: Runner, other: str) -> PreconditionFailed:
    return PreconditionFailed(
        f"two runners have the id {runner.id!r}, at {other} and at {runner.address}: give each a "
        "--runner-id of its own",
        reason=DUPLICATE_RUNNER,
    )


def _status(listed: tuple[bytes, int, int, int]) -> RunnerStatus | None:
    """A runner as the server keeps it; None if its record is damaged."""
    record, reserved, age_ms, drain = listed
    try:
        runner = Runner.FromString(record)
    except DecodeError:
        log.warning("the record of a runner cannot be read", record=record[:80])
        return None
    runner.draining = runner.draining or bool(drain)
    return RunnerStatus(runner=runner, reserved=reserved, heartbeat_age_s=age_ms / 1000)


def _batches(leases: Iterable[Lease]) -> Iterator[str]:
    records = [{**asdict(lease), "kind": lease.kind.value} for lease in leases]
    for start in range(0, len(records), _LEASES_PER_CALL):
        yield json.dumps(records[start : start + _LEASES_PER_CALL])
