"""Who is there, as one peer sees it: the live, the lost, those who ask to come and to go.

Only hints: nothing here decides anything by itself. The leader proposes the next roster from it,
and a majority has to accept that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from coordinator_free.certificates import Head
from coordinator_free.messages import MAX_ASSISTANTS, MAX_MEMBERS, Assist, Join, Member

JOIN_FRESH_S = 5.0  # joiners repeat their request every second
SHUN_S = 600.0  # for an assistant that failed in an exchange
MAX_STRAYS = 64  # lost members that are remembered, the latest
JOIN_BEHIND = 3  # heights that a joiner may lag: averages kept by others let it catch up quickly

# What names all of a roster must fit into one message, the largest of which is a Promise with a
# decree, a plan and a report in it. The rest of it is left to chunks that are kept or held.
ROSTER_BYTES = 704 << 10
NAMED = 8  # times at most in that message, the seat included
BESIDE_NAMES_BYTES = 160  # of a member's seat and all that is said of it


class Membership:
    """Liveness and requests, by peer id. Times are the caller's clock, in seconds."""

    def __init__(self, me: Member, head: Head) -> None:
        self._me = me
        self._joins: dict[str, tuple[Join, float]] = {}
        self._leavers: set[str] = set()
        self._down: dict[str, float] = {}
        self._book: dict[str, Member] = {}
        self._strays: dict[str, Member] = {}
        self._assists: dict[str, tuple[Assist, float]] = {}
        self._shunned: dict[str, float] = {}  # assistants that failed, and when
        self.head = head
        self.enter(head)

    def enter(self, head: Head) -> None:
        """A height was decided: those who got in or out are no longer pending."""
        before = {member.peer_id: member.session for member in self.head.roster}
        for member in self.head.roster:
            if member.peer_id not in self._leavers and member.peer_id != self._me.peer_id:
                self._strays[member.peer_id] = member
        self.head = head
        self._book.update({member.peer_id: member for member in head.roster})
        spare = [peer for peer in self._book if peer not in head.peers]
        for peer in spare[: max(0, len(self._book) - MAX_MEMBERS)]:
            del self._book[peer]
        seated = {member.peer_id: member.session for member in head.roster}
        for peer in list(self._strays):
            if peer in seated or len(self._strays) > MAX_STRAYS:
                del self._strays[peer]
        # Of a peer that has just got its seat, any other session is older; a newer one asks again.
        self._joins = {
            peer: entry
            for peer, entry in self._joins.items()
            if peer not in seated or seated[peer] == before.get(peer) != entry[0].member.session
        }
        # A new session of somebody who asked to leave has come to stay.
        self._leavers = {p for p in self._leavers & set(seated) if seated[p] == before.get(p)}
        self._down = {peer: since for peer, since in self._down.items() if peer in seated}

    def member(self, peer_id: str) -> Member | None:
        """The last known seat and address of a peer, also of one that has just left."""
        asks = self._joins.get(peer_id)
        if asks is not None:
            return asks[0].member
        offers = self._assists.get(peer_id)
        return offers[0].member if offers is not None else self._book.get(peer_id)

    @property
    def strays(self) -> tuple[Member, ...]:
        """Those who were lost from the roster: dead, or on a branch of their own."""
        return tuple(self._strays.values())

    def heard(self, peer_id: str) -> None:
        """Something authentic arrived from this peer, or it confirmed one of our messages."""
        self._down.pop(peer_id, None)

    def lost(self, peer_id: str, now: float) -> None:
        """A message to this peer could not be delivered."""
        if peer_id != self._me.peer_id and (peer_id in self.head.peers or peer_id in self._assists):
            self._down.setdefault(peer_id, now)

    def paused(self, seconds: float) -> None:
        """This peer did nothing for so long: that was not the silence of others."""
        self._down = {peer: since + seconds for peer, since in self._down.items()}

    def join(self, join: Join, now: float) -> None:
        """A peer that holds the state before some height asks for a seat."""
        peer = join.member.peer_id
        stranger = peer not in self._joins and peer not in self.head.peers
        if stranger and len(self._joins) >= MAX_MEMBERS:
            self._joins = {
                other: entry
                for other, entry in self._joins.items()
                if now - entry[1] <= JOIN_FRESH_S
            }
            if len(self._joins) >= MAX_MEMBERS:
                return
        self._joins[peer] = (join, now)

    def assist(self, assist: Assist, now: float) -> None:
        """A peer without a seat offers to reduce."""
        peer = assist.member.peer_id
        if len(self._assists) >= MAX_ASSISTANTS and peer not in self._assists:
            self._assists = {
                other: entry
                for other, entry in self._assists.items()
                if now - entry[1] <= JOIN_FRESH_S
            }
            if len(self._assists) >= MAX_ASSISTANTS:
                return
        self._assists[peer] = (assist, now)

    def shun(self, peers: Iterable[str], now: float) -> None:
        """These failed: those of them who are assistants are not asked for a while."""
        for peer in peers:
            if peer in self._assists:
                self._shunned[peer] = now

    def assistants(self, now: float) -> tuple[Assist, ...]:
        """Those who offered to reduce a moment ago and did not fail lately."""
        self._shunned = {p: since for p, since in self._shunned.items() if now - since < SHUN_S}
        return tuple(
            assist
            for peer, (assist, heard) in sorted(self._assists.items())
            if now - heard <= JOIN_FRESH_S
            and peer not in self._shunned
            and peer not in self.head.peers
            and peer not in self._joins
        )

    def leave(self, peer_id: str) -> None:
        """A member asks to be left out of the next roster."""
        if peer_id in self.head.peers:
            self._leavers.add(peer_id)

    def is_down(self, peer_id: str) -> bool:
        """Whether the last message to this peer failed."""
        return peer_id in self._down

    def gone_for(self, peer_id: str, now: float) -> float:
        """Seconds since the first of an unbroken row of failures.

        0 for a live peer, infinite for one that has come back as a new session.
        """
        return math.inf if self.restarted(peer_id) else now - self._down.get(peer_id, now)

    def leaving(self, peer_id: str) -> bool:
        """Whether this member asked to go."""
        return peer_id in self._leavers

    def restarted(self, peer_id: str) -> bool:
        """Whether a new session of this member is asking for a seat: the old one is dead."""
        join = self._joins.get(peer_id)
        seat = next((m for m in self.head.roster if m.peer_id == peer_id), None)
        return join is not None and seat is not None and join[0].member.session != seat.session

    def live(self) -> tuple[str, ...]:
        """Members of the roster that nothing speaks against."""
        return tuple(
            peer for peer in self.head.peers if peer not in self._down and not self.restarted(peer)
        )

    def joiners(self, now: float) -> tuple[Member, ...]:
        """Those who asked for a seat a moment ago and hold a recent state."""
        return tuple(
            join.member
            for join, heard in self._joins.values()
            if 0 <= self.head.height - join.height <= JOIN_BEHIND and now - heard <= JOIN_FRESH_S
        )

    def next_roster(
        self, now: float, *, without: Iterable[str] = (), admit: bool = True
    ) -> tuple[Member, ...]:
        """The roster a leader would propose: the live, less the leaving, plus the joining.

        Args:
            now: the current time.
            without: peers to leave out for another reason.
            admit: whether joiners get a seat now.
        """
        out = set(without) | self._leavers
        live = set(self.live())
        staying = (m for m in self.head.roster if m.peer_id in live - out)
        return fitting((*staying, *(self.joiners(now) if admit else ())))


def fitting(members: Iterable[Member]) -> tuple[Member, ...]:
    """As many of these as a roster can have, the first before the later, sorted by peer id.

    Joining costs nothing, so strangers must not make a roster of which nothing can be decided any
    more: every message about it has to be one that can be sent.
    """
    roster: dict[str, Member] = {}
    left = ROSTER_BYTES
    for member in members:
        size = _seat_bytes(member)
        if len(roster) < MAX_MEMBERS and size <= left:
            roster[member.peer_id] = member
            left -= size
    return tuple(roster[peer] for peer in sorted(roster))


def _seat_bytes(member: Member) -> int:
    """What a seat takes up of the largest message about its roster, at most."""
    hosts = sum(len(host.encode()) + 2 for host in member.hosts)
    return BESIDE_NAMES_BYTES + NAMED * len(member.peer_id) + hosts
