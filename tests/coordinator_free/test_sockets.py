"""Bytes over a real loopback connection, as the kernel counts them."""

from __future__ import annotations

import itertools
import socket
import sys

import pytest

from coordinator_free.sockets import Outgoing

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the others do not tell")


def look(outgoing: Outgoing) -> tuple[int, bool]:
    seen = outgoing.look()
    assert seen is not None
    return seen


def test_what_a_socket_has_merely_taken_has_not_arrived() -> None:
    outgoing = Outgoing()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)  # inherited
        sender = socket.create_connection(server.getsockname())
        receiver, _ = server.accept()
        before, full = look(outgoing)
        assert not full
        sender.setblocking(False)
        written = 0
        try:
            while True:
                written += sender.send(bytes(1 << 16))
        except BlockingIOError:
            pass
        arrived, full = look(outgoing)
        assert 0 < arrived - before < written
        assert full

        left = written
        while left:
            left -= len(receiver.recv(1 << 16))
        # The end is acknowledged only when all before it is.
        sender.shutdown(socket.SHUT_WR)
        assert receiver.recv(1) == b""
        receiver.sendall(b"x")
        sender.setblocking(True)
        assert sender.recv(1) == b"x"
        arrived, full = look(outgoing)
        assert written <= arrived - before <= written + 2
        assert not full
        sender.close()
        receiver.close()
        assert look(outgoing)[0] >= arrived


def test_sockets_that_were_closed_still_count() -> None:
    outgoing = Outgoing()
    with socket.create_server(("127.0.0.1", 0)) as server:
        totals = []
        for _ in range(3):  # each gets the numbers that the one before gave back
            with socket.create_connection(server.getsockname()) as sender:
                receiver, _ = server.accept()
                with receiver:
                    sender.sendall(bytes(1000))
                    assert len(receiver.recv(1000, socket.MSG_WAITALL)) == 1000
                    sender.shutdown(socket.SHUT_WR)
                    assert receiver.recv(1) == b""
                    receiver.sendall(b"x")
                    assert sender.recv(1) == b"x"
                    totals.append(look(outgoing)[0])
        assert all(after - before >= 1000 for before, after in itertools.pairwise(totals))
