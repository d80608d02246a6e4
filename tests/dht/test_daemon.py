from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from dht.borrowed import Multiaddr
from dht.daemon import Daemon, DaemonConfig, Stream, encode_maddr
from dht.errors import ConfigError, Unreachable
from dht.identity import Identity

ROOT = Path(__file__).parents[2]

Alive = Callable[[int], bool]
FindDaemon = Callable[[int], int]
Eventually = Callable[..., Awaitable[None]]


@pytest.fixture
def config(tmp_path: Path) -> DaemonConfig:
    Identity.load_or_create(tmp_path / "identity")
    return DaemonConfig(identity_path=tmp_path / "identity", host_maddrs=("/ip4/127.0.0.1/tcp/0",))


@pytest.fixture
async def daemon(config: DaemonConfig) -> AsyncIterator[Daemon]:
    daemon = await Daemon.start(config)
    yield daemon
    await daemon.close()


async def test_runs_under_our_identity_in_a_private_folder(
    daemon: Daemon, config: DaemonConfig
) -> None:
    assert daemon.peer_id == Identity.load(config.identity_path).peer_id
    assert stat.S_IMODE(daemon.directory.stat().st_mode) == 0o700
    (maddr,) = await daemon.visible_maddrs()
    (listening,) = daemon.config.host_maddrs
    assert maddr == f"{listening}/p2p/{daemon.peer_id}"


async def test_close_leaves_nothing_behind_and_can_be_repeated(
    daemon: Daemon, alive: Alive, daemon_pid: FindDaemon
) -> None:
    guardian, p2pd = daemon.pid, daemon_pid(daemon.pid)
    await daemon.close()
    assert not daemon.directory.exists()
    assert not alive(guardian)
    assert not alive(p2pd)
    await daemon.close()


async def test_starts_again_at_the_same_address(daemon: Daemon) -> None:
    before = await daemon.visible_maddrs()
    await daemon.close()
    again = await Daemon.start(daemon.config)
    try:
        assert await again.visible_maddrs() == before
    finally:
        await again.close()


@pytest.mark.parametrize("victim", ["p2pd", "guardian"])
async def test_death_is_noticed_and_nothing_is_left(
    daemon: Daemon, victim: str, alive: Alive, daemon_pid: FindDaemon, eventually: Eventually
) -> None:
    p2pd = daemon_pid(daemon.pid)
    os.kill(p2pd if victim == "p2pd" else daemon.pid, signal.SIGKILL)
    async with asyncio.timeout(5):
        assert await daemon.wait_dead()
    await daemon.close()
    assert not daemon.directory.exists()
    await eventually(lambda: not alive(p2pd))
    with pytest.raises(Unreachable):
        await daemon.visible_maddrs()


async def test_calls_in_flight_fail_when_the_daemon_dies(daemon: Daemon) -> None:
    call: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    daemon.p2p._client.control._pending_calls["call"] = call
    await daemon.close()
    assert not call.cancelled()  # our callers would believe that they were cancelled themselves
    assert call.exception() is not None


async def test_port_in_use_names_the_port(config: DaemonConfig, daemon: Daemon) -> None:
    # Another libp2p daemon, which by itself would share the port without a word.
    with pytest.raises(ConfigError, match=r"port \d+ .*in use"):
        await Daemon.start(daemon.config)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        taken = f"/ip4/127.0.0.1/tcp/{port}"
        with pytest.raises(ConfigError, match=f"port {port}"):
            await Daemon.start(
                DaemonConfig(identity_path=config.identity_path, host_maddrs=(taken,))
            )


@pytest.mark.parametrize(
    "maddr", ["/ip4/203.0.113.9/tcp/0", "/ip4/127.0.0.1/tcp/70000", "127.0.0.1:4000", ""]
)
async def test_impossible_address_is_a_config_error(config: DaemonConfig, maddr: str) -> None:
    with pytest.raises(ConfigError) as caught:
        await Daemon.start(DaemonConfig(identity_path=config.identity_path, host_maddrs=(maddr,)))
    assert "\n" not in str(caught.value)


async def test_what_the_daemon_says_last_is_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        await Daemon.start(DaemonConfig(identity_path=tmp_path / "nowhere"))


async def test_long_temporary_folder_does_not_break_the_socket(
    config: DaemonConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / ("long" * 20)
    folder.mkdir()
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(folder))
    daemon = await Daemon.start(config)
    try:
        assert await daemon.visible_maddrs()
    finally:
        await daemon.close()


@pytest.fixture
async def other(tmp_path: Path) -> AsyncIterator[Daemon]:
    Identity.load_or_create(tmp_path / "other")
    config = DaemonConfig(identity_path=tmp_path / "other", host_maddrs=("/ip4/127.0.0.1/tcp/0",))
    other = await Daemon.start(config)
    yield other
    await other.close()


