"""A module's parameters as one flat vector, which is all that the swarm ever sees of a model.

A span of the vector, `start` to `stop`, may cut through parameters; only those in it are touched.

Guaranteed: `write` followed by `read` returns the same bits (parameters must be float32, wherever
they live), and what is outside the span keeps its own; tied parameters appear once; the layout
digest differs whenever a name, a shape or the order does, so two peers with equal digests mean the
same by every element. Not covered: buffers
(they are not averaged), and any check of the values: whoever brings a vector from the network has
validated it.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpan:
    """One parameter's place in the flat vector, for an optimizer that lives elsewhere.

    Args:
        name: as the module calls it.
        start: its first element in the vector; its others follow, the last index fastest.
        shape: of the parameter.
        matrix: Muon may take it.
        decay: weight decay applies to it; never to vectors and to what is not trained.
    """

    name: str
    start: int
    shape: tuple[int, ...]
    matrix: bool
    decay: bool


class FlatParameters:
    """Reads and writes all parameters of a module as one (N,) vector.

    Args:
        module: may move between devices later; its parameters stay the same objects.

    Raises:
        ValueError: a parameter is not float32, or there is none.
    """

    def __init__(self, module: nn.Module) -> None:
        # named_parameters() yields a tied parameter once, under its first name.
        named = list(module.named_parameters())
        if not named:
            raise ValueError("the module has no parameters")
        for name, p in named:
            if p.dtype != torch.float32:
                raise ValueError(f"parameter {name} is {p.dtype}: only float32 can be averaged")
        self._names = [name for name, _ in named]
        self._parameters = [p for _, p in named]
        *self._starts, self.numel = itertools.accumulate(
            (p.numel() for p in self._parameters), initial=0
        )
        shapes = json.dumps([[name, list(p.shape)] for name, p in named])
        self.layout = hashlib.blake2b(shapes.encode(), digest_size=16).hexdigest()

    def tensors(self, matrices: list[nn.Parameter]) -> tuple[TensorSpan, ...]:
        """What is where in the vector.

        Args:
            matrices: those parameters that Muon may take.
        """
        hidden = {id(p) for p in matrices}
        return tuple(
            TensorSpan(
                name=name,
                start=start,
                shape=tuple(p.shape),
                matrix=p.requires_grad and id(p) in hidden,
                decay=p.requires_grad and p.ndim >= 2,
            )
            for name, start, p in zip(self._names, self._starts, self._parameters, strict=True)
        )

    @torch.no_grad()
    def read(self, out: Tensor | None = None, *, start: int = 0, stop: int | None = None) -> Tensor:
        """Copy the parameters out.

        Args:
            out: (stop - start,) float32 on the CPU, overwritten; a new one if None.
            start: first element of the span.
            stop: one past its last; None for the end of the vector.

        Returns:
            (stop - start,) float32 on the CPU: `out`.

        Raises:
            ValueError: no such span, or `out` has another shape, dtype or device.
        """
        stop = self._stop(start, stop)
        vector_S = torch.empty(stop - start) if out is None else _checked(out, stop - start)
        for p, first, last, part in self._parts(vector_S, start, stop):
            part.copy_(p.reshape(-1)[first:last])
        return vector_S

    @torch.no_grad()
    def write(self, vector_S: Tensor, *, start: int = 0, stop: int | None = None) -> None:
        """Overwrite the parameters; optimizer moments are not touched.

        Args:
            vector_S: (stop - start,) float32 on the CPU.
            start: first element of the span.
            stop: one past its last; None for the end of the vector.

        Raises:
            ValueError: no such span, or another shape, dtype or device; nothing was written.
        """
        stop = self._stop(start, stop)
        for p, first, last, part in self._parts(_checked(vector_S, stop - start), start, stop):
            if part.numel() == p.numel():
                p.copy_(part.view_as(p))
            elif p.is_contiguous():
                p.view(-1)[first:last].copy_(part)
            else:  # cut through in the vector's order, which is not the memory's
                whole = p.reshape(-1)
                whole[first:last].copy_(part)
                p.copy_(whole.view_as(p))

    @torch.no_grad()
    def read_gradients(self, out: Tensor | None = None) -> Tensor:
        """Copy the gradients out; (N,) float32 on the CPU, zero where there is none.

        Raises:
            ValueError: `out` has another shape, dtype or device.
        """
        vector_N = torch.empty(self.numel) if out is None else _checked(out, self.numel)
        for p, _, _, part in self._parts(vector_N, 0, self.numel):
            if p.grad is None:
                part.zero_()
            else:
                part.copy_(p.grad.reshape(-1))
        return vector_N

    def _stop(self, start: int, stop: int | None) -> int:
        stop = self.numel if stop is None else stop
        if not 0 <= start <= stop <= self.numel:
            raise ValueError(f"{start} to {stop} is no span of a vector of {self.numel}")
        return stop

    def _parts(
        self, vector_S: Tensor, start: int, stop: int
    ) -> Iterator[tuple[nn.Parameter, int, int, Tensor]]:
        """Each parameter that the span meets, from and to which of its elements, and those."""
        index = max(0, bisect.bisect_right(self._starts, start) - 1)
        while index < len(self._starts) and self._starts[index] < stop:
            p, at = self._parameters[index], self._starts[index]
            first, last = max(start - at, 0), min(stop - at, p.numel())
            if first < last:  # a parameter without elements is met by no span
                yield p, first, last, vector_S[at + first - start : at + last - start]
            index += 1


def _checked(vector_S: Tensor, numel: int) -> Tensor:
    wanted = ((numel,), torch.float32, "cpu")
    given = (tuple(vector_S.shape), vector_S.dtype, vector_S.device.type)
    if given != wanted:
        raise ValueError(f"a vector of {wanted} is needed, this one is {given}")
    return vector_S
