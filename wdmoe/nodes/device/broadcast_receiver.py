"""A device's part in a semantic broadcast: tune in, hear, decode, give the picture back.

The air does not wait: one coroutine only takes in what is heard, another decodes at its own pace, in a worker thread.
Nothing that computes is on the event loop, so the session goes on beating.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import Pixels
from wdmoe.broadcast.codec.png import png_bytes
from wdmoe.broadcast.codec.reception import Reception, SymbolStore, plan_reception
from wdmoe.broadcast.codec.tiling import Blender
from wdmoe.errors import ExpertError, PeerBusyError, ProtocolError, TransportError, WdmoeError
from wdmoe.nodes.device.broadcast_decoder import OnnxDecoder
from wdmoe.nodes.device.expert_cache import ExpertCache
from wdmoe.nodes.device.rules import WantedExpert
from wdmoe.records import ExpertId
from wdmoe.tasks import in_thread, run_together, run_until_first, within
from wdmoe.transport.codec.messages import Failure, Message, Pilot, Rows, Shown, Symbols, Tune, Tuned
from wdmoe.transport.zmq.pubsub import Tuner

log = logging.getLogger(__name__)

DECODER = ExpertId(0, 0)  # what the decoder is fetched as: a broadcast has no experts
SILENCE_S = 20.0  # without a Pilot: the rest is lost
BUSY_S = 30.0  # that a station may take nothing in
_AGAIN_S = 0.02
_BATCH = 32  # blocks decoded at once
_ROWS_BYTES = 256 << 10

Fetch: TypeAlias = Callable[[WantedExpert], Awaitable[bytes]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class RadioSite:
    """What a device has for broadcasts, over all its sessions."""

    open_tuner: Callable[[int], Tuner]  # of a port; the caller closes it
    cache: ExpertCache
    threads: int
    save: Path | None  # folder for pictures


class Radio:
    """Hears the newest broadcast that a station names, for one session."""

    def __init__(self, site: RadioSite, fetch: Fetch, send: Send) -> None:
        self._site, self._fetch, self._send = site, fetch, send
        self._tune: Tune | None = None
        self._tuned = asyncio.Event()

    def tune(self, tune: Tune) -> None:
        """A station says what to hear; it repeats that."""
        if self._tune is None or tune.broadcast != self._tune.broadcast:
            self._tune = tune
            self._tuned.set()

    async def run(self) -> None:
        """Hear broadcasts until cancelled. What goes wrong with one is told to the station."""
        while True:
            await self._tuned.wait()
            self._tuned.clear()
            if self._tune is not None:
                await run_until_first(self._hear(self._tune), self._tuned.wait())

    async def _hear(self, tune: Tune) -> None:
        try:
            await Listening(plan_reception(tune), self._site, self._fetch, self._send).run()
        except WdmoeError as error:
            log.warning("gave up a broadcast: %s", error)
            try:
                await self._send(Failure(attempt=tune.broadcast, reason=str(error)))
            except WdmoeError as again:  # the session ends, and tells the station enough
                log.debug("could not tell the station: %s", again)


class Listening:
    """One broadcast, from the decoder to the last row."""

    def __init__(self, reception: Reception, site: RadioSite, fetch: Fetch, send: Send) -> None:
        self._reception, self._tune = reception, reception.tune
        self._site, self._fetch, self._send = site, fetch, send
        self._store = SymbolStore(reception)
        self._blender = Blender(reception.grid)
        self._news = asyncio.Event()
        self._kept: list[Pixels] = []  # where pictures are saved
        self._row = 0  # given back so far
        self._decode_s = 0.0

    async def run(self) -> None:
        """Hear it to its end.

        Raises:
            ExpertError: there is no decoder, or it fails.
            ProtocolError: what is said does not fit.
            ConfigError: symbols of another power.
            RefusedError: this device may not listen.
            TransportError: the station takes nothing in.
        """
        decoder = await self._open_decoder()
        tuner = self._site.open_tuner(self._tune.port)
        try:
            await run_together(self._take_in(tuner), self._decode(decoder))
        finally:
            tuner.close()

    async def _open_decoder(self) -> OnnxDecoder:
        tune, cache = self._tune, self._site.cache
        data = await in_thread(lambda: cache.get(tune.decoder_sha256))
        if data is None:
            try:
                data = await self._fetch(WantedExpert(DECODER, tune.decoder_sha256, tune.decoder_bytes))
            except ExpertError as error:
                raise ExpertError(f"could not fetch the decoder: {error}") from error
            fetched = data
            await in_thread(lambda: cache.put(tune.decoder_sha256, fetched))
        found = data
        decoder = await in_thread(lambda: OnnxDecoder(found, self._site.threads))
        kept, rest = divmod(tune.uses, decoder.tokens)
        if rest or not 1 <= kept <= decoder.slots:
            raise ProtocolError(f"blocks of {tune.uses} uses do not fit a decoder of {decoder.tokens} tokens")
        return decoder

    # ---- hearing

    async def _take_in(self, tuner: Tuner) -> None:
        while not self._store.whole:
            try:
                message = (await within(SILENCE_S, tuner.receive())).message
            except asyncio.TimeoutError:
                log.warning("heard nothing for %.0f s: the rest is lost", SILENCE_S)
                self._store.end(self._tune.blocks)
            else:
                await self._note(message)
            self._news.set()

    async def _note(self, message: Message) -> None:
        if isinstance(message, Symbols) and message.broadcast == self._tune.broadcast:
            self._store.take(message)
        elif isinstance(message, Pilot) and message.broadcast == self._tune.broadcast:
            if message.sent == 0:
                await self._deliver(Tuned(broadcast=self._tune.broadcast))
            self._store.end(message.sent)

    # ---- decoding

    async def _decode(self, decoder: OnnxDecoder) -> None:
        place = 0
        while place < self._reception.tiles:
            numbers, symbols, following = self._store.batch(place, _BATCH)
            if following == place:
                self._news.clear()
                await self._news.wait()
                continue
            place = following
            await self._give(await in_thread(lambda: self._shown(decoder, numbers, symbols)))  # noqa: B023
        await self._give(await in_thread(self._blender.finish))
        store = self._store
        heard = self._reception.tiles - store.lost
        log.info("heard %d of %d blocks", heard, self._reception.tiles)
        await self._deliver(
            Shown(broadcast=self._tune.broadcast, heard=heard, lost=store.lost, decode_s=self._decode_s)
        )
        await in_thread(self._save)

    def _shown(self, decoder: OnnxDecoder, numbers: npt.NDArray[np.int64], symbols: npt.NDArray[np.float16]) -> Pixels:
        """The rows that some blocks complete. On a worker thread."""
        if not numbers.size:
            return np.empty((0, self._tune.width, 3), np.uint8)
        heard, snr_db = zip(
            *(self._reception.ear.hear(int(number), block) for number, block in zip(numbers, symbols, strict=True)),
            strict=True,
        )
        share = self._reception.shares(0, int(numbers[-1]) + 1)[numbers]
        began_s = time.perf_counter()
        kept = self._tune.uses // decoder.tokens
        tiles = decoder.run(np.stack(heard), np.array(snr_db, np.float32), share, kept, self._tune.user)
        self._decode_s += time.perf_counter() - began_s
        return np.concatenate(
            [self._blender.add(int(number), tile) for number, tile in zip(numbers, tiles, strict=True)]
        )

    # ---- giving back

    async def _give(self, rows: Pixels) -> None:
        step = max(1, _ROWS_BYTES // (3 * self._tune.width))
        for first in range(0, len(rows), step):
            part = np.ascontiguousarray(rows[first : first + step])
            await self._deliver(Rows(broadcast=self._tune.broadcast, first=self._row, pixels=part))
            self._row += len(part)
            if self._site.save is not None:
                self._kept.append(part)

    async def _deliver(self, message: Message) -> None:
        """Send what must arrive: wait while the queue is full.

        Raises:
            TransportError: it stays full.
        """
        until_s = time.monotonic() + BUSY_S
        while True:
            try:
                await self._send(message)
            except PeerBusyError as error:
                if time.monotonic() > until_s:
                    raise TransportError(f"the base station accepted nothing for {BUSY_S:.0f} s") from error
                await asyncio.sleep(_AGAIN_S)
            else:
                return

    def _save(self) -> None:
        folder = self._site.save
        if folder is None:
            return
        file = folder / f"broadcast-{self._tune.broadcast:016x}-user-{self._tune.user + 1}.png"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png_bytes(np.concatenate(self._kept)))
        except OSError as error:
            log.warning("could not save the picture as %s: %s", file, error.strerror or error)
        else:
            log.info("saved %s", file)
