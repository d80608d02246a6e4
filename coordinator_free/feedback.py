"""What a reducer's codec cut off of the averages it encoded, and adds to those that follow.

The other half of error feedback; a contributor's own half is in `local`. A residual belongs to
elements of a fragment, and is kept by whoever encoded them for the average that was committed. At
that fragment's next round a peer adds what it has to the elements that it reduces again; what it
has of others is dropped, as those will not come back to it by the same road. So it is while the
roster stays as it is that nothing is lost, and a peer that comes or goes costs the others at most
one residual of each element.

Guarantees that an exchange that was void, mended by others, or decided differently leaves no trace.
Calls may come from several threads, but those for one fragment's exchange end before its `commit`.
Not for assistants: they do not hear what was committed.

Source: Seide et al. 2014 for the idea; both sides, DoubleSqueeze, arXiv:1905.05957.
"""

from __future__ import annotations

from torch import Tensor

from coordinator_free.average import Average, Chunk


class Feedback:
    """The residuals of one reducer."""

    def __init__(self) -> None:
        self._kept: dict[int, dict[int, Tensor]] = {}  # by fragment, then by first element
        self._new: dict[int, dict[int, tuple[bytes, Tensor]]] = {}  # with the chunk's digest

    def add(self, fragment: int, start: int, sum_E: Tensor) -> None:
        """Add what is kept for elements start .. start + E of a fragment, in place."""
        stop = start + len(sum_E)
        for at, residual_E in self._kept.get(fragment, {}).items():
            low, high = max(start, at), min(stop, at + len(residual_E))
            if low < high:
                sum_E[low - start : high - start].add_(residual_E[low - at : high - at])

    def keep(self, fragment: int, start: int, chunk: Chunk, residual_E: Tensor) -> None:
        """Of a chunk that was just encoded here; counts if that is committed."""
        self._new.setdefault(fragment, {})[start] = (chunk.digest, residual_E)

    def commit(self, fragment: int, average: Average) -> None:
        """This was decided: what was encoded here for it is kept, all else forgotten."""
        new = self._new.pop(fragment, {})
        kept: dict[int, Tensor] = {}
        start = 0
        for chunk in average.chunks:
            digest, residual_E = new.get(start, (b"", None))
            if residual_E is not None and digest == chunk.digest:
                kept[start] = residual_E
            start += chunk.elements
        self._kept[fragment] = kept

    def clear(self) -> None:
        """The state became another one."""
        self._kept.clear()
        self._new.clear()
