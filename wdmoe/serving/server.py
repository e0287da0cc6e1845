"""Runs the HTTP face until it is cancelled."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import uvicorn

from wdmoe.errors import TransportError
from wdmoe.records import TextEngine
from wdmoe.serving.app import create_app
from wdmoe.serving.closing import Closing
from wdmoe.serving.connections import guarded
from wdmoe.serving.requests import ServingLimits
from wdmoe.tasks import end_tasks

_log = logging.getLogger(__name__)

_FAREWELL_S = 2.0  # for the error events of answers that were cut off at the end of `drain_s`
_QUEUE = 1024  # connections that the system keeps until they are accepted
_AT_ONCE = 64  # that many are accepted before what they sent is read


class _Server(uvicorn.Server):
    """uvicorn, except that signals belong to whoever runs the event loop, and that a burst of connections may wait."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for each in sockets or ():
            each.listen(_QUEUE)  # asyncio has one number for both


async def serve_http(
    engine: TextEngine,
    host: str,
    port: int,
    api_key: str = "",
    *,
    aliases: Sequence[str] = (),
    limits: ServingLimits | None = None,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve until cancelled.

    When cancelled it answers new requests with 503, lets answers go on for `limits.drain_s`, ends the rest with an
    error that their clients can read, and closes the port; a second cancel ends it at once. The engine stays
    open, and has to work until this returns.

    Args:
        engine: answers the requests; the caller owns it.
        host: address or name to bind; anything but the loopback should have an API key.
        port: 0 lets the system choose.
        api_key: wanted from every client; "": none.
        aliases: names that clients may use for the model beside the engine's own.
        limits: bounds on what a client may ask for.
        ready: called with the base URL once connections are accepted.
    Raises:
        TransportError: the address cannot be bound.
    """
    limits = limits or ServingLimits()
    closing = Closing()
    listener = _listen(host, port)
    config = uvicorn.Config(
        create_app(engine, api_key=api_key, aliases=aliases, limits=limits, closing=closing),
        http=guarded(limits),
        backlog=_AT_ONCE,
        log_config=None,
        access_log=False,  # the guard logs requests, with their ids
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=1,  # for what is cancelled although it was told to end
    )
    server = _Server(config)
    url = _url(listener)
    if not api_key and not _is_loopback(listener):
        _log.warning("%s answers anybody who can reach it: set an API key, or bind to 127.0.0.1", url)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        if ready is not None:
            ready(url)  # the socket listens already: who connects now waits for an instant
        await asyncio.shield(serving)
    finally:
        await _stop(server, serving, closing, limits.drain_s)
        listener.close()


async def _stop(server: uvicorn.Server, serving: asyncio.Task[None], closing: Closing, drain_s: float) -> None:
    try:
        if not serving.done():
            await closing.drain(drain_s, _FAREWELL_S)
            server.should_exit = True
            await asyncio.wait([serving], timeout=2 * _FAREWELL_S)
    finally:
        await end_tasks([serving])


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind)
    except OSError as error:
        raise TransportError(f"cannot serve HTTP at {host}:{port}: {error.strerror}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # not held up by connections of a former run
        listener.bind(address)
        listener.listen(128)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise TransportError(f"cannot serve HTTP at {host}:{port}: {error.strerror}") from error
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if listener.family == socket.AF_INET6 else f"http://{host}:{port}"


def _is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback
