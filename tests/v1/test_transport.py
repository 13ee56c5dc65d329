"""How an address is told to others."""

import socket

from granatum.v1.transport import reachable


def test_others_are_told_a_name_where_every_address_is_listened_on() -> None:
    assert reachable("127.0.0.1:7070") == "127.0.0.1:7070"
    assert reachable("0.0.0.0:7070") == reachable("[::]:7070") == f"{socket.gethostname()}:7070"
