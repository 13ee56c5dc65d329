"""Hostile inputs on every public RPC, while innocent streams run beside them.

GRANATUM_FUZZ_EXAMPLES sets how many inputs are tried. Beyond the number that CI tries, they are
drawn anew in each run.
"""

import asyncio
import os
import threading
from collections import Counter
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import grpc
import psutil
import pytest
from cluster import Cluster
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hostile_inputs import inputs
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from wire_inputs import Input

from granatum.client.client import Client
from granatum.examples.tasks import ADAPTER_TASKS
from granatum.v1.transport import bearer

IN_CI = 2_000
EXAMPLES = int(os.environ.get("GRANATUM_FUZZ_EXAMPLES", str(IN_CI)))
AT_ONCE = 5
INNOCENTS = 3
TOKENS = 40
ENOUGH = 3
"""Messages of a stream that are read before it is cancelled."""
STATUS = grpc.StatusCode
REFUSALS = {STATUS.INVALID_ARGUMENT, STATUS.RESOURCE_EXHAUSTED}
SANE = REFUSALS | {
    STATUS.OK,
    STATUS.NOT_FOUND,
    STATUS.ALREADY_EXISTS,
    STATUS.FAILED_PRECONDITION,
    STATUS.PERMISSION_DENIED,
    STATUS.DEADLINE_EXCEEDED,
}
NO_MESSAGE = "the message is no granatum.v1."
"""Where a message cannot be read, no field of it can be named."""

pytestmark = [pytest.mark.system, pytest.mark.timeout(600 + EXAMPLES)]

T = TypeVar("T")


class Loop:
    """An event loop in a thread, so that Hypothesis, which knows no asyncio, can drive it."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], timeout: float = 120) -> T:
        """What `work` returns."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout)

    def close(self) -> None:
        """End the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


class Innocents:
    """Streams of another tenant that must never notice."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._tasks: list[asyncio.Task[None]] = []
        self.rounds = 0

    async def start(self) -> None:
        """Learn what undisturbed streams say, then repeat them without end."""
        for task in ADAPTER_TASKS[:INNOCENTS]:
            await self._client.upload(task.name, task.path)
        truth = [await self._stream(number) for number in range(INNOCENTS)]
        self._tasks = [
            asyncio.create_task(self._repeat(number, expected))
            for number, expected in enumerate(truth)
        ]

    async def check(self) -> None:
        """Raise what one of them raised."""
        for task in self._tasks:
            if task.done():
                await task

    async def stop(self) -> None:
        """Let them end."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _repeat(self, number: int, expected: list[int]) -> None:
        while True:
            assert await self._stream(number) == expected
            self.rounds += 1

    async def _stream(self, number: int) -> list[int]:
        generation = self._client.generate(
            "granite>",
            adapter=ADAPTER_TASKS[number].name,
            max_tokens=TOKENS,
            ignore_eos=True,
            temperature=0.8 if number else 0.0,
            seed=number,
            timeout=100,
        )
        return [token.id async for token in generation]


class Attacker:
    """Sends inputs and judges the answers."""

    def __init__(self, address: str, tenant: str, admin: str) -> None:
        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        self._channel = grpc.aio.insecure_channel(address, options=options)
        self._keys = {False: bearer(tenant), True: bearer(admin)}
        self.answers: Counter[str] = Counter()
        self.faults: dict[str, str] = {}

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close()

    async def attack(self, batch: list[Input]) -> None:
        """Send them all at once, and note what is wrong with the answers."""
        for found in await asyncio.gather(*(self._fault(one) for one in batch)):
            if found:
                self.faults[found[0]] = found[1]

    async def _fault(self, sent: Input) -> tuple[str, str] | None:
        """What is wrong with the answer, in brief and in full; None if it is a sane one."""
        code, field, text = await self._answer(sent)
        self.answers[f"{sent.method.partition('/')[2]} {code.name}"] += 1
        refused = code in REFUSALS
        named = code is not STATUS.INVALID_ARGUMENT or bool(field) or text.startswith(NO_MESSAGE)
        if sent.wrong:
            blames = code is not STATUS.INVALID_ARGUMENT or field.startswith(tuple(sent.wrong))
            fine = refused and blames
        elif sent.wrong is None:
            fine = code in SANE and named
        else:
            fine = code in (STATUS.OK, STATUS.RESOURCE_EXHAUSTED, STATUS.DEADLINE_EXCEEDED)
        brief = f"{sent.method} {sent.wrong and sorted(sent.wrong)} {code.name} {field!r}"
        return None if fine else (brief, f"{text}\n  {sent}")

    async def _answer(self, sent: Input) -> tuple[grpc.StatusCode, str, str]:
        method = f"/granatum.v1.{sent.method}"
        metadata = self._keys[sent.as_admin]
        call: Any = self._channel.stream_stream(method)(
            iter_of(sent.messages), metadata=metadata, timeout=30
        )
        read = 0
        try:
            async for _ in call:
                read += 1
                if read == ENOUGH:
                    call.cancel()
                    return STATUS.OK, "", ""
        except grpc.aio.AioRpcError as error:
            return error.code(), field_of(error), error.details() or ""
        return await call.code(), "", ""


async def iter_of(messages: tuple[bytes, ...]) -> Any:
    for message in messages:
        yield message


def field_of(error: grpc.aio.AioRpcError) -> str:
    """The field that a rich status names, or nothing."""
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            for detail in rpc_status.status_pb2.Status.FromString(value).details:
                bad = error_details_pb2.BadRequest()
                if detail.Unpack(bad) and bad.field_violations:
                    return str(bad.field_violations[0].field)
    return ""


@contextmanager
def loop() -> Iterator[Loop]:
    running = Loop()
    try:
        yield running
    finally:
        running.close()


def processes(cluster: Cluster) -> set[tuple[int, float]]:
    """Every process of the cluster with the time of its start, children included."""
    found = set()
    for process in cluster.processes:
        parent = psutil.Process(process.pid)
        for one in (parent, *parent.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                found.add((one.pid, one.create_time()))
    return found


def test_no_input_ends_a_process_or_touches_a_neighbour(cluster: Cluster) -> None:
    hostile, innocent = cluster.tenant_key("acme"), cluster.tenant_key("globex")
    admin = cluster.admin_key()
    cluster.start_router()
    cluster.start_runner()
    with loop() as running:
        running.run(cluster.runners_alive(admin, 1))

        async def begin() -> tuple[Attacker, Innocents]:
            return (
                Attacker(cluster.addresses["router-0"], hostile, admin),
                Innocents(cluster.client(innocent)),
            )

        attacker, innocents = running.run(begin())
        running.run(innocents.start())
        before = processes(cluster)

        @settings(
            max_examples=EXAMPLES // AT_ONCE,
            deadline=None,
            database=None,
            derandomize=EXAMPLES <= IN_CI,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.lists(inputs(), min_size=AT_ONCE, max_size=AT_ONCE))
        def attack(batch: list[Input]) -> None:
            running.run(attacker.attack(batch))
            running.run(innocents.check())

        try:
            attack()
            print(*sorted(attacker.answers.items()), innocents.rounds, sep="\n")
            assert not attacker.faults, "\n".join(map(": ".join, attacker.faults.items()))
            assert innocents.rounds >= INNOCENTS
            assert before <= processes(cluster)
        finally:
            running.run(innocents.stop())
            running.run(attacker.close())
    assert attacker.answers.total() >= EXAMPLES // AT_ONCE * AT_ONCE
