"""Download of expert files over the control plane: in chunks, a few at a time, verified at the end."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Iterator

from wdmoe.errors import ExpertError, TransportError
from wdmoe.nodes.device.rules import WantedExpert
from wdmoe.records import ExpertId
from wdmoe.tasks import in_thread, run_together, within
from wdmoe.transport.codec.messages import Chunk, Fetch

log = logging.getLogger(__name__)

CHUNK_BYTES = 256 << 10
OUTSTANDING = 4  # chunks asked for and not here yet, over all files
CHUNK_TRIES = 3
FILE_TRIES = 3
CHUNK_PATIENCE_S = 10.0
SMALL_BYTES = 64 << 10  # hashed in 0.1 ms

Spot = tuple[ExpertId, int]  # a file and an offset in it


async def _digest(data: bytes) -> str:
    """SHA-256 in hex. A hop to a thread and back takes longer than that of a small file."""
    if len(data) <= SMALL_BYTES:
        return hashlib.sha256(data).hexdigest()
    return await in_thread(lambda: hashlib.sha256(data).hexdigest())


class ExpertFetcher:
    """Asks for chunks and puts them together, for one session. Its owner hands chunks to `accept`."""

    def __init__(self, send: Callable[[Fetch], Awaitable[None]], patience_s: float = CHUNK_PATIENCE_S) -> None:
        self._send = send
        self._patience_s = patience_s
        self._slots = asyncio.Semaphore(OUTSTANDING)
        self._awaited: dict[Spot, asyncio.Future[Chunk]] = {}

    def accept(self, chunk: Chunk) -> None:
        """Take a chunk that arrived. One that nobody waits for is dropped."""
        future = self._awaited.get((ExpertId(chunk.layer, chunk.expert), chunk.offset))
        if future is not None and not future.done():
            future.set_result(chunk)

    async def fetch(self, wanted: WantedExpert) -> bytes:
        """Download one file.

        Returns:
            Bytes with the hash and size that were wanted.
        Raises:
            ExpertError: it didn't come, or came wrong, several times.
        """
        for _ in range(FILE_TRIES):
            data = await self._download(wanted)
            if await _digest(data) == wanted.sha256:
                return data
            log.warning("layer %d expert %d arrived damaged; asking for it again", *wanted.expert)
        raise ExpertError(f"layer {wanted.expert.layer} expert {wanted.expert.expert} arrived damaged every time")

    async def _download(self, wanted: WantedExpert) -> bytes:
        buffer = bytearray(wanted.size)
        offsets = range(0, wanted.size, CHUNK_BYTES)
        rest = iter(offsets)
        await run_together(*(self._fill(wanted, buffer, rest) for _ in range(min(OUTSTANDING, len(offsets)))))
        return bytes(buffer)

    async def _fill(self, wanted: WantedExpert, buffer: bytearray, offsets: Iterator[int]) -> None:
        for offset in offsets:
            length = min(CHUNK_BYTES, wanted.size - offset)
            buffer[offset : offset + length] = await self._chunk(wanted, offset, length)

    async def _chunk(self, wanted: WantedExpert, offset: int, length: int) -> memoryview:
        reason = "no answer"
        for _ in range(CHUNK_TRIES):
            try:
                chunk = await self._ask(wanted.expert, offset, length)
            except asyncio.TimeoutError:
                reason = "no answer"
            except TransportError as error:
                reason = str(error)
                await asyncio.sleep(self._patience_s / 10)  # a queue that is full drains in less
            else:
                if chunk.total == wanted.size and len(chunk.data) == length:
                    return memoryview(chunk.data.data)
                reason = f"got {len(chunk.data)} bytes of {chunk.total}, wanted {length} of {wanted.size}"
        raise ExpertError(f"layer {wanted.expert.layer} expert {wanted.expert.expert} can't be fetched: {reason}")

    async def _ask(self, expert: ExpertId, offset: int, length: int) -> Chunk:
        key = (expert, offset)
        async with self._slots:
            self._awaited[key] = future = asyncio.get_running_loop().create_future()
            try:
                await self._send(Fetch(layer=expert.layer, expert=expert.expert, offset=offset, length=length))
                return await within(self._patience_s, future)
            finally:
                del self._awaited[key]
