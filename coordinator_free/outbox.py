"""Messages on their way out: one ordered queue for each peer, and a verdict on every delivery.

A slow or dead peer holds up nobody but itself. Nothing here is reliable: the machine says again
what matters, so a queue that is full or whose peer is gone is emptied, and what is said again while
it is still on its way is not sent twice: where a round trip is longer than the machine's patience,
every new message would wait behind copies of old ones.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from coordinator_free import wire
from coordinator_free.contact import Contact
from coordinator_free.messages import Message
from coordinator_free.transport import Client
from dht.errors import Declined, PeerError

logger = logging.getLogger(__name__)

QUEUED = 64  # messages for one peer
IDLE_S = 60.0  # after which a peer's queue is taken down


class Outbox:
    """Delivers messages in order, peer by peer.

    Args:
        client: carries them.
        tasks: owns one task for each peer that there is something for.
        deliver_s: deadline of one delivery.
        on_delivered: called with the peer after each success.
        on_failed: called with the peer after each failure.
    """

    def __init__(
        self,
        *,
        client: Client,
        tasks: asyncio.TaskGroup,
        deliver_s: float,
        on_delivered: Callable[[str], None],
        on_failed: Callable[[str], None],
    ) -> None:
        self._client = client
        self._tasks = tasks
        self._deliver_s = deliver_s
        self._on_delivered = on_delivered
        self._on_failed = on_failed
        self._queues: dict[str, asyncio.Queue[tuple[Contact, Message]]] = {}
        # By peer and kind, the newest message that waits or is under way.
        self._newest: dict[str, dict[type[Message], tuple[Contact, Message]]] = {}

    def send(self, contact: Contact, message: Message) -> None:
        """Put a message into its peer's queue; the oldest one gives way when it is full.

        What is said again, word for word, while it is there or under way, is not put in. Once the
        tasks are being ended, nothing is sent any more.
        """
        queue = self._queues.get(contact.peer_id)
        if queue is None:
            queue = asyncio.Queue(QUEUED)
            delivering = self._deliver_all(contact.peer_id, queue)
            try:
                self._tasks.create_task(delivering)
            except RuntimeError:  # a call was answered while the session broke off
                delivering.close()
                return
            self._queues[contact.peer_id] = queue
            self._newest[contact.peer_id] = {}
        newest = self._newest[contact.peer_id]
        # Only behind nothing else of its kind: what was taken back in between must be said again.
        if newest.get(type(message)) == (contact, message):
            return
        if queue.full():
            self._end(contact.peer_id, queue.get_nowait())
            queue.task_done()
        newest[type(message)] = entry = (contact, message)
        queue.put_nowait(entry)

    def _end(self, peer: str, entry: tuple[Contact, Message]) -> None:
        """This one is neither waiting nor under way any more."""
        newest = self._newest[peer]
        if newest.get(type(entry[1])) is entry:
            del newest[type(entry[1])]

    async def flush(self) -> None:
        """Wait until everything was delivered or given up."""
        await asyncio.gather(*(queue.join() for queue in self._queues.values()))

    async def _deliver_all(self, peer: str, queue: asyncio.Queue[tuple[Contact, Message]]) -> None:
        try:
            while True:
                async with asyncio.timeout(IDLE_S):
                    entry = await queue.get()
                contact, message = entry
                try:
                    try:
                        await self._client.deliver(contact, wire.encode(message), self._deliver_s)
                    finally:
                        self._end(peer, entry)  # before the verdict: one may send because of that
                except Declined as error:
                    # It is there, only too busy: to take that for a death would replace leaders.
                    logger.debug("outbox.declined %s: %s", type(message).__name__, error)
                except PeerError as error:
                    logger.debug("outbox.failed %s: %s", type(message).__name__, error)
                    while not queue.empty():
                        queue.get_nowait()
                        queue.task_done()
                    self._newest[peer].clear()
                    self._on_failed(peer)
                except ValueError as error:
                    # Our own message is over-long: a roster of thousands. Not the partner's fault.
                    logger.error("outbox.not_sent %s: %s", type(message).__name__, error)
                else:
                    self._on_delivered(peer)
                queue.task_done()
        except TimeoutError:
            # No await between the verdict that it is idle and its removal.
            del self._queues[peer], self._newest[peer]
