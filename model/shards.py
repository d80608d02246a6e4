"""Who trains on which block, agreed without a word.

Each round shuffles all blocks by (seed, round) and deals them out like cards: seat i of n takes
positions i, i + n, i + 2n, ... of the shuffled deck. Whoever knows the roster knows every seat's
blocks, and the next round's roster deals all of them anew.

The shuffle is a format-preserving permutation (a keyed Feistel network, walked until it lands
below n): one index costs a microsecond and no memory, so a billion blocks are as cheap as ten.

Guaranteed: a pure function of its arguments, the same in every version of Python and on every
machine; within a round no block belongs to two seats and each belongs to one. Not guaranteed:
that a seat has time for all of its blocks, or secrecy (the permutation is for balance, anyone can
compute it).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

_FEISTEL_ROUNDS = 6
_MASK_64 = (1 << 64) - 1


def _mix(x: int) -> int:
    """Spread 64 bits over 64 bits: the splitmix64 finaliser, Steele et al. 2014."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return x ^ (x >> 31)


@dataclass(frozen=True, slots=True)
class Permutation:
    """A pseudo-random order of range(size), computed one index at a time."""

    size: int
    keys: tuple[int, ...]
    half_bits: int

    @classmethod
    def of(cls, seed: int, round: int, size: int) -> Permutation:
        """The order of `size` blocks in one round of one run."""
        digest = hashlib.shake_128(f"shoal.shards.v1 {seed} {round}".encode()).digest(
            8 * _FEISTEL_ROUNDS
        )
        keys = tuple(int.from_bytes(digest[i : i + 8], "little") for i in range(0, len(digest), 8))
        return cls(size, keys, max(1, ((size - 1).bit_length() + 1) // 2))

    def __getitem__(self, index: int) -> int:
        # The domain is a power of 4 and at most 4 times the size (8 below 3): under 4 walks on
        # average. A walk that starts inside must come back inside, because it is a cycle.
        x = index
        while True:
            x = self._encipher(x)
            if x < self.size:
                return x

    def _encipher(self, x: int) -> int:
        mask = (1 << self.half_bits) - 1
        left, right = x >> self.half_bits, x & mask
        for key in self.keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return left << self.half_bits | right


@dataclass(frozen=True, slots=True)
class Blocks:
    """One seat's blocks of one round, in training order; nothing is stored."""

    order: Permutation
    seat: int
    seats: int

    def __len__(self) -> int:
        return max(0, -((self.seat - self.order.size) // self.seats))

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.order[self.seat + index * self.seats]

    def __iter__(self) -> Iterator[int]:
        return (self[i] for i in range(len(self)))


def blocks_of(seed: int, round: int, seat: int, seats: int, n_blocks: int) -> Blocks:
    """Deal one round's blocks to one seat.

    Args:
        seed: the run's.
        round: index of the averaging round.
        seat: this peer's place in the committed roster, from 0.
        seats: length of that roster.
        n_blocks: training blocks in all.

    Returns:
        The block indices in [0, n_blocks) of this seat: n_blocks // seats of them, or one more.

    Raises:
        ValueError: no such seat, or a negative number of blocks.
    """
    if not 0 <= seat < seats:
        raise ValueError(f"seat {seat} of {seats} does not exist")
    if n_blocks < 0:
        raise ValueError(f"{n_blocks} blocks cannot be dealt")
    return Blocks(Permutation.of(seed, round, n_blocks), seat, seats)
