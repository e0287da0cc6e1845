"""The spawner as the front sees it: starts engines and says how they ended."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wdmoe.config import StationSettings
from wdmoe.errors import EngineLostError
from wdmoe.nodes.supervised.plain import heard, pack, unpacker

MODULE = "wdmoe.nodes.supervised.spawner"
_NOT_FROM_HERE = f"import sys; sys.path[:] = filter(None, sys.path); from {MODULE} import main; main()"  # -P is 3.11's
_READ_BYTES = 1 << 16
_END_S = 2.0


class SpawnerLink:
    """Made by `open`. One order at a time; engines that it started end with it."""

    def __init__(self, process: subprocess.Popen[bytes], orders: socket.socket) -> None:
        self._process, self._orders = process, orders
        self._unpacker = unpacker()

    @classmethod
    async def open(cls) -> SpawnerLink:
        """Start one, and wait for the seconds that its imports take. Call on the main thread, which it ends with.

        Raises:
            EngineLostError: it ended.
        """
        ours, its = socket.socketpair()
        with its:
            process = _spawn(its.fileno())
        ours.setblocking(False)
        made = cls(process, ours)
        try:
            await made._hear("ready")
        except BaseException:
            process.kill()  # it may be in the middle of its imports
            await made.close()
            raise
        return made

    async def start(
        self,
        end: socket.socket,
        settings: StationSettings,
        logs: Mapping[str, Any],
        barred: Collection[str],
        first: bool,
    ) -> None:
        """Start an engine on one end of a socket pair; see `run_engine`. Raises EngineLostError."""
        order = pack(("start", settings, logs, tuple(barred), first))
        with _as_lost():
            socket.send_fds(self._orders, [order], [end.fileno()])
        await self._hear("started")

    async def reap(self) -> int:
        """Wait for the end of the engine. Its exit code, or the negative number of a signal. Raises EngineLostError."""
        await self._tell("reap")
        return int((await self._hear("ended"))[0])

    async def warm(self, modules: Sequence[str]) -> None:
        """Have these imported, when there is time. Raises EngineLostError."""
        await self._tell("warm", modules)

    async def close(self) -> None:
        """End it, and with it the engine. It may take a moment to bury that itself, which not every system would."""
        self._orders.close()
        try:
            await asyncio.to_thread(self._process.wait, _END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)

    async def _tell(self, *message: object) -> None:
        with _as_lost():
            await asyncio.get_running_loop().sock_sendall(self._orders, pack(message))

    async def _hear(self, wanted: str) -> Sequence[Any]:
        while True:
            for kind, *words in self._unpacker:
                if kind == "failed":
                    raise heard(*words)
                if kind == wanted:
                    return list(words)
            with _as_lost():
                data = await asyncio.get_running_loop().sock_recv(self._orders, _READ_BYTES)
                if not data:
                    raise EOFError
            self._unpacker.feed(data)


def _spawn(orders: int) -> subprocess.Popen[bytes]:
    # The working folder may hold wdmoe's source without what was compiled, as after pip install in a clone. Python
    # would look there first, while the settings' relative paths need this folder.
    here = Path(__file__).resolve().parents[3] == Path.cwd().resolve()
    start = ["-m", MODULE] if here else ["-c", _NOT_FROM_HERE]
    words = [sys.executable, *start, str(os.getpid()), str(orders)]
    # In a session of its own: Ctrl-C in a terminal is for the front, which ends the others in order.
    return subprocess.Popen(words, stdin=subprocess.DEVNULL, pass_fds=[orders], start_new_session=True)


@contextmanager
def _as_lost() -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError) as error:
        raise EngineLostError("the process that starts engines ended") from error
