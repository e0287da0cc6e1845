"""A device's ear over real sockets: gaps, damage, stations that ask for nonsense; and devices that answer nonsense."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.broadcast.test_decoder import SMALL, shaken
from tests.lab.waiting import PATIENCE_S
from tests.lab.wire_examples import a_tune
from tests.lab.zmq_lab import Lab, lab
from wdmoe.broadcast.codec.decoder_export import decoder_graph
from wdmoe.broadcast.codec.tiling import OVERLAP, Grid
from wdmoe.errors import ExpertError, PeerBusyError, ProtocolError
from wdmoe.nodes.broadcast_station.listeners import Audience
from wdmoe.nodes.broadcast_station.symbol_source import SymbolSource
from wdmoe.nodes.device.broadcast_receiver import Radio, RadioSite
from wdmoe.nodes.device.expert_cache import ExpertCache
from wdmoe.nodes.device.rules import WantedExpert
from wdmoe.records import DeviceReport
from wdmoe.transport.codec.messages import Failure, Message, Pilot, Rows, Shown, Symbols, Tune, Tuned
from wdmoe.transport.membership import Device
from wdmoe.transport.zmq.pubsub import Transmitter, open_transmitter, open_tuner

__all__ = ["lab"]
HEIGHT, WIDTH = 70, 90  # 3 rows of 4 tiles
CODEC = shaken(SMALL)
DECODER = decoder_graph(CODEC)
PAIR = tuple(np.random.default_rng(user).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8) for user in (0, 1))
SOURCE = SymbolSource(CODEC, PAIR, (10.0, 5.0), 0.5, 1 / 12)


class Scene:
    """A transmitter, and one device's radio whose messages are kept."""

    def __init__(self, station: Transmitter, radio: Radio) -> None:
        self.station, self.radio = station, radio
        self.said: list[Message] = []
        self.busy = 0  # so many sends more find a full queue
        self.port = int(station.endpoint.rsplit(":", 1)[1])

    async def hear(self, message: Message) -> None:
        if self.busy:
            self.busy -= 1
            raise PeerBusyError("full")
        self.said.append(message)

    def tune(self, **changes: object) -> Tune:
        tune = a_tune(
            port=self.port,
            user=0,
            blocks=SOURCE.plan.blocks,
            shared=SOURCE.plan.shared,
            uses=SOURCE.uses,
            height=HEIGHT,
            width=WIDTH,
            snr_db=10.0,
            fades=False,
            decoder_sha256=hashlib.sha256(DECODER).hexdigest(),
            decoder_bytes=len(DECODER),
        )
        return dataclasses.replace(tune, **changes)

    def send(self, first: int, last: int, broadcast: int = 9) -> None:
        symbols = SOURCE.symbols(first, last)
        self.station.send(Symbols(broadcast=broadcast, first=first, symbols=symbols))

    async def until(self, kind: type[Message], sent: int = 0) -> Message:
        """What the device says of this kind, with Pilots on the air until it does."""
        for _ in range(int(PATIENCE_S / 0.05)):
            for message in self.said:
                if isinstance(message, kind):
                    return message
            self.station.send(Pilot(broadcast=9, sent=sent))
            await asyncio.sleep(0.05)
        raise AssertionError(f"no {kind.__name__} but {self.said}")

    def picture(self) -> np.ndarray:
        return np.concatenate([each.pixels for each in self.said if isinstance(each, Rows)])


@asynccontextmanager
async def scene(lab: Lab, folder: Path, decoder: bytes = DECODER, save: Path | None = None) -> AsyncIterator[Scene]:
    station = open_transmitter(lab.context, "tcp://127.0.0.1:*", lab.security)
    security = lab.admitted()
    host = station.endpoint.rpartition(":")[0]
    site = RadioSite(
        open_tuner=lambda port: open_tuner(lab.devices, f"{host}:{port}", security),
        cache=ExpertCache(folder / "cache", 1 << 30),
        threads=1,
        save=save,
    )

    async def fetch(wanted: WantedExpert) -> bytes:
        if hashlib.sha256(decoder).hexdigest() != wanted.sha256:
            raise ExpertError("it arrived damaged every time")
        return decoder

    async def hear(message: Message) -> None:
        await found.hear(message)

    found = Scene(station, Radio(site, fetch, hear))
    running = asyncio.ensure_future(found.radio.run())
    try:
        yield found
        assert not running.done(), running.exception()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        station.close()


def play(what: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(what(), 4 * PATIENCE_S))