async def test_streams_carry_bytes_both_ways_and_name_who_opened_them(
    daemon: Daemon, other: Daemon
) -> None:
    opened: asyncio.Queue[Stream] = asyncio.Queue()
    await other.serve_streams("/test/1", opened.put_nowait)
    await daemon.connect(other.peer_id, await other.visible_maddrs(), 10)
    assert await daemon.direct_peers() == {other.peer_id}
    async with asyncio.timeout(10):
        here = await daemon.open_stream(other.peer_id, "/test/1", 10)
        there = await opened.get()
        assert (here.peer_id, there.peer_id) == (other.peer_id, daemon.peer_id)
        assert not here.circuit
        assert not there.circuit
        for one, another in ((here, there), (there, here)):
            one.writer.write(b"hello")
            assert await another.reader.readexactly(5) == b"hello"
        here.writer.close()
        assert await there.reader.read() == b""
        there.writer.close()


async def test_a_stream_that_cannot_be_opened_is_unreachable(daemon: Daemon, other: Daemon) -> None:
    nobody = Identity.generate().peer_id
    with pytest.raises(Unreachable):
        await daemon.open_stream(nobody, "/test/1", 10)
    await daemon.connect(other.peer_id, await other.visible_maddrs(), 10)
    with pytest.raises(Unreachable):
        await daemon.open_stream(other.peer_id, "/nobody/serves/this", 10)
    await other.serve_streams("/test/1", lambda stream: stream.writer.close())
    with pytest.raises(Unreachable):
        await other.serve_streams("/test/1", lambda stream: stream.writer.close())
    await other.close()
    with pytest.raises(Unreachable):
        await other.open_stream(daemon.peer_id, "/test/1", 10)
    with pytest.raises(Unreachable):
        await other.serve_streams("/test/2", lambda stream: stream.writer.close())


async def test_a_circuit_among_the_addresses_does_not_spoil_the_others(
    daemon: Daemon, other: Daemon
) -> None:
    relay = Identity.generate().peer_id
    (good,) = await other.visible_maddrs()
    circuit = f"/ip4/127.0.0.1/tcp/9/p2p/{relay}/p2p-circuit/p2p/{other.peer_id}"
    await daemon.connect(other.peer_id, (circuit, good), 10)
    assert other.peer_id in await daemon.connected()


A_PEER_ID = "12D3KooWBtg3aaRMjxwedh83aGiUkwSxDwUZkzuJcfaqUmo7R3pq"


@pytest.mark.parametrize("text", ["", "/p2p/", "/x/1", "/p2p/1", f"/ip4/1.2.3.4/p2p/0{A_PEER_ID}"])
def test_what_is_no_address_has_no_binary_form(text: str) -> None:
    assert encode_maddr(text) is None


def test_a_peer_id_within_an_address_is_a_multihash() -> None:
    maddr = f"/ip4/1.2.3.4/tcp/5/p2p/{A_PEER_ID}/p2p-circuit"
    encoded = encode_maddr(maddr)
    assert encoded is not None
    assert b"\xa5\x03\x26\x00\x24" in encoded
    assert str(Multiaddr(encoded)) == maddr


OWNER = """
import asyncio, os, signal, sys
from pathlib import Path
from dht.daemon import Daemon, DaemonConfig

# A shell starts what it runs in the background with SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

async def main():
    daemon = await Daemon.start(
        DaemonConfig(identity_path=Path(sys.argv[1]), host_maddrs=("/ip4/127.0.0.1/tcp/0",))
    )
    if sys.argv[2:] and not os.fork():
        for number in (1, 2):
            os.close(number)
        while True:
            signal.pause()
    try:
        print(daemon.pid, daemon.directory, flush=True)
        await asyncio.Future()
    finally:
        await daemon.close()

try:
    asyncio.run(main())
except KeyboardInterrupt:
    pass
"""


@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT to the whole foreground group"])
async def test_ends_with_the_process_that_owns_it(
    config: DaemonConfig,
    how: str,
    alive: Alive,
    daemon_pid: FindDaemon,
    eventually: Eventually,
) -> None:
    owner = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", "-c", OWNER, str(config.identity_path)),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    assert owner.stdout is not None
    guardian, directory = (await owner.stdout.readline()).decode().split()
    p2pd = daemon_pid(int(guardian))

    def anything_left() -> bool:
        return alive(p2pd) or alive(int(guardian)) or os.path.exists(directory)

    assert alive(p2pd)
    if how == "SIGKILL":
        owner.kill()
    else:
        os.killpg(owner.pid, signal.SIGINT)
    _, complaints = await owner.communicate()
    await eventually(lambda: not anything_left())
    assert complaints == b""


async def test_ends_though_a_process_forked_off_its_owner_lives(
    config: DaemonConfig, alive: Alive, daemon_pid: FindDaemon, eventually: Eventually
) -> None:
    owner = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", OWNER, str(config.identity_path), "fork"),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    assert owner.stdout is not None
    guardian, directory = (await owner.stdout.readline()).decode().split()
    p2pd = daemon_pid(int(guardian))
    try:
        owner.kill()
        await owner.wait()
        os.killpg(owner.pid, 0)  # the forked process is there
        await eventually(lambda: not (alive(p2pd) or os.path.exists(directory)))
        os.killpg(owner.pid, 0)
    finally:
        os.killpg(owner.pid, signal.SIGKILL)
