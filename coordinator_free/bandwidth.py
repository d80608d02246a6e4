"""How fast a peer's links are: what it measures of its own, and what is believed of others'.

**Measuring.** `Gauge` watches an exchange's bytes go by. A link is often idle, waiting for others,
so its speed is the best rate that any stretch of the exchange shows (Cardwell et al. 2016, BBR: a
windowed maximum of the delivery rate). A stretch begins where bytes were seen to arrive and counts
for two sampling intervals more than it lasted. One makes up for its ends, which are known only so
well; with the other, the best of many short stretches of a speed that trembles is hardly more than
its mean. So a long busy stretch is measured exactly, a short one too low by the share of two
intervals, and no steady link too high. One that is over within a few samples shows what links carry
at least. A link that is known counts as slower only when an exchange has tested it, as one that was
given little, or waited for others, moved little: an uplink while bytes waited for it, a downlink in
an exchange that took much longer than planned, neither because of the uplink nor of one of the
others. Then the new rate counts, whatever was known. A downlink shows no more than others send;
`settle` allows for that.

**Believing.** A claim is checked where it matters: by when a reducer's slice is done, and when a
contributor has sent its part. `Trust` is one member's view: of a peer that was much later than
planned, as others were not, it believes the bandwidth that it showed. While that one keeps to time
it is believed a quarter more every round; if that makes it late, the step is taken back, and the
next one waits for longer. What it claims meanwhile is no matter. `settle` takes each claim, but no
more of it than the median member believes.

Guarantees: a claim that is too high delays one exchange, and later ones by a step at most; one that
is too low costs its author alone; fewer than half of the others, saying what they like of a peer,
move no median beyond what the honest say. Not guaranteed: that a link without enough traffic is
measured at its full speed; and a leader can plan as badly as it likes for one round, believing or
not.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

UNKNOWN = 0.0
MIN_BPS, MAX_BPS = 1e3, 1e12  # no plan is made for less or more, whatever is claimed

# -- measuring --------------------------------------------------------------------------------
# Seconds that a stretch lasts at least, or half of a short exchange: in less, a bucket's burst or
# what piled up behind a lost packet looks like speed. But the first moments of an exchange can be
# the only ones in which a fast peer is not held up by slow ones.
SHORTEST_S = 0.35
MIN_SAMPLES = 4  # an exchange that is over sooner shows only what its links carry at least
MIN_BYTES = 1 << 14  # one that moved less, as where the other side is cut off, says nothing either
MAX_SAMPLES = 2048  # kept of one exchange; of a longer one every second, every fourth...
LADDER = 1.25  # stretches of every length are tried, but for this factor
STEADY = 0.5  # an exchange that used the link for this part of the time tests it

# -- believing --------------------------------------------------------------------------------
# Of the usual uplink. Who reduces nothing gets its result at half of the pace at which the others
# send: a downlink that was seen to carry so much has not been seen to be the slower of the two.
NO_SLOWER = 0.5
LATE = 1.5  # times the plan's time: more is a wrong claim, less can be chance
LATE_S = 0.25  # and at least so much more: a short exchange is late by a moment's load
RAISE = 1.25  # a round, while a peer keeps to time
RAISE_LATE = 1.1  # a raise that makes it later than this is taken back
MAX_PAUSE = 8  # rounds until the next try; twice as many after each failed one
NEVER_DONE = 1 / 16  # of what was believed is believed of one whose slice never came


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """Bytes per second each way; 0: unknown."""

    up_bps: float
    down_bps: float

    def __post_init__(self) -> None:
        for bps in (self.up_bps, self.down_bps):
            if not (math.isfinite(bps) and bps >= 0):
                raise ValueError(f"{bps} bytes per second are no bandwidth")

    def times(self, factor: float) -> Rate:
        """So many times as fast, up to `MAX_BPS`."""
        return Rate(
            up_bps=min(self.up_bps * factor, MAX_BPS), down_bps=min(self.down_bps * factor, MAX_BPS)
        )


_ANY = Rate(up_bps=UNKNOWN, down_bps=UNKNOWN)


class Gauge:
    """The speed of one peer's links, from what its exchanges moved.

    Bytes count when they have arrived: what a socket has merely taken would make the filling of its
    buffer look like speed.
    """

    def __init__(self) -> None:
        self._samples: list[tuple[float, int, int, bool | None]] = []
        self._every = 1  # only this one of so many samples is kept
        self._skipped = 0
        self._up = UNKNOWN
        self._down = UNKNOWN

    @property
    def rate(self) -> Rate:
        """What is known so far."""
        return Rate(up_bps=self._up, down_bps=self._down)

    def sample(self, now: float, up_bytes: int, down_bytes: int, full: bool | None = None) -> None:
        """What has passed by now; every 50 to 100 ms while exchanging.

        Args:
            now: seconds.
            up_bytes: that others have got, counted from wherever.
            down_bytes: that arrived here.
            full: whether bytes wait for the uplink; None where that is unknown.
        """
        if self._samples and now <= self._samples[-1][0]:
            return
        self._skipped += 1
        if self._skipped < self._every:
            return
        self._skipped = 0
        self._samples.append((now, up_bytes, down_bytes, full))
        if len(self._samples) > MAX_SAMPLES:
            del self._samples[1::2]
            self._every *= 2

    def finish(self, *, late: bool = False) -> None:
        """The exchange is over: learn from it.

        Args:
            late: it took much longer than planned, and nobody else was to blame.
        """
        samples, self._samples = self._samples, []
        self._every, self._skipped = 1, 0
        if len(samples) < MIN_SAMPLES:
            # Else only exchanges that stood still for a while would be measured, and links on which
            # most take 40 ms pass for ones of a few hundred kB/s.
            self._up = max(self._up, _throughout([(now, up) for now, up, _, _ in samples]))
            self._down = max(self._down, _throughout([(now, down) for now, _, down, _ in samples]))
            return
        up, steady_up = _measure([(now, up) for now, up, _, _ in samples])
        down, steady_down = _measure([(now, down) for now, _, down, _ in samples])
        told = [full for *_, full in samples if full is not None]
        full = sum(told) >= STEADY * len(told) if told else steady_up
        self._up = _learn(self._up, up, steady_up and full)
        self._down = _learn(self._down, down, steady_down and late and not full)


def _measure(seen: Sequence[tuple[float, int]]) -> tuple[float, bool]:
    """Of one exchange's (time, bytes so far): the best rate, and whether it was kept up."""
    (first_at, first), (last_at, last) = seen[0], seen[-1]
    best = _best_rate(seen)
    if last - first < MIN_BYTES or best == 0:
        return UNKNOWN, False
    return best, last - first >= STEADY * best * (last_at - first_at)


