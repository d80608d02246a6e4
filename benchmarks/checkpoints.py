"""Seconds and bytes to save and load the state of a model.

    python benchmarks/checkpoints.py --mb 1024 --folder /var/tmp

Saves in a fresh folder below `--folder`, so that the disk under it is what is measured, and removes
it. A save ends with fsync. Loads come out of the page cache, unless the state is larger than that.
"""

from __future__ import annotations

import resource
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.arguments import Parser, at_least, existing_folder, megabytes
from coordinator_free import certificates
from coordinator_free.checkpoints import CheckpointStore
from coordinator_free.messages import NO_DIGEST, Member
from coordinator_free.outer import OuterConfig, OuterOptimizer
from coordinator_free.state import Shape, State
from dht.identity import Identity

RUN = "ab" * 20


def main() -> None:
    """Parse the command line and print one line per save and load."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=megabytes, default=1024, help="MB of float32 parameters")
    parser.add_argument("--runs", type=at_least(1), default=3)
    parser.add_argument("--folder", type=existing_folder, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    numel = int(arguments.mb * 1e6 / 4)
    shape = Shape.of("bench", numel, 1, OuterOptimizer(OuterConfig()))
    state = State.of(shape, [[torch.randn(length) for length in each] for each in shape.lengths])
    founder = Identity.generate()
    me = Member(
        peer_id=founder.peer_id,
        session=1,
        hosts=("localhost",),
        port=1,
        certificate_sha256=NO_DIGEST,
        can_reduce=True,
    )
    chain_end = (certificates.found(RUN, me, founder, state.root),)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        store = CheckpointStore(Path(folder) / "run", run_id=RUN, shape=shape, keep=1)
        before_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        for _ in range(arguments.runs):
            began, worked = time.perf_counter(), time.process_time()
            path = store.save(state, chain_end)
            print(
                f"save {time.perf_counter() - began:.2f} s,"
                f" cpu {time.process_time() - worked:.2f} s, {path.stat().st_size} bytes"
            )
        after_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        print(f"peak memory grew by {after_mb - before_mb:.0f} MB while saving")
        for _ in range(arguments.runs):
            began = time.perf_counter()
            loaded = store.newest()
            print(f"load {time.perf_counter() - began:.2f} s")
            assert loaded is not None
            assert loaded.state.root == state.root
            del loaded


if __name__ == "__main__":
    main()
