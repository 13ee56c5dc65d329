"""A proof file: what an adapter's trainer saw, as JSON. examples/write_proof.py writes one."""

from pathlib import Path

from google.protobuf import json_format

from granatum.v1.adapters_pb2 import Proof
from granatum.v1.errors import InvalidRequest

MAX_BYTES = 4 << 20
"""16 prompts of 2,048 tokens take half of it."""
_HOW = "write it with python -m granatum.examples.write_proof"


def read_proof(path: Path) -> Proof:
    """The proof in a file; blocks. Raises InvalidRequest if it is none.

    The service checks the numbers.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InvalidRequest(f"cannot read {path} ({error.strerror}): {_HOW}") from None
    if len(data) > MAX_BYTES:
        raise InvalidRequest(
            f"{path} has more than {MAX_BYTES:,} bytes, the most of a proof: give fewer or shorter "
            "prompts"
        )
    try:
        return json_format.Parse(data, Proof())
    except (json_format.ParseError, UnicodeDecodeError, RecursionError) as error:
        why = str(error).partition("\n")[0]
        raise InvalidRequest(f"{path} is no proof ({why}): {_HOW}") from None
