"""One of our own peers in a benchmark: a real `Session`, with the DHT, TLS and real rounds.

It hands in its vector at once instead of training.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import lockstep, vectors
from coordinator_free.average import contributors
from coordinator_free.config import RoundConfig
from coordinator_free.outer import OuterConfig, OuterOptimizer
from coordinator_free.session import Session, SessionConfig
from dht.identity import Identity
from dht.kademlia import KademliaConfig, KademliaDirectory

RUN = "5b" * 20
EXCHANGE_S = 300.0


class Rounds:
    """See `lockstep.Averaging`."""

    def __init__(self, arguments: argparse.Namespace, session: Session, me: str) -> None:
        self._session = session
        self._me = me
        self._seed = arguments.seed
        # Who has which vector; all are in the run before the first result is looked at.
        self._names = [name_file(arguments.folder, number) for number in range(arguments.peers)]
        self._samples = vectors.weight(arguments.number)
        numbers = arguments.seed, arguments.number, arguments.numel
        self._delta_N = torch.from_numpy(vectors.vector(*numbers))

    def prepare(self) -> None:
        """Training that nobody does."""
        if self._session.next_assignment() is None:
            raise lockstep.Failed("the session ended before its last round")

    def exchange(self) -> dict[str, Any]:
        """A whole round."""
        self._session.hand_in(self._delta_N, self._samples)
        result = self._session.result()
        return {
            "exchange_s": result.allreduce_s,
            "bytes_sent": result.bytes_sent,
            "bytes_received": result.bytes_received,
            "state": result.digest,
        }

    def result(self) -> tuple[Any, dict[str, Any]]:
        """The average that the newest certificate names, and how much of this peer's is in it.

        Where somebody sent a part only, with the exact mean of what was sent.
        """
        certificate, average = self._session.newest
        if average is None:
            raise lockstep.Failed("the average is not held any more")
        who = contributors(average, certificate.outcome.contributions)
        names = [{contribution.peer_id for contribution in present} for present in who]
        elements = [chunk.elements for chunk in average.chunks]
        there = sum(
            count for count, present in zip(elements, names, strict=True) if self._me in present
        )
        more: dict[str, Any] = {"fraction": there / average.numel}
        numbers = {path.read_text(): number for number, path in enumerate(self._names)}
        if any(len(present) < len(numbers) for present in names):
            ends = list(itertools.accumulate(elements))
            spans = [
                (end - count, end, [numbers[name] for name in present])
                for end, count, present in zip(ends, elements, names, strict=True)
            ]
            more["means"] = vectors.mean_of_sent(self._seed, spans)
        return average.values().numpy(), more


def name_file(folder: Path, number: int) -> Path:
    """Where a peer writes its id, for those who check what is in an average."""
    return folder / f"name-{number}"


def main() -> None:
    """One peer, until its last round."""
    pipe = lockstep.Pipe()
    arguments = lockstep.peer_arguments()
    torch.set_num_threads(1)

    def train(session: Session, me: str) -> None:
        try:
            lockstep.take_part(pipe, arguments, Rounds(arguments, session, me))
        except BaseException:  # this thread's end: nothing else would say so
            traceback.print_exc()
        finally:
            session.stop()

    asyncio.run(network(pipe, arguments, train))


async def network(
    pipe: lockstep.Pipe, arguments: argparse.Namespace, train: Callable[[Session, str], None]
) -> None:
    """What `peer` does around a session, without the parts that training needs."""
    path = arguments.folder / f"identity-{arguments.number}"
    identity = Identity.load_or_create(path)
    name_file(arguments.folder, arguments.number).write_text(identity.peer_id)
    known = arguments.rendezvous  # the first peer's address; nobody's for itself
    config = KademliaConfig(
        identity_path=path, host=arguments.host, initial_peers=(known,) if known else ()
    )
    async with KademliaDirectory.open(config) as directory:
        if not known:
            pipe.say("at", rendezvous=directory.maddrs[0])
        session = Session(
            SessionConfig(
                run_id=RUN,
                creator=known.rsplit("/", 1)[1] if known else identity.peer_id,
                layout="benchmark",
                numel=arguments.numel,
                round=RoundConfig(
                    start_peers=arguments.peers,
                    rounds=0,  # a run that ends closes its connections, and with them their counts
                    codec=arguments.codec,
                    quorum=1.0,  # a round without somebody would not be the same work
                    exchange_s=EXCHANGE_S,
                ),
                optimizer=OuterOptimizer(OuterConfig()),
                host=arguments.host,
                announce_hosts=(arguments.host,),
            ),
            identity=identity,
            directory=directory,
        )
        trainer = threading.Thread(target=train, args=(session, identity.peer_id), daemon=True)
        trainer.start()
        initial_N = None if known else torch.zeros(arguments.numel)
        await session.run(initial_N, lambda: directory.maddrs)
        await asyncio.to_thread(trainer.join)


if __name__ == "__main__":
    main()
