"""What an exchange should look like, given what is known of everybody's links.

Pure arithmetic between the leader, which knows who is ready and what they say of their links, and
`shares`, which divides. A leader is free to plan otherwise: members check that a plan is possible
(`Machine.sound`), not that it is good.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from coordinator_free.bandwidth import MIN_BPS, Delivery, Rate, settle
from coordinator_free.codecs import codec
from coordinator_free.config import Layout, RoundConfig
from coordinator_free.messages import WHOLE, Contribution, Plan, Run, Slice, View
from coordinator_free.partition import chunk_elements
from coordinator_free.shares import Division, Party, balance, cut, divide, sent, times

CHUNKS_EACH = 8  # of each reducer, at least: sending, summing and sending back overlap
# The links stand still while the last chunk is summed and sent back: for 16 ms with so many of each
# reducer. What a chunk costs a machine besides its bytes is then the same share of its time.
CHUNKS_A_SECOND = 64
CHUNKS_EACH_SLOW = 256  # of each reducer, at most
# A shorter exchange is over before links are measured well, and what limits it is rather how busy
# the machines are: then all get the same, in chunks that cost little besides their bytes.
FINE_S = 0.5
# Bytes per second. Links that are faster than this are planned for as if equal; where all are, it
# is the machines that take the time, and what a chunk costs them besides its bytes counts.
FAST_BPS = 60e6
FAST_CHUNK = 1 << 20  # bytes; smaller ones cost the machines more than a finer overlap saves
LEAST_CHUNKS = 2  # of each reducer: while one is added up, the other is on its way
# Links that differ from the usual by less than this factor count as usual: uplinks are measured to
# a tenth, downlinks worse. More than `bandwidth.RAISE`, with which a peer that was late once would
# otherwise be given a part of the others' work whenever it is tried again.
ALIKE = 1.3
SMALLEST_CHUNK = 1 << 14  # bytes; what a message costs beside them is half a percent of it
WORTH_S = 2.0  # an exchange that is over sooner is not worth leaving anything out of

DEADLINE_FLOOR_S = 15.0
DEADLINE_SHARE = 4.0  # the deadline, in times of what the exchange should take
DEADLINE_STRETCH = 10.0  # on slow links it may be so many times the run's
STALLS = 5  # a contributor may be silent for the deadline divided by this


@dataclass(frozen=True, kw_only=True, slots=True)
class Seat:
    """A member that is ready, and what it says.

    Attributes:
        can_reduce: others can dial it.
        samples: its work; 0 for none.
        rate: its links; 0: unknown.
        views: what it believes of others' links.
    """

    peer_id: str
    can_reduce: bool
    samples: int
    rate: Rate
    views: tuple[View, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """What goes into a plan; `messages.Plan` says what each is."""

    assistants: tuple[str, ...]
    links: tuple[View, ...]
    expected_s: float
    contributions: tuple[Contribution, ...]
    slices: tuple[Slice, ...]
    chunk_elements: int
    exchange_s: float


def draft(
    seats: Sequence[Seat],
    layout: Layout,
    round: int,
    config: RoundConfig,
    pace_s: float | None,
    assistants: Mapping[str, Rate] = MappingProxyType({}),
) -> Draft:
    """Plan the exchange of those who are ready.

    Args:
        seats: in roster order; at least one reduces and one has samples.
        layout: of the vectors.
        round: which of them is averaged.
        config: of the run.
        pace_s: what the last exchange took; None if there was none.
        assistants: links of others that offer to reduce. They are asked only where links are known,
            and are what an exchange takes its time for.
    """
    rates = _rates(seats, assistants)
    parties = [
        Party(
            peer_id=seat.peer_id,
            up_bps=min(rates[seat.peer_id].up_bps, FAST_BPS),
            down_bps=min(rates[seat.peer_id].down_bps, FAST_BPS),
            contributes=seat.samples > 0,
            reduces=seat.can_reduce,
        )
        for seat in seats
    ]
    numel = layout.numel(round)
    encoded = codec(config.codec).encoded_bytes(numel)
    division = _in_full(parties)
    # With fewer known, those that are taken for usual would be blamed for what they never claimed.
    known = 2 * sum(seat.rate.up_bps > 0 and seat.rate.down_bps > 0 for seat in seats) > len(seats)
    fast = all(min(rates[p.peer_id].up_bps, rates[p.peer_id].down_bps) >= FAST_BPS for p in parties)
    if not known or fast or division.seconds_per_byte * encoded <= FINE_S:
        known = False
        parties = [replace(party, up_bps=1.0, down_bps=1.0) for party in parties]
        division = _in_full(parties)
    else:
        parties += [
            Party(
                peer_id=peer,
                up_bps=min(rates[peer].up_bps, FAST_BPS),
                down_bps=min(rates[peer].down_bps, FAST_BPS),
                contributes=False,
                receives=False,
            )
            for peer in assistants
        ]
        division = _in_full(parties)
        if division.seconds_per_byte * encoded > WORTH_S:
            division = divide(parties)
    takes_s = division.seconds_per_byte * encoded if known else 0.0
    reducers = sum(party.reduces for party in parties)
    fitting = int(encoded / (reducers * SMALLEST_CHUNK))
    if known:  # unequal shares come in whole chunks
        fine = min(fitting, int(CHUNKS_A_SECOND * takes_s), CHUNKS_EACH_SLOW)
        each = max(CHUNKS_EACH, fine)
    else:
        long = max(LEAST_CHUNKS, int(encoded / (reducers * FAST_CHUNK)))
        each = min(CHUNKS_EACH, long, fitting)
    elements = chunk_elements(numel, reducers, layout.largest_chunk, each)
    everything = Run(start=0, stop=-(-numel // elements))
    slices = cut(parties, division.shares, [everything], division.fractions)
    reducing = {piece.reducer for piece in slices}
    return Draft(
        assistants=tuple(peer for peer in assistants if peer in reducing),
        links=tuple(
            View(peer_id=p.peer_id, up_bps=int(p.up_bps), down_bps=int(p.down_bps))
            for p in parties
            if known and (p.receives or p.peer_id in reducing)
        ),
        expected_s=takes_s,
        contributions=tuple(
            Contribution(
                peer_id=seat.peer_id,
                samples=seat.samples,
                omitted=min(WHOLE - 1, int(WHOLE * (1 - fraction))),
            )
            for seat, fraction in zip(seats, division.fractions, strict=False)
            if seat.samples
        ),
        slices=slices,
        chunk_elements=elements,
        exchange_s=_deadline_s(config.exchange_s, takes_s, pace_s),
    )


def _in_full(parties: Sequence[Party]) -> Division:
    """Nobody leaves anything out."""
    fractions = tuple(float(party.contributes) for party in parties)
    shares = balance(parties)
    finish = max(times(parties, shares, fractions))
    return Division(shares=shares, fractions=fractions, late=(), seconds_per_byte=finish)


def divide_again(
    seats: Sequence[Seat],
    missing: Sequence[Run],
    *,
    receivers: Collection[str],
    reducers: Collection[str],
    contributors: Collection[str],
) -> tuple[Slice, ...]:
    """Slices for what an exchange left undone, among those who are left."""
    parties = [
        Party(
            peer_id=peer,
            up_bps=rate.up_bps,
            down_bps=rate.down_bps,
            contributes=peer in contributors,
            receives=peer in receivers,
            reduces=peer in reducers,
        )
        for peer, rate in _rates(seats).items()
        if peer in receivers
    ]
    return cut(parties, balance(parties), missing)


def longest_s(config: RoundConfig) -> float:
    """The longest deadline that a plan may have."""
    return config.exchange_s * DEADLINE_STRETCH


def sent_by(plan: Plan, peer_id: str) -> tuple[Run, ...]:
    """The chunks of the vector that a contributor sends.

    Another fraction of them each round. In a mend it sends all that is wanted of it: there is
    little to send, and whoever else had it may be gone.
    """
    everything = (Run(start=0, stop=plan.chunks),)
    for seat, contribution in enumerate(plan.contributions):
        if contribution.peer_id == peer_id:
            if not contribution.omitted or plan.attempt:
                return everything
            fraction = 1 - contribution.omitted / WHOLE
            return sent(plan.chunks, fraction, plan.round + seat)
    return ()


def weights(plan: Plan, cap: float) -> dict[str, float]:
    """What everybody's contribution to a plan counts for, in samples.

    Args:
        plan: of an exchange.
        cap: nobody counts for more than so many times the median contributor; 0: no cap.
    """
    samples = sorted(c.samples for c in plan.contributions)
    limit = cap * samples[(len(samples) - 1) // 2] if cap else math.inf
    return {c.peer_id: min(float(c.samples), limit) for c in plan.contributions}


def deliveries(
    plan: Plan, slices_s: Mapping[str, float], parts_s: Mapping[str, float]
) -> tuple[dict[str, Delivery], dict[str, Delivery]]:
    """How the others kept to a plan, for `bandwidth.Trust`; nothing where nothing was expected.

    Args:
        plan: a first attempt's; mends are not timed.
        slices_s: by reducer, when all of its slices were here.
        parts_s: by contributor, when its part of my slices was here, less what I let it wait.
    """
    links = {link.peer_id: link for link in plan.links}
    if not links or plan.expected_s <= 0 or plan.attempt:
        return {}, {}
    fractions = {c.peer_id: 1 - c.omitted / WHOLE for c in plan.contributions}
    reduced = dict.fromkeys(links, 0)
    for piece in plan.slices:
        reduced[piece.reducer] += piece.stop - piece.start
    parties = [
        Party(
            peer_id=peer,
            up_bps=max(MIN_BPS, link.up_bps),
            down_bps=max(MIN_BPS, link.down_bps),
            contributes=peer in fractions,
            receives=peer in plan.receivers,
        )
        for peer, link in links.items()
    ]
    shares = [reduced[party.peer_id] / plan.chunks for party in parties]
    wholes = [fractions.get(party.peer_id, 0.0) for party in parties]
    encoded = codec(plan.codec).encoded_bytes(plan.numel)

    def delivery(party: Party, needed_s: float, took_s: float) -> Delivery:
        return Delivery(
            believed=Rate(up_bps=party.up_bps, down_bps=party.down_bps),
            planned_s=plan.expected_s,
            needed_s=needed_s,
            took_s=took_s,
        )

    reducers, contributors = {}, {}
    for party, share, whole, seconds in zip(
        parties, shares, wholes, times(parties, shares, wholes), strict=True
    ):
        peer = party.peer_id
        if peer in slices_s:
            reducers[peer] = delivery(party, seconds * encoded, slices_s[peer])
        if peer in parts_s:
            needed_s = whole * (1 - share) * encoded / party.up_bps
            contributors[peer] = delivery(party, needed_s, parts_s[peer])
    return reducers, contributors


def _rates(
    seats: Sequence[Seat], assistants: Mapping[str, Rate] = MappingProxyType({})
) -> dict[str, Rate]:
    """Everybody's links as most of the others let them pass; none is unknown."""
    views = {
        seat.peer_id: {
            view.peer_id: Rate(up_bps=view.up_bps, down_bps=view.down_bps) for view in seat.views
        }
        for seat in seats
    }
    rates = settle({seat.peer_id: seat.rate for seat in seats} | dict(assistants), views)
    return _smoothed(rates)


def _smoothed(rates: Mapping[str, Rate]) -> dict[str, Rate]:
    """What is nearly usual is taken for it: unequal shares of equal links make all wait for one."""
    usual_up = statistics.median(rate.up_bps for rate in rates.values())
    usual_down = statistics.median(rate.down_bps for rate in rates.values())

    def smooth(bps: float, usual: float) -> float:
        return usual if usual / ALIKE <= bps <= usual * ALIKE else bps

    return {
        peer: Rate(up_bps=smooth(rate.up_bps, usual_up), down_bps=smooth(rate.down_bps, usual_down))
        for peer, rate in rates.items()
    }


def _deadline_s(configured_s: float, takes_s: float, pace_s: float | None) -> float:
    """Some times what it should take, within bounds; the run's own while nothing is known."""
    expected_s = max(takes_s, pace_s or 0.0)
    if not expected_s:
        return configured_s
    longest = max(configured_s, min(DEADLINE_STRETCH * configured_s, 2 * DEADLINE_SHARE * takes_s))
    return min(longest, max(DEADLINE_FLOOR_S, DEADLINE_SHARE * expected_s))
