from __future__ import annotations

import asyncio
import dataclasses
import http.client
from collections.abc import AsyncIterator

import pytest

from peer.control import ControlServer, ask_status, ask_stop
from peer.homes import DaemonFile
from peer.status import Status

STATUS = Status(run="ab" * 20, name="n", peer="12D3KooW", pid=1, phase="train", val_loss=2.5)


@pytest.fixture
async def server() -> AsyncIterator[tuple[ControlServer, DaemonFile, list[str]]]:
    stops: list[str] = []
    control = ControlServer(lambda: STATUS, lambda: stops.append("stop"))
    await control.start()
    yield control, DaemonFile(pid=1, port=control.port, token=control.token, run=""), stops
    await control.close()


async def test_status_and_stop(server: tuple[ControlServer, DaemonFile, list[str]]) -> None:
    _, daemon, stops = server
    assert await asyncio.to_thread(ask_status, daemon) == STATUS
    assert await asyncio.to_thread(ask_stop, daemon)
    assert stops == ["stop"]


async def test_a_wrong_token_learns_and_stops_nothing(
    server: tuple[ControlServer, DaemonFile, list[str]],
) -> None:
    _, daemon, stops = server
    for token in ("", "x", daemon.token + "x", "\xfc", "\u20ac", "a\nb"):
        stranger = dataclasses.replace(daemon, token=token)
        assert await asyncio.to_thread(ask_status, stranger) is None
        assert not await asyncio.to_thread(ask_stop, stranger)
    assert stops == []


async def test_a_request_without_a_token_is_refused(
    server: tuple[ControlServer, DaemonFile, list[str]],
) -> None:
    _, daemon, _ = server

    def ask() -> int:
        connection = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=5)
        connection.request("GET", "/status")
        reply = connection.getresponse()
        reply.read()
        connection.close()
        return reply.status

    assert await asyncio.to_thread(ask) == 401


async def test_nobody_answers_after_the_end() -> None:
    control = ControlServer(lambda: STATUS, lambda: None)
    await control.start()
    daemon = DaemonFile(pid=1, port=control.port, token=control.token, run="")
    await control.close()
    assert await asyncio.to_thread(ask_status, daemon) is None
    assert not await asyncio.to_thread(ask_stop, daemon)


async def test_a_port_that_is_none_answers_nothing() -> None:
    daemon = DaemonFile(pid=1, port=65536, token="t", run="")
    assert await asyncio.to_thread(ask_status, daemon) is None
    assert not await asyncio.to_thread(ask_stop, daemon)


def test_status_survives_the_trip_and_newer_fields() -> None:
    assert Status.from_dict({**STATUS.to_dict(), "new": 1}) == STATUS


@pytest.mark.parametrize("field", ["round", "peer", "tokens_per_s", "val_loss"])
def test_a_status_with_a_wrong_field_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        Status.from_dict({**STATUS.to_dict(), field: ["x"]})
