"""The policy of `shoal demo --chaos`, on a virtual clock."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dht.errors import ConfigError
from peer.chaos import GAP_S, MIN_PEERS, TROUBLE_S, Action, Chaos, Deed

TICK_S = 0.25


def play(
    peers: int, seed: int, minutes: float, recovers_s: float
) -> tuple[Chaos, list[tuple[float, Deed]]]:
    """Run a plan; peers come back `recovers_s` after they were mended."""
    chaos = Chaos(peers, seed, 0.0)
    done: list[tuple[float, Deed]] = []
    back: dict[int, float] = {}
    for tick in range(int(minutes * 60 / TICK_S)):
        now = tick * TICK_S
        for number in [number for number, when in back.items() if now >= when]:
            del back[number]
            chaos.recovered(number)
        for deed in chaos.due(now):
            done.append((now, deed))
            if deed.action in (Action.THAW, Action.REVIVE):
                back[deed.number] = now + recovers_s
    return chaos, done


@settings(max_examples=50, deadline=None)
@given(st.integers(MIN_PEERS, 12), st.integers(0, 2**31), st.floats(0, 60))
def test_a_majority_is_always_left_and_everybody_is_mended(
    peers: int, seed: int, recovers_s: float
) -> None:
    chaos, done = play(peers, seed, 3.0, recovers_s)
    broken: dict[int, tuple[float, Action]] = {}
    for now, deed in done:
        if deed.action in (Action.KILL, Action.FREEZE):
            assert deed.number not in broken
            broken[deed.number] = (now, deed.action)
            assert len(broken) <= (peers - 1) // 2
        else:
            since, fault = broken.pop(deed.number)
            assert (fault, deed.action) in (
                (Action.KILL, Action.REVIVE),
                (Action.FREEZE, Action.THAW),
            )
            assert TROUBLE_S[0] <= now - since <= TROUBLE_S[1] + 2 * TICK_S
    assert len(chaos.troubled) <= (peers - 1) // 2
    chaos.calm()
    mended = chaos.due(180.0)
    assert {deed.number for deed in mended} == set(broken)
    assert chaos.due(1000.0) == []


def test_whoever_has_not_come_back_is_left_in_peace() -> None:
    _, done = play(5, 3, 10.0, recovers_s=1e9)
    # Two of five may be in trouble; as they never complete a round again, nobody else is hit.
    assert len(done) == 4
    assert len({deed.number for _, deed in done}) == 2


def test_gaps_are_as_long_as_said() -> None:
    _, done = play(12, 1, 10.0, recovers_s=0.0)
    faults = [now for now, deed in done if deed.action in (Action.KILL, Action.FREEZE)]
    gaps = [after - before for before, after in itertools.pairwise(faults)]
    assert min(gaps) >= GAP_S[0] - TICK_S
    assert max(gaps) <= GAP_S[1] + 2 * TICK_S
    assert GAP_S[0] <= faults[0] <= GAP_S[1] + TICK_S


def test_a_seed_draws_the_same_faults_again_and_another_draws_others() -> None:
    assert play(6, 7, 5.0, 1.0)[1] == play(6, 7, 5.0, 1.0)[1]
    assert play(6, 7, 5.0, 1.0)[1] != play(6, 8, 5.0, 1.0)[1]


def test_everybody_is_hit_and_in_every_way() -> None:
    _, done = play(8, random.Random(0).randrange(2**31), 60.0, 3.0)
    assert {deed.number for _, deed in done} == set(range(8))
    actions = Counter(deed.action for _, deed in done)
    assert min(actions[action] for action in Action) > 100


@pytest.mark.parametrize("peers", [1, 2])
def test_too_few_peers_are_refused(peers: int) -> None:
    with pytest.raises(ConfigError, match=f"at least {MIN_PEERS} peers"):
        Chaos(peers, 0, 0.0)
