"""Who reduces how much of a butterfly, and who contributes how much, so that all finish together.

Peer i has an uplink u_i and a downlink d_i in bytes per second, contributes the fraction f_i of
its vector (0: nothing), receives the result (r_i = 1) or does not (0), and reduces the share s_i.
With R receivers and F = sum f, in seconds T for each byte of the encoded vector:

    minimise T   subject to   sum s_i = 1,   0 <= s_i <= 1,   s_i = 0 where i may not reduce,

        f_i (1 - s_i) + s_i (R - r_i)  <=  T u_i        it sends contributions and results
        r_i (1 - s_i) + s_i (F - f_i)  <=  T d_i        it gets results and contributions

What a peer sends to itself crosses no wire. The time t_i(s) that peer i's links need for a share s
is the larger of two lines: it falls to a valley v_i and rises from there. The valley is at 0 for
all but a sole receiver, and but for receivers of so few contributions that reducing them costs less
than getting the result. So peer i is done at T with any share in an interval that grows with T, and
whose ends move along lines with a few corners. The smallest T at which shares sum to one lies
between two neighbouring corners of all peers, found by bisection, and is read off the line between
them. That is exact, in O(n log n) for n peers.

Where a peer's own traffic takes longer than that, T is its t_i(v_i), and the shares are not settled
by T alone. The others then finish at the same earlier time, called the *pace*: a slow peer makes
nobody else's share worse, and every t_i(s_i) <= max(pace, t_i(v_i)).

**Slow peers.** T0, the pace or the time t_i(v_i) within which more than half of the contributors
and of the receivers can do their own part, whichever is longer, is what the exchange would take if
nobody waited for the rest. Who cannot do its part within the limit, `patience` * T0, contributes so
much less that it can, down to a floor: the largest f_i with which it is done at the limit. Nobody
counts on one that cannot do even that: it is tried, and left out of what comes too late. What a
peer gets cannot be cut: one whose downlink needs longer comes *late*, after a majority has
committed. `sent` says which chunks a fraction means: other ones every round, evenly spread over the
slices, so that in time every chunk gets its turn.

Guarantees: the same input gives the same bytes anywhere. Not guaranteed: that the bandwidths are
true (`bandwidth`), or that a machine is as fast as its links.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from coordinator_free.messages import Run, Slice
from coordinator_free.partition import runs_of

PATIENCE = 1.25  # an exchange may take so many times as long as it would without slow uploads
FLOOR = 1 / 16  # of its vector each contributor sends in any case: all of it in about 30 rounds

# The golden ratio in 64 bits: its multiples modulo one spread more evenly than any other number's.
GOLDEN = 0x9E3779B97F4A7C15
WORD = 1 << 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Party:
    """One peer of an exchange; one that neither contributes nor receives can still reduce.

    Attributes:
        up_bps: its uplink, bytes per second.
        down_bps: its downlink.
    """

    peer_id: str
    up_bps: float
    down_bps: float
    contributes: bool = True
    receives: bool = True
    reduces: bool = True

    def __post_init__(self) -> None:
        for bps in (self.up_bps, self.down_bps):
            if not (math.isfinite(bps) and bps > 0):
                raise ValueError(f"{self.peer_id} has a link of {bps} bytes per second")


@dataclass(frozen=True, kw_only=True, slots=True)
class Division:
    """Who does how much, in the order of the parties.

    Attributes:
        shares: of the vector, that each reduces; their sum is 1.
        fractions: of its vector, that each contributes.
        late: peers whose downlink needs longer than the others wait.
        seconds_per_byte: of the encoded vector, until all but the late are done.
    """

    shares: tuple[float, ...]
    fractions: tuple[float, ...]
    late: tuple[str, ...]
    seconds_per_byte: float


@dataclass(frozen=True, slots=True)
class _Curve:
    """Seconds per byte that one peer needs, by its share: (at none, and per share) of each link."""

    up: tuple[float, float]
    down: tuple[float, float]
    reduces: bool

    def needs(self, share: float) -> tuple[float, float]:
        """What each link needs: up, down."""
        return self.up[0] + self.up[1] * share, self.down[0] + self.down[1] * share

    def at(self, share: float) -> float:
        return max(self.needs(share))

    def corners(self) -> list[tuple[float, float]]:
        """(seconds, share) at no share, where the other link takes over, and at everything."""
        if not self.reduces:
            return [(self.at(0.0), 0.0)]
        shares = [0.0, 1.0]
        if self.up[1] != self.down[1]:
            cross = (self.down[0] - self.up[0]) / (self.up[1] - self.down[1])
            if 0 < cross < 1:
                shares.insert(1, cross)
        return [(self.at(share), share) for share in shares]

    def valley(self) -> tuple[float, float]:
        """(seconds, share) where it needs least; of several shares the smallest."""
        return min(self.corners())


def balance(
    parties: Sequence[Party], fractions: Sequence[float] | None = None
) -> tuple[float, ...]:
    """The shares with which the last one finishes as early as can be.

    Args:
        parties: at least one of each kind: contributor, receiver, reducer.
        fractions: of its vector, that each contributes; all of it unless given.

    Raises:
        ValueError: nobody contributes, receives or may reduce.
    """
    return _balance(_curves(parties, _full(parties) if fractions is None else fractions))[0]


def times(
    parties: Sequence[Party], shares: Sequence[float], fractions: Sequence[float] | None = None
) -> tuple[float, ...]:
    """When each one's links are done: seconds per byte of the encoded vector."""
    curves = _curves(parties, _full(parties) if fractions is None else fractions)
    return tuple(curve.at(share) for curve, share in zip(curves, shares, strict=True))


