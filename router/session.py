"""One bidirectional stream to each runner carries all of this router's sequences on it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import grpc
import structlog

from granatum.router.remote_sequence import RemoteSequence, SessionLost
from granatum.v1.runner_pb2 import (
    CancelSequence,
    SequenceOutput,
    SessionRequest,
    SubmitSequence,
)
from granatum.v1.runner_pb2_grpc import RunnerServiceStub
from granatum.v1.transport import bearer

_CONNECT_S = 3.0
_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 2.0

Connect = Callable[[str], grpc.aio.Channel]

log = structlog.get_logger(__name__)


class Session:
    """One life of the stream to one runner."""

    def __init__(self, address: str, channel: grpc.aio.Channel, cluster_key: str) -> None:
        self.address = address
        self.reached = False
        self._channel = channel
        self._cluster_key = cluster_key
        self._commands: asyncio.Queue[SessionRequest | None] = asyncio.Queue()
        self._sequences: dict[int, RemoteSequence] = {}
        self._next_id = 1

    def submit(self, submission: SubmitSequence) -> RemoteSequence:
        """Send a sequence; its `sequence_id` is set here."""
        number = submission.sequence_id = self._next_id
        self._next_id += 1
        sequence = self._sequences[number] = RemoteSequence(lambda: self.cancel(number))
        self._commands.put_nowait(SessionRequest(submit=submission))
        return sequence

    def cancel(self, sequence_id: int) -> None:
        """End a sequence on the runner, if it is not over."""
        if self._sequences.pop(sequence_id, None) is not None:
            cancel = CancelSequence(sequence_id=sequence_id)
            self._commands.put_nowait(SessionRequest(cancel=cancel))

    async def run(self) -> None:
        """Carry commands and news until the session breaks."""
        try:
            async with asyncio.timeout(_CONNECT_S):
                await _connected(self._channel)
            self.reached = True
            stub = RunnerServiceStub(self._channel)
            metadata = bearer(self._cluster_key)
            async for response in stub.Session(self._outgoing(), metadata=metadata):
                for output in response.outputs:
                    self._deliver(output)
            log.info("session ended by the runner", address=self.address)
        except grpc.aio.AioRpcError as error:
            code, details = error.code().name, error.details()
            log.warning("session broken", address=self.address, code=code, details=details)
        except (ConnectionError, TimeoutError):
            log.warning("runner out of reach", address=self.address)
        finally:
            self._lose_all()
            self._commands.put_nowait(None)
            await self._channel.close()

    async def _outgoing(self) -> AsyncIterator[SessionRequest]:
        while (command := await self._commands.get()) is not None:
            yield command

    def _deliver(self, output: SequenceOutput) -> None:
        over = output.WhichOneof("outcome") is not None
        take = self._sequences.pop if over else self._sequences.get
        sequence = take(output.sequence_id, None)
        if sequence is not None:
            sequence.deliver(output)

    def _lose_all(self) -> None:
        sequences, self._sequences = self._sequences, {}
        for sequence in sequences.values():
            sequence.lose(SessionLost(reached=self.reached))


async def _connected(channel: grpc.aio.Channel) -> None:
    """Wait for the connection; ConnectionError as soon as the first attempt fails."""
    state = channel.get_state(try_to_connect=True)
    while state is not grpc.ChannelConnectivity.READY:
        if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
            raise ConnectionError
        await channel.wait_for_state_change(state)
        state = channel.get_state(try_to_connect=True)


@dataclass(slots=True)
class _Trouble:
    pause_s: float
    until: float


class Sessions:
    """The sessions to all runners, opened by the first sequence that goes there."""

    def __init__(self, connect: Connect, cluster_key: str) -> None:
        self._connect = connect
        self._cluster_key = cluster_key
        self._open: dict[str, Session] = {}
        self._troubles: dict[str, _Trouble] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def submit(self, runner_id: str, address: str, submission: SubmitSequence) -> RemoteSequence:
        """Send a sequence to a runner."""
        session = self._open.get(runner_id)
        if session is None or session.address != address:
            session = self._start(runner_id, address)
        return session.submit(submission)

    def unreachable(self) -> set[str]:
        """Runners whose session broke a moment ago."""
        now = asyncio.get_running_loop().time()
        return {runner_id for runner_id, t in self._troubles.items() if t.until > now}

    async def close(self) -> None:
        """Break every session."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, runner_id: str, address: str) -> Session:
        session = Session(address, self._connect(address), self._cluster_key)
        self._open[runner_id] = session
        task = asyncio.create_task(self._serve(runner_id, session), name=f"session {runner_id}")
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return session

    async def _serve(self, runner_id: str, session: Session) -> None:
        try:
            await session.run()
        finally:
            if self._open.get(runner_id) is session:
                del self._open[runner_id]
                self._note_trouble(runner_id, reached=session.reached)

    def _note_trouble(self, runner_id: str, *, reached: bool) -> None:
        """Stay away for a moment, twice as long after each vain attempt to connect."""
        now = asyncio.get_running_loop().time()
        before = self._troubles.get(runner_id)
        vain = before is not None and not reached
        pause = min(2 * before.pause_s, _LONGEST_PAUSE_S) if before and vain else _FIRST_PAUSE_S
        self._troubles = {k: t for k, t in self._troubles.items() if t.until + 60 > now}
        self._troubles[runner_id] = _Trouble(pause, now + pause)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("session failed", exc_info=error)
