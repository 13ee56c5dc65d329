"""The flight recorder across processes: what was noted outlives whoever noted it."""

import multiprocessing
import os
import signal

from granatum.runner.flight_recorder import FlightRecorder


def note_and_die(recorder: FlightRecorder) -> None:
    recorder.note([1, 2, 3])
    recorder.note((2**62, 7))
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_was_noted_is_there_after_a_death() -> None:
    recorder = FlightRecorder(2)
    assert recorder.read() == ()
    process = multiprocessing.get_context("spawn").Process(target=note_and_die, args=(recorder,))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert recorder.read() == (2**62, 7)
    recorder.clear()
    assert recorder.read() == ()


def test_more_than_fit_are_cut() -> None:
    recorder = FlightRecorder(2)
    recorder.note(range(9))
    assert recorder.read() == (0, 1, 2, 3)