def divide(
    parties: Sequence[Party], *, patience: float = PATIENCE, floor: float = FLOOR
) -> Division:
    """Shares and fractions with which slow peers hold nobody up.

    Args:
        parties: as for `balance`.
        patience: at least 1.
        floor: the smallest fraction that a contributor sends; one that needs longer than the limit
            for that is not counted on, and left out of what comes too late.

    Raises:
        ValueError: nobody contributes, receives or may reduce.
    """
    full = _full(parties)
    curves = _curves(parties, full)
    shares, pace = _balance(curves)
    limit = patience * max(
        pace,
        _most(c.valley()[0] for p, c in zip(parties, curves, strict=True) if p.contributes),
        _most(c.valley()[0] for p, c in zip(parties, curves, strict=True) if p.receives),
    )
    late = [curve.needs(share)[1] > limit for curve, share in zip(curves, shares, strict=True)]
    receivers = sum(party.receives for party in parties)
    fractions = []
    for party, curve, share, whole in zip(parties, curves, shares, full, strict=True):
        if curve.needs(share)[0] > limit and whole:
            spare = limit * party.up_bps - share * (receivers - party.receives)
            fractions.append(min(1.0, max(floor, spare / (1 - share))))
        else:
            fractions.append(whole)
    if fractions != full:
        # The reducers have less to get. Who is late is so by what it receives: its share is 0.
        parties = [
            replace(party, reduces=party.reduces and not behind)
            for party, behind in zip(parties, late, strict=True)
        ]
        curves = _curves(parties, fractions)
        shares, _ = _balance(curves)
    finish = 0.0
    for curve, share, fraction, behind in zip(curves, shares, fractions, late, strict=True):
        up, down = curve.needs(share)
        # Else one tiny claim would set the time, and with it the deadline, for everybody.
        hopeless = up > limit and fraction == floor
        finish = max(finish, 0.0 if hopeless else up, 0.0 if behind else down)
    return Division(
        shares=shares,
        fractions=tuple(fractions),
        late=tuple(p.peer_id for p, behind in zip(parties, late, strict=True) if behind),
        seconds_per_byte=finish,
    )


