"""Commands on standard input, from the program that started this one: which they are, says `base_station.commands`.

Each is a JSON object on one line, which nobody but the parent can write; each is answered by one line.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Mapping

MARK = "Done: "  # before each answer on standard output


async def obey(do: Callable[[bytes], Awaitable[Mapping[str, object]]], answer: Callable[[str], None]) -> None:
    """Do what standard input says until it ends.

    Args:
        do: obeys one line.
        answer: called with one line for each command.
    """
    lines = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(lines), sys.stdin
    )
    try:
        while line := await lines.readline():
            answer(MARK + json.dumps(await do(line)))
    finally:
        transport.close()
