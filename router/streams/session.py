"""One bidirectional stream to each runner carries all of this router's sequences on it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import grpc
import structlog

from granatum.router.streams.remote_sequence import RemoteSequence, SessionLost
from granatum.v1.errors import Unavailable
from granatum.v1.runner_pb2 import (
    CancelSequence,
    Ping,
    SequenceOutput,
    SessionRequest,
    SubmitSequence,
)
from granatum.v1.runner_pb2_grpc import RunnerServiceStub
from granatum.v1.transport import bearer

_CONNECT_S = 3.0
_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 2.0
_PINGS_PER_SILENCE = 5
"""Silence ends a session only after this many pings."""
_PING_S = 1.0
"""The most seconds between two pings. A runner gives up a router that is silent for 10 s."""

Connect = Callable[[str], grpc.aio.Channel]

log = structlog.get_logger(__name__)


class RunnerSession:
    """One life of the stream to one runner.

    The runner speaks at least once a second. After `silence_s` seconds of silence the link or the
    runner is taken for dead. No other timeout would notice as soon.
    """

    def __init__(
        self, address: str, channel: grpc.aio.Channel, cluster_key: str, silence_s: float
    ) -> None:
        self.address = address
        self.reached = False
        self.closing = False
        """The session takes no more sequences."""
        self.retired = False
        """The session closes with the end of its last sequence."""
        self._channel = channel
        self._cluster_key = cluster_key
        self._ping_s = min(_PING_S, silence_s / _PINGS_PER_SILENCE)
        self._pings = round(silence_s / self._ping_s)
        self._unanswered = 0
        self._broken = False
        self._commands: asyncio.Queue[SessionRequest | int | None] = asyncio.Queue()
        self._unsent: dict[int, SubmitSequence] = {}
        """Submissions by their numbers in the queue. A cancelled one is deleted here at once."""
        self._sequences: dict[int, RemoteSequence] = {}
        self._next_id = 1

    def submit(self, submission: SubmitSequence, release: Callable[[], None]) -> RemoteSequence:
        """Set the sequence's `sequence_id` and send the sequence. `release` gives its room back."""
        assert not self.closing
        self.retired = False
        number = submission.sequence_id = self._next_id
        self._next_id += 1
        sequence = RemoteSequence(lambda: self.cancel(number), release)
        self._sequences[number] = sequence
        self._unsent[number] = submission
        self._commands.put_nowait(number)
        return sequence

    def cancel(self, sequence_id: int) -> None:
        """End a sequence on the runner. After the sequence's end this does nothing."""
        if self._sequences.pop(sequence_id, None) is not None:
            if self._unsent.pop(sequence_id, None) is None:
                cancel = CancelSequence(sequence_id=sequence_id)
                self._commands.put_nowait(SessionRequest(cancel=cancel))
            self._close_if_done()

    def retire(self) -> None:
        """Close once all sequences are over, unless one more is submitted before."""
        self.retired = True
        self._close_if_done()

    async def run(self) -> None:
        """Carry commands and news until the session breaks or is retired and done."""
        try:
            async with asyncio.timeout(_CONNECT_S):
                await _connected(self._channel)
            self.reached = True
            await self._converse()
            log.info("session over", address=self.address)
        except grpc.aio.AioRpcError as error:
            self._broken = True
            code, details = error.code().name, error.details()
            log.warning("session broken", address=self.address, code=code, details=details)
        except (ConnectionError, TimeoutError):
            event = "runner fell silent" if self.reached else "runner out of reach"
            log.warning(event, address=self.address)
        finally:
            self.closing = True
            self._lose_all()
            self._commands.put_nowait(None)
            await self._channel.close()

    async def _converse(self) -> None:
        stub = RunnerServiceStub(self._channel)
        async with asyncio.timeout(None) as silence:
            pings = asyncio.create_task(self._ping(silence))
            try:
                metadata = bearer(self._cluster_key)
                async for response in stub.Session(self._outgoing(), metadata=metadata):
                    self._unanswered = 0
                    for output in response.outputs:
                        self._deliver(output)
            finally:
                pings.cancel()
                await asyncio.gather(pings, return_exceptions=True)

    async def _ping(self, silence: asyncio.Timeout) -> None:
        """Send pings, and end the session after too many without an answer.

        Pings are counted, not seconds. If this process itself stood still, the runner's answers may
        have come and lie unread.
        """
        while self._unanswered < self._pings:
            self._unanswered += 1
            self._commands.put_nowait(SessionRequest(ping=Ping()))
            await asyncio.sleep(self._ping_s)
        silence.reschedule(0)

    async def _outgoing(self) -> AsyncIterator[SessionRequest]:
        while (command := await self._commands.get()) is not None:
            if isinstance(command, SessionRequest):
                yield command
            elif (submission := self._unsent.pop(command, None)) is not None:
                yield SessionRequest(submit=submission)

    def _deliver(self, output: SequenceOutput) -> None:
        over = output.WhichOneof("outcome") is not None
        take = self._sequences.pop if over else self._sequences.get
        sequence = take(output.sequence_id, None)
        if sequence is not None:
            sequence.deliver(output, over=over)
        if over:
            self._close_if_done()

    def _close_if_done(self) -> None:
        if self.retired and not self._sequences and not self.closing:
            self.closing = True
            self._commands.put_nowait(None)

    def _lose_all(self) -> None:
        self._unsent.clear()
        sequences, self._sequences = self._sequences, {}
        alone = self._broken and len(sequences) == 1
        for sequence in sequences.values():
            sequence.lose(SessionLost(alone=alone))