def _throughout(seen: Sequence[tuple[float, int]]) -> float:
    """What a short exchange's (time, bytes so far) show at least."""
    if not seen or seen[-1][1] - seen[0][1] < MIN_BYTES:
        return UNKNOWN
    # Its ends are known only so well: a message may have been almost there when it began.
    gap = max(after - before for (before, _), (after, _) in itertools.pairwise(seen))
    return (seen[-1][1] - seen[0][1]) / (seen[-1][0] - seen[0][0] + 2 * gap)


def _learn(known: float, best: float, tested: bool) -> float:
    """The new estimate: a test counts whatever was known, everything else only if it is more."""
    return best if tested and best else max(best, known)


def _best_rate(seen: Sequence[tuple[float, int]]) -> float:
    """The highest rate of a stretch, as the module's text defines it."""
    # (its sample's number, its time less two intervals)
    begins = [
        (number, 2 * before[0] - here[0])
        for number, (before, here) in enumerate(itertools.pairwise(seen), start=1)
        if here[1] > before[1]
    ]
    best = 0.0
    shortest_s = min(SHORTEST_S, (seen[-1][0] - seen[0][0]) / 2)
    length, last = 1, len(seen) - 1
    while length < last:
        for number, since in begins:
            end = number + length
            if end > last:
                break
            if seen[end][0] - seen[number][0] >= shortest_s:
                best = max(best, (seen[end][1] - seen[number][1]) / (seen[end][0] - since))
        length = max(length + 1, int(length * LADDER))
    return best


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivery:
    """How one peer kept to the plan, as one member saw it.

    Attributes:
        believed: the rate that the plan was made with.
        planned_s: when the plan's exchange is over.
        needed_s: what the peer's own links need for what it delivers here.
        took_s: when it had delivered that, less the time for which it could not because others kept
            it waiting; infinite if it never did.
    """

    believed: Rate
    planned_s: float
    needed_s: float
    took_s: float

    def __post_init__(self) -> None:
        if not (0 < self.planned_s < math.inf and self.needed_s >= 0 and self.took_s >= 0):
            raise ValueError(f"took {self.took_s} s of {self.needed_s}, planned {self.planned_s}")


@dataclass(slots=True)
class _Doubt:
    """A peer that was late once: what it has shown that it can do, and when it may try more."""

    good: Rate
    raised: bool = False  # the next plan may believe a step more
    pause: int = 1
    left: int = 1

    def wait(self) -> None:
        """A round went by and there was nothing to object to."""
        self.left = max(0, self.left - 1)
        self.raised = self.left == 0


