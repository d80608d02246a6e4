"""How `shoal status` and `shoal stop` talk to a daemon on the same machine.

    GET  /status   -> 200, `Status` as JSON
    POST /stop     -> 202, the daemon leaves politely

Guarantees: bound to 127.0.0.1 only, and every request must carry the daemon's random token, which
is written to a file that only the owner can read; so neither another user nor a web page in the
owner's browser can stop a daemon or look into it. There is no TLS: whoever can read this machine's
loopback traffic has all the rights needed anyway.
"""

from __future__ import annotations

import hmac
import http.client
import json
import secrets
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from peer.homes import DaemonFile
from peer.status import Status

if TYPE_CHECKING:
    from aiohttp import web

_REPLY_BYTES = 64 * 1024


class ControlServer:
    """Serves one daemon's status, in the network's event loop.

    Args:
        status: called for each request, from the loop.
        stop: called when asked to stop, from the loop; must not block.
    """

    def __init__(self, status: Callable[[], Status], stop: Callable[[], None]) -> None:
        self._status = status
        self._stop = stop
        self._runner: web.AppRunner | None = None
        self.token = secrets.token_urlsafe(32)
        self.port = 0

    async def start(self) -> None:
        """Listen on a free port of 127.0.0.1."""
        # Half a second of CPU that neither the client commands nor a demo's peers should pay.
        from aiohttp import web

        @web.middleware
        async def authorise(
            request: web.Request,
            handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
        ) -> web.StreamResponse:
            given = request.headers.get("Authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {self.token}".encode()):
                raise web.HTTPUnauthorized(text="wrong or missing token\n")
            return await handler(request)

        async def status(_: web.Request) -> web.StreamResponse:
            return web.json_response(self._status().to_dict())

        async def stop(_: web.Request) -> web.StreamResponse:
            self._stop()
            return web.json_response({"stopping": True}, status=202)

        application = web.Application(middlewares=[authorise], client_max_size=1024)
        application.router.add_get("/status", status)
        application.router.add_post("/stop", stop)
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def close(self) -> None:
        """Stop listening."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None


def ask_status(daemon: DaemonFile, timeout_s: float = 3.0) -> Status | None:
    """The daemon's status; None when it does not answer properly in time."""
    body = _request(daemon, "GET", "/status", timeout_s)
    if body is None:
        return None
    try:
        fields = json.loads(body)
        return Status.from_dict(fields) if isinstance(fields, dict) else None
    except (ValueError, RecursionError):
        return None


def ask_stop(daemon: DaemonFile, timeout_s: float = 3.0) -> bool:
    """Ask the daemon to leave politely; whether it heard."""
    return _request(daemon, "POST", "/stop", timeout_s) is not None


def _request(daemon: DaemonFile, method: str, path: str, timeout_s: float) -> bytes | None:
    connection = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=timeout_s)
    try:
        connection.request(method, path, headers={"Authorization": f"Bearer {daemon.token}"})
        reply = connection.getresponse()
        body = reply.read(_REPLY_BYTES)
        # 401: the port has been taken over by another daemon since the file was written.
        return body if reply.status in (200, 202) else None
    except (OSError, ValueError, OverflowError, http.client.HTTPException):
        return None  # ValueError, OverflowError: a token that is no header, a port that is none
    finally:
        connection.close()
