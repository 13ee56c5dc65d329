"""How a sequence ended, in the words of the wire."""

from granatum.runner.records import Departure, Failure, Finish
from granatum.v1 import inference_pb2, runner_pb2
from granatum.v1.runner_pb2 import SequenceFailure, SequenceOutput

_FINISHED = {
    Finish.STOP: inference_pb2.FINISH_REASON_STOP,
    Finish.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}
_DEPARTED = {
    Departure.REFUSED: runner_pb2.DEPARTURE_REFUSED,
    Departure.EVICTED: runner_pb2.DEPARTURE_EVICTED,
    Departure.DRAINED: runner_pb2.DEPARTURE_DRAINED,
    Departure.ENGINE_LOST: runner_pb2.DEPARTURE_ENGINE_LOST,
    Departure.SUSPECTED: runner_pb2.DEPARTURE_SUSPECTED,
    Departure.BLAMED: runner_pb2.DEPARTURE_BLAMED,
    Departure.LOAD_FAILED: runner_pb2.DEPARTURE_LOAD_FAILED,
}


def set_outcome(
    output: SequenceOutput, outcome: Finish | Departure | Failure, cause: Failure | None = None
) -> None:
    """Write an outcome into a sequence's last output, with the cause of a departure."""
    match outcome:
        case Finish():
            output.finished = _FINISHED[outcome]
        case Departure():
            output.departed = _DEPARTED[outcome]
        case Failure():
            output.failed.CopyFrom(_message_of(outcome))
    if cause is not None:
        output.cause.CopyFrom(_message_of(cause))


def _message_of(failure: Failure) -> SequenceFailure:
    return SequenceFailure(
        code=failure.code, message=failure.message, reason=failure.reason, field=failure.field
    )
