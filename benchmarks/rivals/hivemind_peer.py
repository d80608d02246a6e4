"""One peer of a benchmark that averages with hivemind's `DecentralizedAverager`.

hivemind forks, so nothing of ours that has threads may run in this process. The time of the
all-reduce alone is taken inside the averager's own process, around the method that runs it once a
group has been found and writes the averages into the shared tensor; `step()` adds matchmaking and
the way between the processes. All constants are hivemind's defaults, but for matchmaking, which
waits for exactly the peers there are and begins when they are there.

hivemind 1.1.12 cannot decode its own 8-bit formats with numpy 2.4 (`int()` of an array with one
element). `_extract` does that line in a way that both accept.
"""

from __future__ import annotations

import multiprocessing
import time
from typing import Any

import numpy as np
import torch
from hivemind.averaging.averager import DecentralizedAverager
from hivemind.compression import (
    Float16Compression,
    NoCompression,
    Uniform8BitQuantization,
)
from hivemind.compression import quantization as formats
from hivemind.dht import DHT

from benchmarks import lockstep, vectors

COMPRESSION = {
    "fp32": NoCompression,
    "fp16": Float16Compression,
    "uniform8": Uniform8BitQuantization,
}
MATCHMAKING_S = 2.0  # at most; a full group begins at once
REQUEST_S = 1.0  # less than that, as hivemind asks for
STEP_S = 300.0


class Timed(DecentralizedAverager):
    """Notes when the all-reduce itself ran, and how many were begun for one step."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.began = multiprocessing.Value("d", 0.0)  # shared with the process that is forked
        self.ended = multiprocessing.Value("d", 0.0)
        self.begun = multiprocessing.Value("i", 0)
        super().__init__(*arguments, **options)

    async def _run_allreduce_inplace_(self, *arguments: Any, **options: Any) -> None:
        self.begun.value += 1
        self.began.value = time.monotonic()
        await super()._run_allreduce_inplace_(*arguments, **options)
        self.ended.value = time.monotonic()


class Averager:
    """See `lockstep.Averaging`."""

    def __init__(self, arguments: Any, averager: Timed) -> None:
        numbers = arguments.seed, arguments.number, arguments.numel
        self._delta_N = torch.from_numpy(vectors.vector(*numbers))
        self._averager = averager
        self._weight = float(vectors.weight(arguments.number))
        self._peers = arguments.peers

    def prepare(self) -> None:
        """The last average is replaced by the vector."""
        with self._averager.get_tensors() as tensors:
            tensors[0].copy_(self._delta_N)

    def exchange(self) -> dict[str, Any]:
        """A whole step."""
        self._averager.begun.value = 0
        gathered = self._averager.step(weight=self._weight, timeout=STEP_S)
        if gathered is None or len(gathered) != self._peers:
            raise lockstep.Failed(f"a group of {len(gathered or ())}, not {self._peers}")
        return {
            "exchange_began": self._averager.began.value,
            "exchange_ended": self._averager.ended.value,
            "attempts": self._averager.begun.value,
        }

    def result(self) -> tuple[Any, dict[str, Any]]:
        """In the memory where the vector was."""
        with self._averager.get_tensors() as tensors:
            return tensors[0].numpy(), {}


def main() -> None:
    """One peer, until its last round."""
    pipe = lockstep.Pipe()
    arguments = lockstep.peer_arguments()
    torch.set_num_threads(1)
    formats.Quantization.extract = _extract
    dht = DHT(
        host_maddrs=[f"/ip4/{arguments.host}/tcp/0"],
        initial_peers=[arguments.rendezvous] if arguments.rendezvous else [],
        start=True,
    )
    if not arguments.rendezvous:
        pipe.say("at", rendezvous=str(dht.get_visible_maddrs()[0]))
    averager = Timed(
        [torch.zeros(arguments.numel)],
        dht,
        start=True,
        prefix="benchmark",
        target_group_size=arguments.peers,
        min_group_size=arguments.peers,
        min_matchmaking_time=MATCHMAKING_S,
        request_timeout=REQUEST_S,
        compression=COMPRESSION[arguments.codec](),
    )
    lockstep.take_part(pipe, arguments, Averager(arguments, averager))
    averager.shutdown()
    dht.shutdown()


def _extract(self: Any, serialized: Any) -> torch.Tensor:
    """`Quantization.extract`, word for word but for the first `int`."""
    codebook_size = np.frombuffer(serialized.buffer, count=1, dtype=np.int64).item()
    codebook = np.frombuffer(
        serialized.buffer, offset=8, count=codebook_size, dtype=self.codebook_dtype
    )
    quantized = np.frombuffer(
        serialized.buffer, offset=8 + codebook.nbytes, dtype=self.indices_dtype
    )
    quantized = torch.as_tensor(quantized, dtype=torch.int64).reshape(tuple(serialized.size))
    codebook = torch.as_tensor(codebook).to(dtype=getattr(torch, serialized.dtype))
    return codebook[quantized].requires_grad_(serialized.requires_grad)


if __name__ == "__main__":
    main()