def test_what_is_lost_leaves_the_rest_as_it_is(lab: Lab, tmp_path: Path) -> None:
    async def go() -> None:
        pictures = []
        for missing in ((), (5, 6)):
            async with scene(lab, tmp_path, save=tmp_path / "saved") as on:
                on.radio.tune(on.tune())
                await on.until(Tuned)
                on.busy = 3
                for number in range(SOURCE.plan.blocks - 1):
                    if number not in missing:
                        on.send(number, number + 1)
                on.send(0, 1, broadcast=10)  # somebody else's
                shown = await on.until(Shown, sent=SOURCE.plan.blocks)  # the last block never comes
                assert (shown.heard, shown.lost) == (11 - len(missing), 1 + len(missing))
                firsts = [each.first for each in on.said if isinstance(each, Rows)]
                assert firsts[0] == 0
                assert firsts == sorted(set(firsts))
                pictures.append(on.picture())
                assert pictures[-1].shape == (HEIGHT, WIDTH, 3)
        whole, torn = pictures
        grid = Grid(HEIGHT, WIDTH)
        rows = grid.rows[1]
        assert np.array_equal(whole[:rows], torn[:rows])
        assert not np.array_equal(whole, torn)
        assert np.array_equal(whole[rows + 32 :], torn[rows + 32 :])
        (saved,) = (tmp_path / "saved").iterdir()
        assert saved.name == "broadcast-0000000000000009-user-1.png"

    play(go)


def test_a_device_that_comes_late_gets_the_rest(lab: Lab, tmp_path: Path) -> None:
    async def go() -> None:
        async with scene(lab, tmp_path) as on:
            on.radio.tune(on.tune())
            await on.until(Tuned)
            on.send(8, 12)
            shown = await on.until(Shown, sent=12)
            assert shown.lost == 8
            grey = on.picture()[: Grid(HEIGHT, WIDTH).rows[2] - OVERLAP]
            assert np.ptp(grey[:20]) == 0

    play(go)