async def _connected(channel: grpc.aio.Channel) -> None:
    """Wait for the connection. Raises ConnectionError as soon as the first attempt fails."""
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


class RunnerSessions:
    """The sessions to all runners. The first sequence for a runner opens the session.

    A runner that comes back at another address gets a new session. The session to the old address
    ends with its sequences.
    """

    def __init__(self, connect: Connect, cluster_key: str, silence_s: float) -> None:
        self._connect = connect
        self._cluster_key = cluster_key
        self._silence_s = silence_s
        self._open: dict[str, dict[str, RunnerSession]] = {}  # by runner and address
        self._troubles: dict[str, _Trouble] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def submit(
        self,
        runner_id: str,
        address: str,
        submission: SubmitSequence,
        release: Callable[[], None],
    ) -> RemoteSequence:
        """Send a sequence to a runner. `release` gives its room on the runner back.

        Raises Unavailable if no channel to the runner can be made.
        """
        session = self._open.get(runner_id, {}).get(address)
        if session is None or session.closing:
            session = self._start(runner_id, address)
        for other in self._open[runner_id].values():
            if other is not session:
                other.retire()
        return session.submit(submission, release)

    def unreachable(self) -> set[str]:
        """The runners that lost their session a moment ago."""
        now = asyncio.get_running_loop().time()
        return {runner_id for runner_id, t in self._troubles.items() if t.until > now}

    async def close(self) -> None:
        """Break every session."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, runner_id: str, address: str) -> RunnerSession:
        try:
            channel = self._connect(address)
        except Exception as error:
            log.error("no channel to a runner", runner=runner_id, address=address, error=str(error))
            self._note_trouble(runner_id, reached=False)
            raise Unavailable(
                "this router can open no link to a runner, and its log says why: try again later, "
                "or another router",
                reason="NO_LINK",
                retry_after_s=_LONGEST_PAUSE_S,
            ) from None
        session = RunnerSession(address, channel, self._cluster_key, self._silence_s)
        self._open.setdefault(runner_id, {})[address] = session
        task = asyncio.create_task(self._serve(runner_id, session), name=f"session {runner_id}")
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return session

    async def _serve(self, runner_id: str, session: RunnerSession) -> None:
        try:
            await session.run()
        finally:
            self._forget(runner_id, session)
            if not session.retired:
                self._note_trouble(runner_id, reached=session.reached)

    def _forget(self, runner_id: str, session: RunnerSession) -> None:
        sessions = self._open.get(runner_id, {})
        if sessions.get(session.address) is session:
            del sessions[session.address]
        if not sessions:
            self._open.pop(runner_id, None)

    def _note_trouble(self, runner_id: str, *, reached: bool) -> None:
        """Avoid the runner for a moment, twice as long after each vain attempt to connect."""
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
