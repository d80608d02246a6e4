"""What this process has sent over TCP: what has been acknowledged, not what was written.

A write is over when the socket has taken its bytes, and sockets take a lot: behind uplinks of
20 Mbit/s those to three others held 1.3 to 3.9 of an exchange's 10 MB, filled within 50 ms and once
more whenever windows grew, so that links looked up to five times as fast as they are. The kernel
knows better. gRPC does not hand out its sockets, so all of this process are asked.

Guarantees: never more than has arrived, but for part of a segment behind each gap. Not guaranteed:
anything on other systems than Linux, which say nothing here; whose bytes they are, as all that this
process sends counts; and what a tunnel's daemon on this machine holds.
"""

from __future__ import annotations

import ctypes
import socket
import struct
import sys

INFO_BYTES = 148  # of struct tcp_info, up to tcpi_notsent_bytes (Linux 4.6; SO_COOKIE: 4.12)
SO_COOKIE = 57  # a socket's own number, which no other gets
# Descriptors, at most, between one socket and the next: the lowest free one is used first.
GAP = 128
USED_BYTES = 1 << 12  # since the last look; a connection of which less arrived said small things
LISTENING = 10  # TCP_LISTEN, of which some fields mean something else


class Outgoing:
    """Counts over all TCP sockets of this process, those that were closed included."""

    def __init__(self) -> None:
        self._closed = 0
        self._acked: dict[int, int] = {}  # by cookie: descriptors are used again
        # Calls that let go of Python's lock wait up to 5 ms for it where other threads are busy.
        self._getsockopt = ctypes.PyDLL(None).getsockopt if sys.platform == "linux" else None

    def look(self) -> tuple[int, bool] | None:
        """Bytes that have arrived so far, counted from wherever, and whether the uplink is full.

        It is where bytes wait to be sent on most of the connections that are in use. Where they do
        on a few, it is their receivers that are slow.

        Returns:
            None where that cannot be known.
        """
        if self._getsockopt is None:
            return None
        found = {}
        number, stop = 0, GAP
        while number < stop:
            state = self._state(number)
            if state is not None:
                found[state[0]] = state[1]
                stop = number + GAP
            number += 1
        waiting = used = 0
        for cookie, (acked, _, unsent) in found.items():
            waiting += unsent > 0
            used += unsent > 0 or acked - self._acked.get(cookie, 0) >= USED_BYTES
        self._closed += sum(acked for cookie, acked in self._acked.items() if cookie not in found)
        self._acked = {cookie: acked for cookie, (acked, _, _) in found.items()}
        arrived = self._closed + sum(acked + beyond for acked, beyond, _ in found.values())
        # Nothing: there was no connection yet, or it is a Linux that has the fields but no counts.
        return (arrived, 2 * waiting > used) if arrived else None

    def _state(self, number: int) -> tuple[int, tuple[int, int, int]] | None:
        """Cookie; acknowledged in order, acknowledged beyond a gap, unsent. None for no connection.

        Without those beyond a gap, a lost packet would hold up the count for some round trips, and
        then let megabytes go at once.
        """
        assert self._getsockopt is not None
        info = ctypes.create_string_buffer(INFO_BYTES)
        length = ctypes.c_uint32(INFO_BYTES)
        failed = self._getsockopt(
            number, socket.IPPROTO_TCP, socket.TCP_INFO, info, ctypes.byref(length)
        )
        if failed or length.value < INFO_BYTES or info.raw[0] == LISTENING:
            return None
        cookie = ctypes.c_uint64()
        length = ctypes.c_uint32(8)
        if self._getsockopt(
            number, socket.SOL_SOCKET, SO_COOKIE, ctypes.byref(cookie), ctypes.byref(length)
        ):
            return None  # another thread has closed it
        segment_bytes, _, _, segments_beyond = struct.unpack_from("4I", info, 16)
        (acked,) = struct.unpack_from("Q", info, 120)
        (unsent,) = struct.unpack_from("I", info, 144)
        return cookie.value, (acked, segments_beyond * segment_bytes, unsent)
