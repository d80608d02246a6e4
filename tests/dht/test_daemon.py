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

from dht.daemon import Daemon, DaemonConfig
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


OWNER = """
import asyncio, signal, sys
from pathlib import Path
from dht.daemon import Daemon, DaemonConfig

# A shell starts what it runs in the background with SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

async def main():
    daemon = await Daemon.start(
        DaemonConfig(identity_path=Path(sys.argv[1]), host_maddrs=("/ip4/127.0.0.1/tcp/0",))
    )
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
