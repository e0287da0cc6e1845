"""llama.cpp's RPC servers on this machine: they come up together, and end together."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from asyncio.subprocess import DEVNULL, Process
from collections.abc import AsyncIterator
from pathlib import Path

from tools.bench.rivals.programs import PeerError, end, ending, last_line

HOST = "127.0.0.1"


class RpcServers:
    """They run."""

    def __init__(self, hosts: tuple[str, ...], logs: list[Path], processes: list[Process]) -> None:
        self.hosts = hosts
        self._logs, self._processes = logs, processes

    async def lost(self) -> str:
        """Returns when one of them has ended: says which, and how."""
        waits = {asyncio.ensure_future(each.wait()): n for n, each in enumerate(self._processes)}
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return self._told(min(waits[each] for each in done))

    def check(self) -> None:
        """Raises PeerError where one of them has ended."""
        for number, process in enumerate(self._processes):
            if process.returncode is not None:
                raise PeerError(self._told(number))

    def _told(self, number: int) -> str:
        said = last_line(self._logs[number].read_text(errors="replace"))
        how = ending(self._processes[number].returncode)
        return f"the RPC server at {self.hosts[number]} {how}" + (f" ({said})" if said else "")


@contextlib.asynccontextmanager
async def serving(
    program: Path, ports: range, threads: int, folder: Path, timeout_s: float
) -> AsyncIterator[RpcServers]:
    """A server at each of these ports, once all of them listen. They have ended when the block has.

    Args:
        threads: of each.
        folder: for what they print.
        timeout_s: longest wait for them to listen.
    Raises:
        PeerError: a port is taken, or a server cannot be started, ends, or does not listen in time.
    """
    for port in ports:
        _check_free(port)
    servers = RpcServers(tuple(f"{HOST}:{port}" for port in ports), [], [])
    try:
        for port in ports:
            log = folder / f"rpc-server-{port}.log"
            servers._logs.append(log)
            servers._processes.append(await _start(program, port, threads, log))
        await _until_they_listen(servers, ports, timeout_s)
        yield servers
    finally:
        await asyncio.gather(*(end(each) for each in servers._processes))


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise PeerError(f"port {port} is taken: choose another --port, or leave it out") from error


async def _start(program: Path, port: int, threads: int, log: Path) -> Process:
    words = [str(program), "-H", HOST, "-p", str(port), "-t", str(threads)]
    with log.open("wb") as stream:
        try:
            return await asyncio.create_subprocess_exec(
                *words, stdin=DEVNULL, stdout=stream, stderr=stream, start_new_session=True
            )
        except OSError as error:
            raise PeerError(f"cannot start {program}: {error.strerror or error}") from error


async def _until_they_listen(servers: RpcServers, ports: range, timeout_s: float) -> None:
    until_s = time.monotonic() + timeout_s
    for port in ports:
        while not await _listens(port):
            servers.check()
            if time.monotonic() > until_s:
                raise PeerError(f"the RPC server at {HOST}:{port} did not listen within {timeout_s:g} s")
            await asyncio.sleep(0.05)
    servers.check()


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection(HOST, port)
    except OSError:
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True
