"""Which piece of a state comes from which donor: a plain state machine, no I/O and no clock.

The list of leaf digests comes first, from any donor, and is checked against the state's root; then
every leaf, from all donors at once, each checked against its digest as it arrives.

- Donors are asked for a few leaves at a time and for more as those arrive, so a faster donor gives
  more. Whoever has nothing left to be asked for is asked for what slower ones still owe; the first
  copy counts.
- A donor that sends a wrong leaf or a wrong list is dropped for good. One that breaks off, or sends
  much slower than the others (or than `SLOWEST_BPS`), is dropped until nobody else is left; what it
  owed goes to others. One that is busy is asked again a little later. One that has not got the
  state any more is not asked again.
- What has arrived stays, whoever leaves. New donors can be added at any time. The download is lost
  only when there is no donor left and none comes for `PATIENCE_S`, or all say that they have not
  got the state any more.

Guarantees: `state` is the state with the root that was asked for, or an error; memory is bounded by
the state, its digests and the window of each donor.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from blake3 import blake3

from coordinator_free.memory import bytes_of
from coordinator_free.state import Fragment, Shape, State
from dht.errors import StateError

WINDOW = 4  # leaves asked of one donor and not here yet
MAX_DONORS = 16  # with the window, bounds what arrives unasked-for in memory
SLOWEST_BPS = 50e3  # bytes per second; whoever is slower is no help
MUCH_SLOWER = 20.0  # times slower than the median donor, and dropped
STALL_S = 5.0  # silence that is no sign of anything, on top of what a leaf takes
DIGESTS_S = 15.0  # for the list of digests; a donor may have to compute it
HEDGE_S = 3.0  # for it, before another donor is asked as well
RETRY_S = 3.0  # before a donor that was busy or broke off is asked again
PATIENCE_S = 20.0  # without any donor
BUSY_PATIENCE_S = 120.0  # the same, while some are only busy


@dataclass(frozen=True, slots=True)
class AskDigests:
    """Ask this donor for the list of digests."""

    donor: str


@dataclass(frozen=True, slots=True)
class AskLeaf:
    """Ask this donor for one leaf."""

    donor: str
    leaf: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """This leaf has come from somebody else."""

    donor: str
    leaf: int


@dataclass(frozen=True, slots=True)
class Drop:
    """End all that is under way with this donor."""

    donor: str
    reason: str
    lied: bool = False


Step = AskDigests | AskLeaf | Cancel | Drop


@dataclass(slots=True)
class _Donor:
    since: float  # of the last sign of life, or of the first question after a pause
    owes: dict[int, float] = field(default_factory=dict)  # leaf: when it was asked for
    digests_asked: float | None = None
    window: int = 1
    leaf_s: float = math.inf  # seconds between its last leaves, smoothed
    leaves: int = 0
    again: bool = False  # failed or was busy before


class Download:
    """One state on its way here.

    Args:
        root: of the state.
        shape: of the run's states.

    Attributes:
        received: good leaves by donor, those that came twice included.
        liars: peers that sent what no correct peer sends.
    """

    def __init__(self, root: bytes, shape: Shape) -> None:
        self.received: dict[str, int] = {}
        self.liars: set[str] = set()
        self._root = root
        self._shape = shape
        self._vectors = shape.empty()
        self._raw = tuple(tuple(map(bytes_of, vectors)) for vectors in self._vectors)
        self._digests: Sequence[bytes] | None = None
        self._wanted = deque(range(self.leaves))  # asked of nobody
        self._missing = set(self._wanted)
        self._donors: dict[str, _Donor] = {}
        self._busy_until: dict[str, float] = {}
        self._failed: dict[str, float] = {}  # broke off or dawdled, and when
        self._gone: set[str] = set()  # have not got this state
        self._alone_since: float | None = None
        self._out: list[Step] = []

    # -- what happens -------------------------------------------------------------------------

    def offer(self, donors: Sequence[str], now: float) -> list[Step]:
        """These peers may have the state; those known already are no news."""
        for peer in donors:
            self._admit(peer, now, last_resort=False)
        if not self._donors:
            for peer in donors:
                self._admit(peer, now, last_resort=True)
        return self._drain(now)

    def digests(self, donor: str, digests: Sequence[bytes], now: float) -> list[Step]:
        """A donor's list of leaf digests."""
        them = self._donors.get(donor)
        if them is None or them.digests_asked is None:
            return self._drain(now)
        if len(digests) != self.leaves or self._root != self._shape.root(digests):
            self._lie(donor, "sent a list of digests that does not have the root")
        else:
            self._digests = tuple(digests)
            for each in self._donors.values():
                each.digests_asked = None
                each.since = now
        return self._drain(now)

    def leaf(self, donor: str, leaf: int, payload: bytes | memoryview, now: float) -> list[Step]:
        """A donor's leaf."""
        them = self._donors.get(donor)
        if them is None or leaf not in them.owes or self._digests is None:
            return self._drain(now)
        place = self._shape.leaves[leaf]
        if (
            len(payload) != place.stop - place.start
            or blake3(payload).digest() != self._digests[leaf]
        ):
            self._lie(donor, f"sent a wrong leaf {leaf}")
            return self._drain(now)
        del them.owes[leaf]
        took = now - them.since
        them.leaf_s = took if math.isinf(them.leaf_s) else 0.7 * them.leaf_s + 0.3 * took
        them.since = now
        them.leaves += 1
        them.window = min(them.window + 1, WINDOW)
        self.received[donor] = self.received.get(donor, 0) + 1
        if leaf in self._missing:
            self._raw[place.fragment][place.vector][place.start : place.stop] = payload
            self._missing.discard(leaf)
            for peer, other in self._donors.items():
                if other.owes.pop(leaf, None) is not None:
                    self._out.append(Cancel(peer, leaf))
        return self._drain(now)

    def failed(self, donor: str, reason: str, now: float) -> list[Step]:
        """A donor broke off or cannot be reached."""
        if donor in self._donors:
            self._failed[donor] = now
            self._drop(donor, reason)
        return self._drain(now)

    def busy(self, donor: str, now: float) -> list[Step]:
        """A donor has no room for this download at the moment."""
        if donor in self._donors:
            self._busy_until[donor] = now + RETRY_S
            self._drop(donor, "is busy")
        return self._drain(now)

    def gone(self, donor: str, now: float) -> list[Step]:
        """A donor has not got this state, or not any more."""
        if donor in self._donors:
            self._gone.add(donor)
            self._drop(donor, "has not got this state")
        return self._drain(now)

    def lied(self, donor: str, reason: str, now: float) -> list[Step]:
        """A donor answered with what no correct peer sends."""
        if donor in self._donors:
            self._lie(donor, reason)
        return self._drain(now)

    def tick(self, now: float) -> list[Step]:
        """Time passed; call it a few times a second.

        Raises:
            StateError: there is no donor left and none has come.
        """
        for peer, them in list(self._donors.items()):
            if them.digests_asked is not None and now - them.digests_asked > DIGESTS_S:
                self._failed[peer] = now
                self._drop(peer, "does not send the digests")
            elif them.owes and now - them.since > self._patience_with(peer):
                self._failed[peer] = now
                self._drop(peer, "dawdles")
        if self.done or any(not d.again or d.leaves for d in self._donors.values()):
            self._alone_since = None
            return self._drain(now)
        # Those who failed before and are tried again do not count until they deliver.
        self._alone_since = now if self._alone_since is None else self._alone_since
        if not self._donors:
            patience = BUSY_PATIENCE_S if self._busy_until else PATIENCE_S
            hopeless = self._gone and not self._failed and not self._busy_until
            if hopeless or now - self._alone_since > patience:
                raise StateError(
                    f"nobody is left to get the state from; "
                    f"{len(self._missing)} of {self.leaves} leaves are missing"
                )
        return self._drain(now)

    # -- what can be seen ---------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Whether all is here."""
        return not self._missing

    @property
    def leaves(self) -> int:
        """How many leaves the state has."""
        return len(self._shape.leaves)

    @property
    def donors(self) -> tuple[str, ...]:
        """Who is being asked at the moment."""
        return tuple(self._donors)

    def state(self) -> State:
        """The state, which has the root that was asked for.

        Raises:
            StateError: some of it is missing.
        """
        if not self.done or self._digests is None:
            raise StateError(f"{len(self._missing)} leaves of a state are missing")
        digests = iter(self._digests)
        counts = Counter(leaf.fragment for leaf in self._shape.leaves)
        return State(
            self._shape,
            tuple(
                Fragment(vectors, tuple(itertools.islice(digests, counts[number])))
                for number, vectors in enumerate(self._vectors)
            ),
        )

    # -- inside -------------------------------------------------------------------------------

    def _admit(self, peer: str, now: float, *, last_resort: bool) -> None:
        if peer in self._donors or peer in self.liars or peer in self._gone:
            return
        if len(self._donors) >= MAX_DONORS or now < self._busy_until.get(peer, now):
            return
        failed = self._failed.get(peer)
        if failed is not None and not (last_resort and now - failed >= RETRY_S):
            return
        again = failed is not None or peer in self._busy_until
        self._failed.pop(peer, None)
        self._busy_until.pop(peer, None)
        self._donors[peer] = _Donor(since=now, again=again)

    def _patience_with(self, peer: str) -> float:
        """Seconds that may pass between two leaves of this donor."""
        rates = [d.leaf_s for p, d in self._donors.items() if p != peer and d.leaf_s < math.inf]
        leaf_bytes = max(leaf.stop - leaf.start for leaf in self._shape.leaves)
        slowest = leaf_bytes / SLOWEST_BPS
        if rates:
            slowest = min(slowest, MUCH_SLOWER * statistics.median(rates))
        return STALL_S + slowest

    def _lie(self, donor: str, reason: str) -> None:
        self.liars.add(donor)
        self._drop(donor, reason, lied=True)

    def _drop(self, donor: str, reason: str, *, lied: bool = False) -> None:
        them = self._donors.pop(donor)
        owed_by_others = {leaf for other in self._donors.values() for leaf in other.owes}
        back = [leaf for leaf in them.owes if leaf in self._missing and leaf not in owed_by_others]
        self._wanted.extendleft(reversed(back))
        self._out.append(Drop(donor, reason, lied))

    def _ask(self, now: float) -> None:
        if self.done:
            return
        if self._digests is None:
            self._ask_digests(now)
            return
        for peer, them in self._donors.items():
            while len(them.owes) < them.window and self._wanted:
                self._ask_leaf(peer, them, self._wanted.popleft(), now)
        if not self._wanted:
            self._ask_again(now)

    def _ask_digests(self, now: float) -> None:
        asked = [d.digests_asked for d in self._donors.values() if d.digests_asked is not None]
        if asked and now - max(asked) < HEDGE_S:
            return
        for peer, them in self._donors.items():
            if them.digests_asked is None:
                them.digests_asked = now
                self._out.append(AskDigests(peer))
                return

    def _ask_again(self, now: float) -> None:
        """The end game: the idle are asked for what others owe, the longest first."""
        owed: dict[int, list[float]] = {}
        for them in self._donors.values():
            for leaf, since in them.owes.items():
                owed.setdefault(leaf, []).append(since)
        # Twice at most: every further copy costs some donor's uplink for little.
        late = sorted((since[0], leaf) for leaf, since in owed.items() if len(since) == 1)
        for peer, them in self._donors.items():
            if them.owes:
                continue
            if late:
                _, leaf = late.pop(0)
                self._ask_leaf(peer, them, leaf, now)

    def _ask_leaf(self, peer: str, them: _Donor, leaf: int, now: float) -> None:
        if not them.owes:
            them.since = now
        them.owes[leaf] = now
        self._out.append(AskLeaf(peer, leaf))

    def _drain(self, now: float) -> list[Step]:
        self._ask(now)
        out, self._out = self._out, []
        return out