class Trust:
    """What one member believes of the others' claims."""

    def __init__(self) -> None:
        self._doubts: dict[str, _Doubt] = {}

    @property
    def view(self) -> dict[str, Rate]:
        """The most that is believed of each peer that was late once; all others' claims are."""
        return {
            peer: doubt.good.times(RAISE) if doubt.raised else doubt.good
            for peer, doubt in self._doubts.items()
        }

    def keep(self, peers: Iterable[str]) -> None:
        """Forget all others: they are not in the roster any more."""
        known = set(peers)
        self._doubts = {peer: doubt for peer, doubt in self._doubts.items() if peer in known}

    def observe(
        self, reducers: Mapping[str, Delivery], contributors: Mapping[str, Delivery]
    ) -> bool:
        """An exchange is over.

        Args:
            reducers: whose slices came here, without this member.
            contributors: who contributed to the slices of this member, without this member.

        Returns:
            Whether one of them was later than planned, as others were not.
        """
        verdicts: dict[str, tuple[float, Delivery]] = {}
        for role in (reducers, contributors):
            for peer, delivery in role.items():
                verdict = _excess(peer, role), delivery
                if peer not in verdicts or verdicts[peer][0] < verdict[0]:
                    verdicts[peer] = verdict
        for peer, doubt in self._doubts.items():
            if peer not in verdicts:
                if doubt.raised:
                    doubt.good = doubt.good.times(RAISE)  # until it is asked for something again
                doubt.wait()
        return any([self._judge(peer, *verdict) for peer, verdict in verdicts.items()])

    def _judge(self, peer: str, excess: float, delivery: Delivery) -> bool:
        """Whether it was late."""
        doubt = self._doubts.get(peer)
        if excess > LATE and delivery.took_s * (1 - 1 / excess) > LATE_S:
            # In this time its links moved what they were to move in `needed_s`.
            used = min(1.0, delivery.needed_s / delivery.planned_s)
            shown = used / excess if math.isfinite(excess) else NEVER_DONE
            pause = doubt.pause if doubt is not None else 1
            self._doubts[peer] = _Doubt(delivery.believed.times(shown), pause=pause, left=pause)
            return True
        if doubt is not None:
            more = delivery.believed.up_bps > doubt.good.up_bps * 1.01  # than it has shown
            if more and excess > RAISE_LATE:
                doubt.raised = False
                doubt.pause = doubt.left = min(2 * doubt.pause, MAX_PAUSE)
                return False
            if more:
                doubt.good = delivery.believed
                doubt.pause, doubt.left = 1, 0
            doubt.wait()
        return False


def _excess(peer: str, role: Mapping[str, Delivery]) -> float:
    """How many times as long as planned it took, and as the others took, if those were late, too.

    Where others are late as well, it is the plan, or this member's own link.
    """
    ratios = {name: delivery.took_s / delivery.planned_s for name, delivery in role.items()}
    own = ratios.pop(peer)
    usual = max(1.0, statistics.median_high(ratios.values())) if ratios else 1.0
    return own / usual if math.isfinite(usual) else 1.0


def settle(claims: Mapping[str, Rate], views: Mapping[str, Mapping[str, Rate]]) -> dict[str, Rate]:
    """What to plan with.

    Args:
        claims: by peer.
        views: by member, what it believes of others at most; of itself it is not asked.

    Returns:
        A rate above 0 for every peer with a claim. One that is unknown is the median of the known
        ones; if none is known, all are equal, and times planned with them mean nothing. A downlink
        that carried what the others could send is at least as fast as the uplink.
    """
    ups = [claim.up_bps for claim in claims.values()]
    downs = [claim.down_bps for claim in claims.values()]
    usual_up, usual_down = _usual(ups, downs), _usual(downs, ups)
    settled = {}
    for peer, claim in claims.items():
        said = [view.get(peer, _ANY) for member, view in views.items() if member != peer]
        up_bps, down_bps = claim.up_bps or usual_up, claim.down_bps or usual_down
        if down_bps >= NO_SLOWER * usual_up:
            down_bps = max(down_bps, up_bps)
        settled[peer] = Rate(
            up_bps=_most(up_bps, [most.up_bps for most in said]),
            down_bps=_most(down_bps, [most.down_bps for most in said]),
        )
    return settled


def _most(claim: float, said: list[float]) -> float:
    """The claim, unless most say that it is less. Of two in the middle the one that says more."""
    if said:
        claim = min(claim, statistics.median_high(bps or math.inf for bps in said))
    return min(max(claim, MIN_BPS), MAX_BPS)


def _usual(rates: Iterable[float], other_way: Iterable[float]) -> float:
    """What to take for unknown; where nothing is known of a direction, it is the wider one."""
    known = [rate for rate in rates if rate > 0]
    return statistics.median(known) if known else max(other_way, default=0.0) or MIN_BPS
