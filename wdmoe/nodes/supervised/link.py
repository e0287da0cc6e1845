"""One end of the private socket between two processes of a base station: whole messages, in order, until it is cut."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any, TypeAlias

from wdmoe.nodes.supervised.plain import pack, unpacker

Message: TypeAlias = tuple[Any, ...]


class Link(asyncio.Protocol):
    """Sends and hears messages of `plain`. A message to an end that is gone is dropped: `lost` says so."""

    _transport: asyncio.WriteTransport

    def __init__(self, heard: Callable[[Message], None], lost: Callable[[], None]) -> None:
        """Both are called on the loop: `heard` for each message, `lost` once, at the end."""
        self._heard, self._lost = heard, lost
        self._unpacker = unpacker()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio's."""
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        """asyncio's."""
        self._unpacker.feed(data)
        for message in self._unpacker:
            self._heard(message)

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio's."""
        self._lost()

    def send(self, *message: object) -> None:
        """Send soon."""
        if not self._transport.is_closing():
            self._transport.write(pack(message))

    def close(self) -> None:
        """Cut it once everything is sent."""
        self._transport.close()


async def open_link(end: socket.socket, heard: Callable[[Message], None], lost: Callable[[], None]) -> Link:
    """A link over one end of a socket pair, which it owns from now on."""
    end.setblocking(False)
    loop = asyncio.get_running_loop()
    _, link = await loop.create_unix_connection(lambda: Link(heard, lost), sock=end)
    return link
