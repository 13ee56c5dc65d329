"""The flight recorder across processes: what was begun outlives whoever began it."""

import multiprocessing
import os
import signal

from granatum.runner.engine.flight_recorder import FlightRecorder


def begin_and_die(recorder: FlightRecorder) -> None:
    recorder.begin([1, 2, 3])
    recorder.begin([2**62, 2])
    recorder.end()
    recorder.begin([7, 2])
    os.kill(os.getpid(), signal.SIGKILL)


def test_steps_in_flight_are_there_after_a_death() -> None:
    recorder = FlightRecorder(3)
    assert recorder.read() == ()
    process = multiprocessing.get_context("spawn").Process(target=begin_and_die, args=(recorder,))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert set(recorder.read()) == {2**62, 2, 7}
    assert len(recorder.read()) == 3


def test_what_has_ended_is_not_named() -> None:
    recorder = FlightRecorder(2)
    for number in range(5):
        recorder.begin([number, number + 10])
        assert set(recorder.read()) == {number, number + 10}
        recorder.end()
        assert recorder.read() == ()