def _most(seconds: Iterable[float]) -> float:
    """When more than half are done."""
    ordered = sorted(seconds)
    return ordered[len(ordered) // 2]


def sent(chunks: int, fraction: float, turn: int) -> tuple[Run, ...]:
    """Which chunks a contributor sends when it sends a fraction of its vector.

    Of any run of chunks it is about that fraction, so each reducer gets its part. With fractions of
    `f` or more, the same every turn or not, every chunk is sent within 2 / f turns.

    Args:
        chunks: of the vector, at least 1.
        fraction: above 0; at least one chunk is sent.
        turn: grows by one every round. Where several peers send a fraction, each adds its seat.
    """

    def place(chunk: int) -> int:
        return (chunk - turn) * GOLDEN % WORD

    chosen = [chunk for chunk in range(chunks) if place(chunk) < fraction * WORD]
    return runs_of(chosen or [min(range(chunks), key=place)])


def cut(
    parties: Sequence[Party],
    shares: Sequence[float],
    runs: Iterable[Run],
    fractions: Sequence[float] | None = None,
) -> tuple[Slice, ...]:
    """Divide runs of chunks among reducers in proportion to their shares.

    The last one is done as early as whole chunks allow. Equal peers get what `partition.share`
    gives.

    Args:
        parties: as for `balance`.
        shares: from `balance` or `divide`.
        runs: without overlap, in order; at least one.
        fractions: from `divide`.

    Returns:
        Slices in the order of their chunks. A reducer has one, unless its share spans several runs;
        one without chunks has none.
    """
    runs = list(runs)
    curves = _curves(parties, _full(parties) if fractions is None else fractions)
    counts = _whole(curves, shares, sum(run.stop - run.start for run in runs))
    stops = list(itertools.accumulate(counts, initial=0))
    slices: list[Slice] = []
    before = 0  # chunks of the runs so far
    for run in runs:
        for party, (first, last) in zip(parties, itertools.pairwise(stops), strict=True):
            start = max(run.start, run.start + first - before)
            stop = min(run.stop, run.start + last - before)
            if start < stop:
                slices.append(Slice(start=start, stop=stop, reducer=party.peer_id))
        before += run.stop - run.start
    return tuple(slices)


def _full(parties: Sequence[Party]) -> list[float]:
    return [float(party.contributes) for party in parties]


def _curves(parties: Sequence[Party], fractions: Sequence[float]) -> list[_Curve]:
    receivers, contributed = sum(party.receives for party in parties), math.fsum(fractions)
    reducers = any(party.reduces for party in parties)
    if not (receivers and contributed and reducers):
        raise ValueError("an exchange needs a contributor, a receiver and a reducer")
    curves = []
    for party, fraction in zip(parties, fractions, strict=True):
        more_up = _exact(receivers - party.receives - fraction)
        more_down = _exact(contributed - fraction - party.receives)
        curves.append(
            _Curve(
                up=(fraction / party.up_bps, more_up / party.up_bps),
                down=(party.receives / party.down_bps, more_down / party.down_bps),
                reduces=party.reduces,
            )
        )
    return curves


def _exact(traffic: float) -> float:
    """Nothing, if it differs from that by rounding errors: they must not make level curves fall."""
    return traffic if abs(traffic) > 1e-12 else 0.0


def _balance(curves: Sequence[_Curve]) -> tuple[tuple[float, ...], float]:
    """The shares, and the pace: nobody needs longer than that, unless its valley does."""
    valleys = [curve.valley() for curve in curves]
    if math.fsum(share for _, share in valleys) <= 1:
        rising = [
            [corner for corner in curve.corners() if corner[1] >= valley[1]]
            for curve, valley in zip(curves, valleys, strict=True)
        ]
        return _fill(rising)
    # Everybody would rather reduce more. The same the other way round: from no share up to the
    # valley, while the time falls.
    falling = [
        [(-seconds, share) for seconds, share in curve.corners() if share <= valley[1]]
        for curve, valley in zip(curves, valleys, strict=True)
    ]
    shares, level = _fill(falling)
    return shares, -level


def _fill(paths: Sequence[Sequence[tuple[float, float]]]) -> tuple[tuple[float, ...], float]:
    """The lowest level at which the shares sum to one, and those shares.

    Args:
        paths: for each peer its corners (level, share), neither of which ever falls. Below the
            first level it has the first share, above the last the last. Two corners of one level
            are a step, and whoever takes a step when the sum is reached takes the same part of it.
    """
    levels = sorted({level for path in paths for level, _ in path})

    def shares_at(number: int) -> list[float]:
        """At a corner's level, before its steps (an even number) or after (an odd one)."""
        return [_follow(path, levels[number // 2], number % 2 == 1) for path in paths]

    # Between two neighbours of these states every share is a straight line.
    last = 2 * len(levels) - 1
    above = bisect_left(range(last), 1.0, key=lambda number: math.fsum(shares_at(number)))
    below = max(0, above - 1)
    low, high = shares_at(below), shares_at(above)
    missing, gain = 1 - math.fsum(low), math.fsum(high) - math.fsum(low)
    part = missing / gain if gain > 0 else 0.0
    level = levels[below // 2] + part * (levels[above // 2] - levels[below // 2])
    return tuple(a + part * (b - a) for a, b in zip(low, high, strict=True)), level


def _follow(path: Sequence[tuple[float, float]], level: float, after: bool) -> float:
    passed = sum(corner[0] <= level if after else corner[0] < level for corner in path)
    if passed in (0, len(path)):
        return path[0 if passed == 0 else -1][1]
    (level_a, share_a), (level_b, share_b) = path[passed - 1], path[passed]
    return share_a + (share_b - share_a) * ((level - level_a) / (level_b - level_a))


def _whole(curves: Sequence[_Curve], shares: Sequence[float], chunks: int) -> list[int]:
    """Chunks for each, in sum `chunks`, such that the last of those who have any is done earliest.

    Rounding the running sum gives each the chunks that are less than one away from its share.
    Then chunks move from whoever is last to whoever is done earliest with one more. When that
    does not help, nothing does: a better division would have to do the same somewhere, and what it
    does there, t being convex, one chunk does in part.
    """
    slack = 1e-5  # of a chunk: more than the sums' rounding errors, less than one peer's of 4096
    stops = [int(chunks * at + slack) for at in itertools.accumulate(shares)]
    stops[-1] = chunks
    counts = [stop - start for start, stop in itertools.pairwise([0, *stops])]

    def needs(number: int, count: int) -> float:
        curve = curves[number]
        if count < 0 or (count > 0 and not curve.reduces):
            return math.inf
        seconds = curve.at(count / chunks)
        # What an idle peer needs all the same is nobody's reason to move a chunk.
        return -math.inf if count == 0 and seconds <= curve.at(1 / chunks) else seconds

    numbers = range(len(curves))
    now = [needs(number, counts[number]) for number in numbers]
    other = {step: [needs(n, counts[n] + step) for n in numbers] for step in (1, -1)}
    while True:
        last = max(numbers, key=now.__getitem__)
        step = -1 if other[-1][last] < now[last] else 1
        partner = min((n for n in numbers if n != last), key=other[-step].__getitem__, default=last)
        if max(other[step][last], other[-step][partner]) >= now[last]:
            return counts
        for number, change in ((last, step), (partner, -step)):
            counts[number] += change
            now[number] = needs(number, counts[number])
            for ahead in (1, -1):
                other[ahead][number] = needs(number, counts[number] + ahead)
