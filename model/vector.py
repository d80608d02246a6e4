"""A module's parameters as one flat vector, which is all that the swarm ever sees of a model.

Guaranteed: `write` followed by `read` returns the same bits (parameters must be float32, wherever
they live); tied parameters appear once; the layout digest differs whenever a name, a shape or the
order does, so two peers with equal digests mean the same by every element. Not covered: buffers
(they are not averaged), and any check of the values: whoever brings a vector from the network has
validated it.
"""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor, nn


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
        self._parameters = [p for _, p in named]
        self.numel = sum(p.numel() for p in self._parameters)
        shapes = json.dumps([[name, list(p.shape)] for name, p in named])
        self.layout = hashlib.blake2b(shapes.encode(), digest_size=16).hexdigest()

    @torch.no_grad()
    def read(self, out: Tensor | None = None) -> Tensor:
        """Copy the parameters out.

        Args:
            out: (N,) float32 on the CPU, overwritten; a new one if None.

        Returns:
            (N,) float32 on the CPU: `out`.

        Raises:
            ValueError: `out` has another shape, dtype or device.
        """
        vector_N = torch.empty(self.numel) if out is None else self._checked(out)
        for p, part in zip(self._parameters, self._parts(vector_N), strict=True):
            part.copy_(p.reshape(-1))
        return vector_N

    @torch.no_grad()
    def write(self, vector_N: Tensor) -> None:
        """Overwrite the parameters; optimizer moments are not touched.

        Args:
            vector_N: (N,) float32 on the CPU.

        Raises:
            ValueError: another shape, dtype or device; nothing was written.
        """
        for p, part in zip(self._parameters, self._parts(self._checked(vector_N)), strict=True):
            p.copy_(part.view_as(p))

    def _parts(self, vector_N: Tensor) -> tuple[Tensor, ...]:
        return torch.split(vector_N, [p.numel() for p in self._parameters])

    def _checked(self, vector_N: Tensor) -> Tensor:
        wanted = ((self.numel,), torch.float32, "cpu")
        given = (tuple(vector_N.shape), vector_N.dtype, vector_N.device.type)
        if given != wanted:
            raise ValueError(f"a vector of {wanted} is needed, this one is {given}")
        return vector_N