def test_a_newer_broadcast_ends_an_older_one(lab: Lab, tmp_path: Path) -> None:
    async def go() -> None:
        async with scene(lab, tmp_path) as on:
            on.radio.tune(on.tune(broadcast=8))
            on.radio.tune(on.tune(broadcast=8))
            await asyncio.sleep(0.2)
            on.radio.tune(on.tune())
            tuned = await on.until(Tuned)
            assert tuned.broadcast == 9
            on.send(0, SOURCE.plan.blocks)
            assert (await on.until(Shown, sent=SOURCE.plan.blocks)).lost == 0

    play(go)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"height": 4001}, "at most 4000x3000"),
        ({"uses": 2**31 - 1}, "MiB of symbols"),
        ({"uses": SOURCE.uses + 1}, "do not fit a decoder"),
        ({"uses": 64 * 9}, "do not fit a decoder"),
        ({"snr_db": 900.0}, "from -30 to 40 dB"),
        ({"decoder_sha256": "ab" * 32}, "could not fetch the decoder"),
        ({"port": 1}, "Tuned"),
    ],
)
def test_a_station_that_asks_for_nonsense_is_told_and_the_next_one_heard(
    lab: Lab, tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    async def go() -> None:
        async with scene(lab, tmp_path) as on:
            if "port" not in changes:
                on.radio.tune(on.tune(broadcast=7, **changes))
                failure = await on.until(Failure)
                assert failure.attempt == 7
                assert reason in failure.reason
            else:
                on.radio.tune(on.tune(broadcast=7, **changes))
            on.radio.tune(on.tune())
            await on.until(Tuned)

    play(go)


@pytest.mark.parametrize("decoder", [b"no graph", DECODER[:5000]])
def test_a_file_that_is_no_decoder_is_refused(lab: Lab, tmp_path: Path, decoder: bytes) -> None:
    async def go() -> None:
        async with scene(lab, tmp_path, decoder) as on:
            on.radio.tune(on.tune(decoder_sha256=hashlib.sha256(decoder).hexdigest(), decoder_bytes=len(decoder)))
            failure = await on.until(Failure)
            assert "ONNX Runtime cannot open the decoder" in failure.reason

    play(go)


@pytest.mark.parametrize("scale", [0.0, 1.5, np.nan, np.inf, 1e30])
def test_symbols_of_another_power_are_refused(lab: Lab, tmp_path: Path, scale: float) -> None:
    async def go() -> None:
        async with scene(lab, tmp_path) as on:
            on.radio.tune(on.tune())
            await on.until(Tuned)
            with np.errstate(invalid="ignore"):  # a pilot may be 0
                symbols = SOURCE.symbols(0, 1).astype(np.float32) * np.float32(scale)
            on.station.send(Symbols(broadcast=9, first=0, symbols=symbols))
            failure = await on.until(Failure, sent=1)
            assert "power" in failure.reason

    play(go)


def test_blocks_that_come_twice_are_refused(lab: Lab, tmp_path: Path) -> None:
    async def go() -> None:
        async with scene(lab, tmp_path) as on:
            on.radio.tune(on.tune())
            await on.until(Tuned)
            on.send(0, 2)
            on.send(1, 2)
            assert "came after" in (await on.until(Failure, sent=2)).reason

    play(go)


# ---- the other end: devices that answer nonsense

REPORT = DeviceReport(name="kit", hardware="", system="", provider="cpu", threads=1, memory_bytes=0, flops=1.0)


def a_device(key: str, name: str = "kit") -> Device:
    report = dataclasses.replace(REPORT, name=name)
    return Device(key=key, device_id=key, session=1, route=b"", report=report, number=0, seen_s=0.0)


def an_audience() -> Audience:
    audience = Audience((Grid(10, 20), Grid(40, 40)))
    assert audience.seat([a_device("a"), a_device("b")], 0.0) == 0
    for listener in audience:
        listener.tuned(0.0)
    return audience


def rows(first: int, count: int, width: int = 20) -> Rows:
    return Rows(broadcast=9, first=first, pixels=np.full((count, width, 3), (first + 1) % 200, np.uint8))


def test_a_device_needs_neither_torch_nor_pillow_for_it() -> None:
    heavy = "{'torch', 'PIL', 'onnx', 'matplotlib'}"
    code = f"import sys, wdmoe.nodes.device.device; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_picture_comes_back_in_order() -> None:
    one, other = an_audience()
    one.take_rows(rows(0, 6), 1.0)
    one.take_rows(rows(6, 4), 2.0)
    assert one.picture is None  # not before the device says so
    one.take_shown(Shown(broadcast=9, heard=1, lost=0, decode_s=0.1))
    assert one.picture is not None
    assert one.picture[:, 0, 0].tolist() == [1] * 6 + [7] * 4
    assert other.open


@pytest.mark.parametrize(
    "message",
    [rows(1, 1), rows(0, 11), rows(0, 0), rows(0, 5, 21), rows(0, 5, 1), rows(2**31 - 1, 1)],
)
def test_rows_that_do_not_fit(message: Rows) -> None:
    one, _ = an_audience()
    with pytest.raises(ProtocolError, match="where row 0 of 20x10 is due"):
        one.take_rows(message, 1.0)
    assert one.rows == 0


def test_rows_come_once_and_not_after_the_end() -> None:
    one, _ = an_audience()
    with pytest.raises(ProtocolError, match="after 0 of 10 rows"):
        one.take_shown(Shown(broadcast=9, heard=1, lost=0, decode_s=0.1))
    one.take_rows(rows(0, 10), 1.0)
    with pytest.raises(ProtocolError, match="where row 10"):
        one.take_rows(rows(0, 1), 1.0)
    with pytest.raises(ProtocolError, match="5 blocks heard and 0 lost of 1"):
        one.take_shown(Shown(broadcast=9, heard=5, lost=0, decode_s=0.1))
    one.lose("gone")
    with pytest.raises(ProtocolError):
        one.take_rows(rows(10, 1), 1.0)


def test_places_are_given_by_name_or_in_order_and_only_together() -> None:
    named = Audience((Grid(1, 1), Grid(1, 1)), ("user-1", "user-2"))
    two, one = a_device("b", "user-2"), a_device("a", "user-1")
    assert named.seat([two], 0.0) == 1
    assert named.waits_for("awaited")
    assert named.seat([two, a_device("c", "stranger"), one], 0.0) == 0
    assert [each.key for each in named] == ["a", "b"]
    alone = Audience((Grid(1, 1), Grid(1, 1)))
    alone.listeners[0].lose("its process ended")
    assert alone.seat([a_device("x")], 0.0) == 0  # nobody waits for the lost one
    assert alone.listeners[1].key == "x"
    alone.lose_stuck("tuning", 5.0, 4.0)
    assert alone.listeners[1].reason == "its device made no progress for 4 s while tuning"
    assert not alone.open
