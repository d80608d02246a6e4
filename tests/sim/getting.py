"""A whole state on its way through the simulator: shipped donors, a shipped download, a played net.

States are real (`state.State`) and tiny, cut into leaves of a few bytes. `donor.Donor` says what
a peer still has, under lease or as the current one, and to how many it gives at once;
`download.Download` decides what to ask whom for and checks what comes. Played here is what
`transfer.Transfer` does: a question and its answer take a while, are lost, break off with a donor
that dies, wait for one that is frozen, never come from one that is cut off, and now and then a leaf
comes with a wrong byte in it. Not played: bandwidth.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, cast

import torch
from blake3 import blake3

from coordinator_free import state as states
from coordinator_free import wire
from coordinator_free.donor import Donor
from coordinator_free.download import AskDigests, AskLeaf, Cancel, Download, Drop, Step
from coordinator_free.memory import bytes_of
from coordinator_free.messages import DIGEST_BYTES, FetchState
from coordinator_free.outer import OuterConfig, OuterOptimizer
from coordinator_free.replica import Replica
from coordinator_free.state import Fragment, Shape, State
from coordinator_free.transfer import LOOK_S
from dht.errors import Overloaded, StateError

if TYPE_CHECKING:
    from tests.sim.world import Newcomer, Peer, World

LAYOUT = "simulated"
NUMEL = 6
LEAF_ELEMENTS = 2
STEP_S = 0.25


@contextmanager
def small_leaves() -> Iterator[None]:
    """States are cut into small leaves here, as no state of a simulation fills a large one."""
    shipped, states.LEAF_ELEMENTS = states.LEAF_ELEMENTS, LEAF_ELEMENTS
    try:
        yield
    finally:
        states.LEAF_ELEMENTS = shipped


def shape(fragments: tuple[int, ...] = (NUMEL,)) -> Shape:
    """Of states whose fragments have so many parameters.

    All in one: three leaves of parameters and three of momentum.
    """
    cuts = itertools.accumulate(fragments, initial=0)
    lengths = tuple(map(OuterOptimizer(OuterConfig()).lengths, fragments))
    made = Shape(LAYOUT, tuple(itertools.pairwise(cuts)), lengths)
    with small_leaves():
        assert made.leaves  # cut now, and kept
    return made


@lru_cache(maxsize=1 << 12)
def _fragments(seed: bytes, lengths: tuple[tuple[int, ...], ...]) -> tuple[Fragment, ...]:
    numbers = list(itertools.chain(*lengths))
    raw = bytearray(blake3(seed).digest(4 * sum(numbers)))
    vectors = iter(torch.frombuffer(raw, dtype=torch.float32).split(numbers))
    with small_leaves():
        return tuple(Fragment.of([next(vectors) for _ in each]) for each in lengths)


def initial(shape: Shape) -> State:
    """What a run of such states is founded with."""
    return State(shape, _fragments(b"initial", shape.lengths))


def contents(state: State) -> bytes:
    """Every byte of a state."""
    return b"".join(bytes(bytes_of(vector)) for vector in state.vectors())


def after(state: State, round: int, vector_root: bytes) -> State:
    """The state that applying a round's average leads to.

    All of the fragment that the round averages depends on every byte of both; the others stay.
    """
    number = state.shape.fragment(round)
    lengths = (state.shape.lengths[number],)
    (fragment,) = _fragments(contents(state) + vector_root, lengths)
    return state.then(number, fragment)


class Giver(Donor):
    """The shipped donor of one peer, without a cap."""

    def __init__(self, peer: Peer, clock: Callable[[], float]) -> None:
        super().__init__(cast(Replica, peer), 0.0, clock)  # it looks at `state` alone

    def give(self, sender: str, request: FetchState) -> list[bytes]:
        """The payloads that are asked for, now.

        Raises:
            StateError: not held, or not any more.
            Overloaded: too many downloads at once.
        """

        async def collect() -> list[bytes]:
            return [
                bytes(wire.unpack_frame(frame)[1]) async for frame in self.serve(sender, request)
            ]

        try:
            collect().send(None)
        except StopIteration as end:
            return cast(list[bytes], end.value)
        raise AssertionError("a donor without a cap has nothing to wait for")


class Getting:
    """One download of one peer; ends in exactly one of two calls, or with the peer.

    Args:
        world: to play in.
        host: who downloads.
        root: of the state.
        first: is offered before the others: who showed that it stands there.
        here: called with the state, and how many leaves came from whom.
        lost: called when nobody has it any more.
    """

    def __init__(
        self,
        world: World,
        host: Peer | Newcomer,
        root: bytes,
        first: str,
        *,
        here: Callable[[State, dict[str, int]], None],
        lost: Callable[[], None],
    ) -> None:
        self._world = world
        self._host = host
        self._me = host.me.peer_id
        self._root = root
        self._first = first
        self._here = here
        self._lost = lost
        self._asking: dict[AskDigests | AskLeaf, object] = {}
        self._over = False
        self._download = Download(root, world.initial.shape)
        self._look()
        self._tick()

    def _look(self) -> None:
        """Offer whom the directory shows: all who live, cut off or not."""
        if self._over:
            return
        shown = [peer.me for peer in self._world.live if peer is not self._host]
        able = [me.peer_id for me in shown if me.can_reduce or me.peer_id == self._first]
        willing = able or [me.peer_id for me in shown]
        willing.sort(key=lambda peer_id: peer_id != self._first)
        self._do(self._download.offer(willing, self._world.now))
        self._world._later(self._host, LOOK_S, self._look)

    def _tick(self) -> None:
        if self._over:
            return
        try:
            steps = self._download.tick(self._world.now)
        except StateError:
            self._over = True
            self._world.lost_downloads += 1
            self._lost()
            return
        self._do(steps)
        self._world._later(self._host, STEP_S, self._tick)

    def _do(self, steps: list[Step]) -> None:
        for step in steps:
            match step:
                case AskDigests() | AskLeaf():
                    self._ask(step)
                case Cancel():
                    self._asking.pop(AskLeaf(step.donor, step.leaf), None)
                case Drop():
                    self._world.lies_noticed += step.lied
                    for asked in [a for a in self._asking if a.donor == step.donor]:
                        del self._asking[asked]
        if self._download.done and not self._over:
            self._over = True
            self._here(self._download.state(), self._download.received)

    def _ask(self, asked: AskDigests | AskLeaf) -> None:
        world = self._world
        donor = world.peers[asked.donor]
        place = self._asking[asked] = object()

        def is_asked() -> bool:
            return not self._over and self._asking.get(asked) is place

        def answer(then: Callable[[], list[Step]], delay_s: float) -> None:
            """What the donor says arrives, unless it is lost or ends with the donor."""

            def arrive() -> None:
                if is_asked() and not world.is_cut(self._me, asked.donor):
                    del self._asking[asked]
                    self._do(then() if world._runs(donor) else failed())

            if world.random.random() >= world.faults.loss:
                world._later(self._host, delay_s, arrive)

        def failed() -> list[Step]:
            return self._download.failed(asked.donor, "broke off", world.now)

        def reach() -> None:
            """The question is at the donor."""
            if not is_asked() or world.is_cut(self._me, asked.donor):
                return
            soon_s = world.random.uniform(*world.faults.delay_s)
            if not world._runs(donor):
                answer(failed, soon_s)
            elif world.now < donor.frozen_until:
                world.at(donor.frozen_until - world.now + 1e-6, reach)
            else:
                leaves = (asked.leaf,) if isinstance(asked, AskLeaf) else ()
                request = FetchState(state_root=self._root, leaves=leaves)
                try:
                    payloads = donor.giver.give(self._me, request)
                except Overloaded:
                    answer(lambda: self._download.busy(asked.donor, world.now), soon_s)
                except StateError:
                    answer(lambda: self._download.gone(asked.donor, world.now), soon_s)
                else:
                    takes_s = world.random.uniform(*world.faults.leaf_s)
                    answer(lambda: self._take(asked, payloads), takes_s)

        world.at(world.random.uniform(*world.faults.delay_s), reach)

    def _take(self, asked: AskDigests | AskLeaf, payloads: list[bytes]) -> list[Step]:
        now = self._world.now
        if isinstance(asked, AskLeaf):
            (payload,) = payloads
            if self._world.random.random() < self._world.faults.wrong_leaf:
                payload = bytes([payload[0] ^ 1]) + payload[1:]
            return self._download.leaf(asked.donor, asked.leaf, payload, now)
        raw = b"".join(payloads)
        digests = [raw[at : at + DIGEST_BYTES] for at in range(0, len(raw), DIGEST_BYTES)]
        return self._download.digests(asked.donor, digests, now)
