"""llama.cpp's programs: where they lie, and a run of one that always ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wdmoe.errors import WdmoeError

SERVERS = ("ggml-rpc-server", "rpc-server")  # by llama.cpp's version
MOST_SHOWN = 200
PARTING_S = 5.0  # what a program may take to end when it is told to


class PeerError(WdmoeError):
    """A program of the peer is missing, fails, hangs, or says what nobody understands."""


@dataclass(frozen=True, slots=True)
class Programs:
    """What a folder holds of llama.cpp."""

    bench: Path
    server: Path
    batched: Path | None  # without it there are no figures of many clients


def find_programs(folder: Path) -> Programs:
    """Look them up.

    Raises:
        PeerError: there is no such folder, or it lacks a program.
    """
    if not folder.is_dir():
        raise PeerError(f"{folder} is not a folder: name the one that holds llama-bench, as in llama.cpp's build/bin")
    bench = _program(folder, "llama-bench")
    server = next((found for name in SERVERS if (found := _program(folder, name))), None)
    if bench is None:
        raise PeerError(
            f"{folder} holds no program llama-bench: build it with cmake --build BUILD --target llama-bench"
        )
    if server is None:
        raise PeerError(f"{folder} holds no program {' or '.join(SERVERS)}: configure llama.cpp with -DGGML_RPC=ON")
    return Programs(bench, server, _program(folder, "llama-batched-bench"))


def _program(folder: Path, name: str) -> Path | None:
    file = folder / name
    return file.resolve() if file.is_file() and os.access(file, os.X_OK) else None


async def run(words: Sequence[str], timeout_s: float, lost: Awaitable[str] | None = None) -> str:
    """Run a program and give its standard output. It and what it started have ended when this returns, or is cancelled.

    Args:
        words: the program and its arguments.
        timeout_s: longest run.
        lost: done when something that the program needs has ended; says what. It is cancelled here.
    Raises:
        PeerError: it cannot be started, fails, or takes too long, or `lost` is done before it.
    """
    name = Path(words[0]).name
    watch = {asyncio.ensure_future(lost)} if lost is not None else set()
    process: Process | None = None
    talk: asyncio.Future[tuple[bytes, bytes]] | None = None
    try:
        process = await _start(words)
        talk = asyncio.ensure_future(process.communicate())
        await asyncio.wait({talk, *watch}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        failed = talk.done() and process.returncode != 0
        if watch and failed:  # for want of what it needs, perhaps
            await asyncio.wait(watch, timeout=1.0)
        for each in watch:
            if each.done():
                raise PeerError(f"{each.result()}, while {name} ran")
        if not talk.done():
            raise PeerError(f"{name} did not end within {timeout_s:g} s; --timeout gives it longer")
        out, err = (part.decode(errors="replace") for part in talk.result())
        if failed:
            raise PeerError(f"{name} {ending(process.returncode)}: {last_line(err) or last_line(out)}")
        return out
    finally:
        if process is not None and talk is not None and not talk.done():
            _kill_all(process)
        rest: list[asyncio.Future[Any]] = [*watch, *([talk] if talk is not None else [])]
        for each in watch:
            each.cancel()
        await asyncio.gather(*rest, return_exceptions=True)


async def _start(words: Sequence[str]) -> Process:
    """In a session of its own: Ctrl-C in a terminal reaches this process alone, which then ends the others in order."""
    try:
        return await asyncio.create_subprocess_exec(
            *words, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, start_new_session=True
        )
    except OSError as error:
        raise PeerError(f"cannot start {words[0]}: {error.strerror or error}") from error


async def end(process: Process) -> None:
    """Tell it to end, and see to it. Nothing happens to one that has ended."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(process.wait(), PARTING_S)
    if process.returncode is None:
        _kill_all(process)
        await process.wait()


def _kill_all(process: Process) -> None:
    """It, and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def ending(code: int | None) -> str:
    """How it ended."""
    return f"ended by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"


def last_line(text: str) -> str:
    """What a program said last, cut short; "" if nothing."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:MOST_SHOWN] if lines else ""
