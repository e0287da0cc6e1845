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
from wdmoe.serving.requests import ServingLimits

_log = logging.getLogger(__name__)

_FAREWELL_S = 2.0  # for the error events of answers that were cut off at the end of `drain_s`


class _Server(uvicorn.Server):
    """uvicorn, except that signals belong to whoever runs the event loop."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


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

    When cancelled it takes no more requests, lets answers go on for `limits.drain_s`, ends the rest with an
    error that their clients can read, and closes the port; a second cancel ends it at once. The engine stays
    open.

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
    closing = asyncio.Event()
    listener = _listen(host, port)
    config = uvicorn.Config(
        create_app(engine, api_key=api_key, aliases=aliases, limits=limits, closing=closing),
        log_config=None,
        access_log=False,  # the guard logs requests, with their ids
        lifespan="off",
        ws="none",
        server_header=False,
        limit_concurrency=limits.connections,
        timeout_graceful_shutdown=int(limits.drain_s + _FAREWELL_S) + 1,
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


async def _stop(server: uvicorn.Server, serving: asyncio.Task[None], closing: asyncio.Event, drain_s: float) -> None:
    server.should_exit = True
    try:
        await asyncio.wait([serving], timeout=drain_s)
        closing.set()
        await asyncio.wait([serving], timeout=2 * _FAREWELL_S)
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


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
