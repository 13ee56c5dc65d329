"""What a process notes is read after its end, whatever the end was."""

import multiprocessing
import os
import signal

from granatum.runner.flight_recorder import FlightRecorder


def note_and_die(recorder: FlightRecorder) -> None:
    recorder.note([1])
    recorder.clear()
    recorder.note(range(2**40, 2**40 + 3))
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_was_noted_outlives_the_process() -> None:
    recorder = FlightRecorder()
    assert recorder.read() == ()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=note_and_die, args=(recorder,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert recorder.read() == (2**40, 2**40 + 1, 2**40 + 2)
    recorder.clear()
    assert recorder.read() == ()
