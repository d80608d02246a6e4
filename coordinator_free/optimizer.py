"""What the replica needs of the rule that turns an average into the next state.

Every peer computes that step by itself, and the digests of what they computed must be equal. So a
`StateOptimizer` is a pure function of its arguments, to the bit: only correctly rounded IEEE-754
float32 (or float64) operations, each its own, in an order that does not depend on the processor,
its vector width, the number of threads or the backend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """Where the run stood before a step; equal in all peers, as the head says it.

    Attributes:
        round: averages applied before this one.
        samples: what the whole swarm had been trained on before it, in sequences.
    """

    round: int
    samples: int


class StateOptimizer(Protocol):
    """How an average moves the state. Holds nothing but its constants: any thread may use it."""

    @property
    def elementwise(self) -> bool:
        """Whether any span of the vectors can be moved by itself; else only all of them at once."""
        ...

    def lengths(self, numel: int) -> tuple[int, ...]:
        """How long the vectors of a state are: the parameters, `numel`, then the moments."""
        ...

    def advance(
        self, before: Sequence[Tensor], average_N: Tensor, out: Sequence[Tensor], at: Position
    ) -> bool:
        """Write the state that an average leads to into other memory.

        Args:
            before: parameters and moments, float32, CPU, contiguous, of the `lengths` of
                `average_N`. Not changed.
            average_N: (N,) float32: pseudo-gradient or gradient. Not changed.
            out: as `before`; overlaps neither that nor `average_N`.
            at: where the run stands.

        Returns:
            Whether all of `out` is finite.

        Raises:
            ValueError: dtype, device or lengths differ from the above.
        """
        ...

    def prepare(self) -> None:
        """Compile what `advance` needs, or load it: up to some seconds. For a worker thread."""
        ...


def checked(
    before: Sequence[Tensor],
    average_N: Tensor,
    out: Sequence[Tensor],
    lengths: Callable[[int], tuple[int, ...]],
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """The arguments of an `advance`, detached, if they are what it expects.

    Raises:
        ValueError: one of them is not float32, on the CPU, flat, contiguous and of its length.
    """
    for vector in (*before, average_N, *out):
        if vector.dtype != torch.float32 or vector.device.type != "cpu":
            raise ValueError(f"a state's vectors must be float32 on the CPU, not {vector.dtype}")
        if vector.ndim != 1 or not vector.is_contiguous():
            raise ValueError(
                f"a state's vectors must be flat, not {tuple(vector.shape)} in strides"
            )
    expected = lengths(len(average_N))
    for vectors in (before, out):
        found = tuple(len(vector) for vector in vectors)
        if found != expected:
            raise ValueError(f"a state's vectors must have {expected} elements, not {found}")
    return [v.detach() for v in before], average_N.detach(), [v.detach() for v in out]
