"""What is around the rounds fails: libp2p daemons, the first peer, identities, clocks."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from dht.link import Link
from tests.faults.harness import Peer, Swarm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
needs_faketime = pytest.mark.skipif(FAKETIME is None, reason="needs libfaketime (apt: faketime)")
SMALL = {"layers": 1, "start_peers": 3, "local_steps": 4}


def refused(swarm: Swarm, peer: Peer) -> str:
    """The one line with which a peer ended as a person's mistake."""
    swarm.until(lambda: not peer.alive, 60)
    assert peer.process.returncode == 2, swarm.report()
    for reader in peer.readers:
        reader.join(10)
    (line,) = [line for line in peer.errors if line.startswith("shoal ")]
    assert not peer.said("joined")
    return line


def test_the_machinery_fails_and_the_run_goes_on(swarm: Swarm) -> None:
    swarm.run_file(**SMALL)
    creator, one, two = swarm.start(3)

    # The libp2p daemon of one peer.
    (daemon,) = one.libp2p_daemons()
    os.kill(daemon, signal.SIGKILL)
    swarm.go_on([creator, one, two], rounds=2, timeout_s=60)
    swarm.until(lambda: one.libp2p_daemons() not in ([], [daemon]), 30)
    swarm.until(lambda: any("dht.daemon_restarted" in line for line in one.errors), 30)

    # The first peer, and with it the only address that the others were given.
    creator.kill()
    swarm.go_on([one, two], rounds=2, timeout_s=60)
    newcomer = swarm.join("newcomer", one.link)
    swarm.go_on([one, two, newcomer], rounds=2, timeout_s=60)
    swarm.check([one, two])

    # A link leads to the run also when who gave it has gone.
    addressed = {maddr.rpartition("/")[2] for maddr in Link.parse(newcomer.link).peers}
    ids = {peer.said("link")[0]["peer"] for peer in (one, two, newcomer)}
    assert addressed >= ids
    first = Link.parse(newcomer.link).peers[0]
    assert first.endswith(newcomer.said("link")[0]["peer"])
    newcomer.kill()
    late = swarm.join("late", newcomer.link)
    swarm.go_on([one, two, late], rounds=2, timeout_s=60)
    swarm.check([one, two])


def test_an_identity_is_used_by_one_peer_at_a_time(swarm: Swarm) -> None:
    swarm.run_file(**SMALL | {"start_peers": 2})
    creator, one = swarm.start(2)
    swarm.go_on([creator, one], rounds=1, timeout_s=30)
    # Without its checkpoints, which come and go while they are copied.
    ignored = shutil.ignore_patterns("runs")
    shutil.copytree(swarm.folder / "p1", swarm.folder / "copy", ignore=ignored)
    line = refused(swarm, swarm.join("copy", creator.link))
    assert "another peer with this identity is running at 127.0.0.1 port" in line
    assert "--home" in line
    line = refused(swarm, swarm.shoal("same", "join", creator.link, "--home", one_home(swarm)))
    assert "another daemon" in line
    swarm.go_on([creator, one], rounds=1, timeout_s=60)

    # Its own record from before a kill is still in the directory, and must not keep it out.
    one.kill()
    one.process.wait()
    again = swarm.join("again", creator.link, "--home", one_home(swarm))
    swarm.go_on([creator, again], rounds=2, timeout_s=60)
    swarm.check([creator])


def one_home(swarm: Swarm) -> str:
    return str(swarm.folder / "p1")


def clock(offset: str = "", file: Path | None = None) -> dict[str, str]:
    """The environment of a peer whose wall clock is not this machine's."""
    assert FAKETIME is not None
    return {
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_CACHE_DURATION": "1",
        **({"FAKETIME_TIMESTAMP_FILE": str(file)} if file else {"FAKETIME": offset}),
    }


@needs_faketime
def test_a_wrong_clock_is_refused_with_its_error_and_a_slightly_wrong_one_works(
    swarm: Swarm,
) -> None:
    swarm.run_file(**SMALL | {"start_peers": 2})
    creator = swarm.create()
    swarm.until(lambda: bool(creator.said("link")), 40)
    wrong = swarm.join("hours", creator.link, environment=clock("+7200s"))
    late = swarm.join("late", creator.link, environment=clock("-600s"))
    near = swarm.join("near", creator.link, environment=clock("+1.5s"))
    line = refused(swarm, wrong)
    assert "the clock of this machine is 2.0 h ahead of that of peer" in line
    assert "timedatectl" in line
    assert "the clock of this machine is 10 min behind that of peer" in refused(swarm, late)
    swarm.go_on([creator, near], rounds=2, timeout_s=90)
    swarm.check([creator, near])


@needs_faketime
def test_a_clock_that_jumps_disturbs_no_round(swarm: Swarm) -> None:
    swarm.run_file(**SMALL)
    jumping = swarm.folder / "clock"
    jumping.write_text("+0s\n")
    creator = swarm.create()
    swarm.until(lambda: bool(creator.said("link")), 40)
    one = swarm.join("p1", creator.link)
    jumper = swarm.join("jumper", creator.link, environment=clock(file=jumping))
    peers = [creator, one, jumper]
    swarm.go_on(peers, rounds=1, timeout_s=90)
    before = max(peer.last_round for peer in peers)
    # Forward only: libfaketime leaves the deadlines of futexes in fake time, so that after a step
    # back every timed wait inside gRPC is over at once and the process spins.
    jumping.write_text("+7200s\n")
    swarm.go_on(peers, rounds=5, timeout_s=60)
    swarm.check(peers)
    # Nobody was lost and taken in again: all three are in every average.
    for number in range(before + 1, min(peer.last_round for peer in peers)):
        assert creator.rounds[number]["members"] == 3
