"""Signals that ask a process to end.

One that was ignored when the process began stays ignored: whoever started it, `nohup` for one, or a
shell that runs it in the background of a script, wants it to outlive the terminal.
"""

from __future__ import annotations

import signal


def heeded() -> tuple[signal.Signals, ...]:
    """Those of Ctrl-C, SIGTERM and the terminal's end that are not ignored; to be called first."""
    endings = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return tuple(ending for ending in endings if signal.getsignal(ending) is not signal.SIG_IGN)
