"""Named tensors of somebody's own as one flat vector (`local.Parameters`).

Guaranteed: `write` followed by `read` returns the same bits, in whatever order the memory has the
elements; a span touches only itself. The daemon's models have `model.vector`, which may not be
imported here, as this package must not depend on a folder called `model` (a user may have one).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator

import torch
from blake3 import blake3
from torch import Tensor, nn

from coordinator_free.gradient import TensorSpec
from dht.errors import ConfigError


class FlatTensors:
    """Reads and writes them all, and adds up their gradients.

    Args:
        tensors: a module, or (name, tensor) pairs, in an order that is the same in all peers;
            float32, each once.
        hidden: the matrices that Muon takes in gradient mode; None: all but a module's embeddings
            and what it calls its output embeddings.

    Raises:
        ConfigError: there is none, or one that cannot be averaged.
    """

    def __init__(
        self,
        tensors: nn.Module | Iterable[tuple[str, Tensor]],
        hidden: Iterable[Tensor] | None = None,
    ) -> None:
        self._named = _named(tensors)
        self._starts: list[int] = []
        self.numel = 0
        for tensor in self._named.values():
            self._starts.append(self.numel)
            self.numel += tensor.numel()
        if not self.numel:
            raise ConfigError("there are no parameters to train")
        self._hidden = self._matrices(tensors, hidden)
        self._sum_N: Tensor | None = None
        self._samples = 0

    def _matrices(
        self, tensors: nn.Module | Iterable[tuple[str, Tensor]], hidden: Iterable[Tensor] | None
    ) -> set[int]:
        """Which are Muon's, by their `id`."""
        ours = {id(tensor): tensor for tensor in self._named.values()}
        if hidden is not None:
            chosen = [id(tensor) for tensor in hidden]
            if any(key not in ours or ours[key].ndim != 2 for key in chosen):
                raise ConfigError("hidden_matrices has what is no matrix of this model")
            return set(chosen)
        outer = _outer(tensors) if isinstance(tensors, nn.Module) else set()
        return {key for key, tensor in ours.items() if tensor.ndim == 2} - outer

    def layout(self, *, in_step: bool) -> str:
        """Hex digest of what the vector means; equal in all peers of a run.

        Args:
            in_step: all take the same optimizer step, so they must agree on what is trained and
                how. Else that is each peer's own business.
        """
        shapes: list[object] = [[name, list(t.shape)] for name, t in self._named.items()]
        if in_step:
            shapes += [[spec.matrix, spec.decay] for spec in self.specs()]
        return blake3(json.dumps(shapes).encode()).hexdigest(length=16)

    def specs(self) -> tuple[TensorSpec, ...]:
        """What is where; what is not trained does not decay either."""
        return tuple(
            TensorSpec(
                name=name,
                start=start,
                shape=tuple(tensor.shape),
                matrix=tensor.requires_grad and id(tensor) in self._hidden,
                decay=tensor.requires_grad and tensor.ndim >= 2,
            )
            for start, (name, tensor) in zip(self._starts, self._named.items(), strict=True)
        )

    def has(self, tensor: Tensor) -> bool:
        """Whether it is one of these."""
        return any(tensor is each for each in self._named.values())

    @torch.no_grad()
    def read(self, out_S: Tensor, /, *, start: int, stop: int) -> Tensor:
        """Copy elements start .. stop out."""
        for tensor, first, last, part in self._parts(out_S, start, stop):
            part.copy_(tensor.reshape(-1)[first:last])
        return out_S

    @torch.no_grad()
    def write(self, vector_S: Tensor, /, *, start: int, stop: int) -> None:
        """Overwrite elements start .. stop."""
        for tensor, first, last, part in self._parts(vector_S, start, stop):
            if part.numel() == tensor.numel():
                tensor.copy_(part.view_as(tensor))
            elif tensor.is_contiguous():
                tensor.view(-1)[first:last].copy_(part)
            else:  # cut through in the vector's order, which is not the memory's
                whole = tensor.reshape(-1)
                whole[first:last].copy_(part)
                tensor.copy_(whole.view_as(tensor))

    @torch.no_grad()
    def accumulate(self, samples: int) -> None:
        """Add the gradients, means over so many samples, to those before, and clear them."""
        if self._sum_N is None:
            self._sum_N = torch.zeros(self.numel)
        for tensor, _, _, part in self._parts(self._sum_N, 0, self.numel):
            gradient, tensor.grad = tensor.grad, None
            if gradient is not None:
                dense = gradient.to_dense() if gradient.is_sparse else gradient
                part.add_(dense.reshape(-1).cpu(), alpha=samples)
        self._samples += samples

    def gradient(self, out_N: Tensor, /) -> Tensor:
        """The mean gradient over all samples since the last call."""
        assert self._sum_N is not None
        torch.div(self._sum_N, self._samples, out=out_N)
        self._sum_N.zero_()
        self._samples = 0
        return out_N

    def _parts(
        self, vector_S: Tensor, start: int, stop: int
    ) -> Iterator[tuple[Tensor, int, int, Tensor]]:
        """Each tensor that the span meets, from and to which of its elements, and those."""
        for at, tensor in zip(self._starts, self._named.values(), strict=True):
            first, last = max(start - at, 0), min(stop - at, tensor.numel())
            if first < last:
                yield tensor, first, last, vector_S[at + first - start : at + last - start]


def _named(tensors: nn.Module | Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    pairs = list(tensors.named_parameters() if isinstance(tensors, nn.Module) else tensors)
    if not all(
        isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], Tensor) for pair in pairs
    ):
        raise ConfigError("parameters: give the module, or pairs as model.named_parameters() has")
    named = {str(name): tensor for name, tensor in pairs}
    if len(named) < len(pairs) or len({id(tensor) for tensor in named.values()}) < len(pairs):
        raise ConfigError("parameters: a name or a tensor is there twice")
    for name, tensor in named.items():
        if tensor.dtype != torch.float32:
            raise ConfigError(
                f"parameter {name} is {tensor.dtype}: keep parameters in float32, and use"
                " torch.autocast for bf16"
            )
    return named


def _outer(module: nn.Module) -> set[int]:
    """Embeddings and the head, as far as a module says which they are."""
    found = {id(each.weight) for each in module.modules() if isinstance(each, nn.Embedding)}
    head: Callable[[], object] | None = getattr(module, "get_output_embeddings", None)
    last = head() if head is not None else None
    return found | ({id(p) for p in last.parameters()} if isinstance(last, nn.Module) else set())
