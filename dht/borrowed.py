"""The one door through which hivemind comes in, so that it comes in quietly.

Importing hivemind imports torch (seconds, hundreds of megabytes), installs a log handler of its
own on stderr, renames the level WARNING to "WARN" for the whole process and triggers deprecation
warnings inside torch. Here the import is made without those side effects; its log messages go to
the logger "hivemind", from WARNING up, and from there wherever the program sends its log.

`dht.identity`, `dht.records`, `dht.errors` and `dht.directory` do not import this module.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

with warnings.catch_warnings():
    # torch.jit and multiprocessing deprecations are not about us, and a program run with
    # -W error must still be able to import us.
    warnings.simplefilter("ignore")
    import hivemind.hivemind_cli
    from hivemind.dht.node import DHTNode
    from hivemind.dht.protocol import DHTProtocol, ValidationError
    from hivemind.dht.routing import DHTID
    from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
    from hivemind.dht.validation import DHTRecord, RecordValidatorBase
    from hivemind.p2p import P2P, PeerID
    from hivemind.p2p.p2p_daemon_bindings.utils import (
        P2PDaemonError,
        read_pbmsg_safe,
        write_pbmsg,
    )
    from hivemind.proto import p2pd_pb2
    from hivemind.utils.logging import use_hivemind_log_handler
    from hivemind.utils.multiaddr import Multiaddr
    from hivemind.utils.serializer import MSGPackSerializer
    from hivemind.utils.timed_storage import ValueWithExpiration

use_hivemind_log_handler("nowhere")
logging.addLevelName(logging.WARNING, "WARNING")
logging.getLogger("hivemind").setLevel(logging.WARNING)

P2PD = Path(hivemind.hivemind_cli.__file__).with_name("p2pd")
"""The libp2p daemon's executable, as shipped with hivemind."""

__all__ = [
    "DHTID",
    "P2P",
    "P2PD",
    "DHTLocalStorage",
    "DHTNode",
    "DHTProtocol",
    "DHTRecord",
    "DictionaryDHTValue",
    "MSGPackSerializer",
    "Multiaddr",
    "P2PDaemonError",
    "PeerID",
    "RecordValidatorBase",
    "ValidationError",
    "ValueWithExpiration",
    "p2pd_pb2",
    "read_pbmsg_safe",
    "write_pbmsg",
]
