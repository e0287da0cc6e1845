"""Messages of every kind, for hypothesis: what correct peers send, up to the edges of what they may."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from wdmoe.records import DeviceReport
from wdmoe.transport.codec import messages as m
from wdmoe.transport.codec.messages import Message

KEY = "0123456789abcdefghijABCDEFGHIJ.-:+=^!/*?"
_INDEX = st.integers(0, 2**31 - 1)
_COUNT = st.integers(0, 2**63 - 1)
_ID = st.integers(0, 2**64 - 1)
_SECONDS = st.floats(0, allow_nan=False, allow_infinity=False)
_LINE = st.text(st.characters(categories=("L", "N", "P", "S")), max_size=64)
_ANY_FLOATS = {"allow_nan": True, "allow_infinity": True}  # tensors are judged by those who compute with them


def _experts(draw: st.DrawFn, count: int) -> np.ndarray:
    return draw(hnp.arrays(np.int32, (count, 2), elements=st.integers(0, 2**31 - 1)))


@st.composite
def hellos(draw: st.DrawFn) -> m.Hello:
    report = DeviceReport(
        name=draw(_LINE),
        hardware=draw(_LINE),
        system=draw(_LINE),
        provider=draw(_LINE),
        threads=draw(_INDEX),
        memory_bytes=draw(_COUNT),
        flops=draw(_SECONDS),
        downlink_snr_hz=draw(_SECONDS),
        uplink_snr_hz=draw(_SECONDS),
    )
    return m.Hello(session=draw(_ID), report=report, enrol_key=draw(st.sampled_from(["", KEY])))


@st.composite
def places(draw: st.DrawFn) -> m.Place:
    count = draw(st.integers(0, 20))
    return m.Place(
        generation=draw(_COUNT),
        experts=_experts(draw, count),
        sha256=draw(hnp.arrays(np.uint8, (count, 32))),
        size=draw(hnp.arrays(np.int64, (count,), elements=st.integers(1, 2**63 - 1))),
        hidden=draw(_INDEX),
    )


@st.composite
def runs(draw: st.DrawFn) -> m.Run:
    dtype = draw(st.sampled_from([np.float32, np.float16]))
    tokens = draw(st.integers(1, 40))
    experts = draw(st.lists(_INDEX, min_size=1, max_size=8, unique=True))
    counts = draw(st.lists(st.integers(1, 20), min_size=len(experts), max_size=len(experts)))
    return m.Run(
        attempt=draw(_ID),
        layer=draw(_INDEX),
        remaining_s=draw(_SECONDS),
        bandwidth_hz=draw(_SECONDS),
        experts=tuple(experts),
        counts=tuple(counts),
        tokens=draw(hnp.arrays(dtype, (tokens, draw(st.integers(1, 300))))),
        rows=draw(hnp.arrays(np.int32, (sum(counts),), elements=st.integers(0, tokens - 1))),
        weights=draw(hnp.arrays(np.float32, (sum(counts),))),
    )


@st.composite
def chunks(draw: st.DrawFn) -> m.Chunk:
    data = draw(hnp.arrays(np.uint8, (draw(st.integers(0, 100_000)),)))
    offset = draw(st.integers(0, 2**40))
    total = draw(st.integers(offset + len(data), 2**41))
    return m.Chunk(layer=draw(_INDEX), expert=draw(_INDEX), offset=offset, total=total, data=data)


@st.composite
def tunes(draw: st.DrawFn) -> m.Tune:
    blocks = draw(st.integers(1, 2**31 - 1))
    return a_tune(
        broadcast=draw(_ID),
        port=draw(st.integers(1, 65535)),
        user=draw(st.integers(0, 1)),
        blocks=blocks,
        shared=draw(st.integers(1, blocks)),
        share=draw(st.floats(0, 1)),
        snr_db=draw(st.floats(-1000, 1000)),
        fades=draw(st.booleans()),
        seed=draw(_ID),
    )


def a_tune(**changes: Any) -> m.Tune:
    """A small correct Tune."""
    tune = m.Tune(
        broadcast=9,
        port=5557,
        user=1,
        blocks=6,
        shared=4,
        uses=512,
        height=48,
        width=64,
        share=0.5,
        snr_db=-2.5,
        fades=True,
        seed=3,
        decoder_sha256="0f" * 32,
        decoder_bytes=100,
    )
    return dataclasses.replace(tune, **changes)


MESSAGES: dict[type[Any], st.SearchStrategy[Any]] = {
    m.Hello: hellos(),
    m.Welcome: st.builds(
        m.Welcome,
        session=_ID,
        enrolled=st.booleans(),
        device_id=st.sampled_from(["", "0123456789abcdef"]),
        data_port=st.integers(0, 65535),
        lease_s=_SECONDS,
        max_message_bytes=_COUNT,
        model=_LINE,
        manifest_sha256=st.sampled_from(["", "0f" * 32]),
    ),
    m.Place: places(),
    m.Fetch: st.builds(m.Fetch, layer=_INDEX, expert=_INDEX, offset=_COUNT, length=_COUNT),
    m.Chunk: chunks(),
    m.Ready: st.builds(
        m.Ready,
        generation=_COUNT,
        experts=hnp.arrays(np.int32, st.tuples(st.integers(0, 20), st.just(2)), elements=st.integers(0, 2**31 - 1)),
    ),
    m.Ping: st.builds(m.Ping, sequence=_COUNT, done=_COUNT, queued=_COUNT, rss_bytes=_COUNT),
    m.Pong: st.builds(m.Pong, sequence=_COUNT),
    m.Goodbye: st.builds(m.Goodbye, reason=_LINE, retry=st.booleans()),
    m.Attach: st.builds(m.Attach, session=_ID),
    m.Attached: st.builds(m.Attached, session=_ID),
    m.Run: runs(),
    m.Result: st.builds(
        m.Result,
        attempt=_ID,
        layer=_INDEX,
        compute_s=_SECONDS,
        residence_s=_SECONDS,
        link_down_s=_SECONDS,
        link_up_s=_SECONDS,
        partial=hnp.arrays(
            st.sampled_from([np.dtype(np.float32), np.dtype(np.float16)]),
            st.tuples(st.integers(1, 40), st.integers(1, 400)),
            elements=_ANY_FLOATS,
        ),
    ),
    m.Failure: st.builds(m.Failure, attempt=_ID, reason=_LINE),
    m.Tune: tunes(),
    m.Tuned: st.builds(m.Tuned, broadcast=_ID),
    m.Rows: st.builds(
        m.Rows,
        broadcast=_ID,
        first=_INDEX,
        pixels=hnp.arrays(np.uint8, st.tuples(st.integers(0, 30), st.integers(1, 300), st.just(3))),
    ),
    m.Shown: st.builds(m.Shown, broadcast=_ID, heard=_INDEX, lost=_INDEX, decode_s=_SECONDS),
    m.Pilot: st.builds(m.Pilot, broadcast=_ID, sent=_INDEX),
    m.Symbols: st.builds(
        m.Symbols,
        broadcast=_ID,
        first=_INDEX,
        symbols=hnp.arrays(
            st.sampled_from([np.dtype(np.float32), np.dtype(np.float16)]),
            st.tuples(st.integers(1, 10), st.integers(1, 300), st.just(2)),
            elements=_ANY_FLOATS,
        ),
    ),
}
ANY_MESSAGE = st.one_of(*MESSAGES.values())


def a_run(count: int = 1, hidden: int = 16, **changes: Any) -> m.Run:
    """A small correct Run."""
    run = m.Run(
        attempt=7,
        layer=3,
        remaining_s=0.5,
        experts=(4, 2),
        counts=(count, count),
        tokens=np.arange(count * hidden, dtype=np.float32).reshape(count, hidden),
        rows=np.tile(np.arange(count, dtype=np.int32), 2),
        weights=np.full(2 * count, 0.5, np.float32),
    )
    return dataclasses.replace(run, **changes)


def a_result(run: m.Run) -> m.Result:
    """What a device that computes nothing would answer."""
    return m.Result(
        attempt=run.attempt,
        layer=run.layer,
        compute_s=0.0,
        residence_s=0.0,
        link_down_s=0.0,
        link_up_s=0.0,
        partial=run.tokens,
    )


def same(one: Any, other: Any) -> bool:
    """Whether two messages (or fields of them) hold the same, bit for bit."""
    if isinstance(one, np.ndarray):
        return bool(one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes())
    if dataclasses.is_dataclass(one):
        fields = dataclasses.fields(one)
        return type(one) is type(other) and all(same(getattr(one, f.name), getattr(other, f.name)) for f in fields)
    return bool(type(one) is type(other) and one == other)


def every_kind() -> list[Message]:
    """One plain message of each kind."""
    none = np.zeros((0, 2), np.int32)
    two = np.array([[1, 2], [3, 4]], np.int32)
    report = DeviceReport(
        name="kit", hardware="board", system="linux", provider="cpu", threads=1, memory_bytes=1 << 30, flops=1e9
    )
    return [
        m.Hello(session=5, report=report, enrol_key=KEY),
        m.Welcome(session=5, device_id="0123456789abcdef", data_port=5556, manifest_sha256="0f" * 32),
        m.Place(generation=1, experts=two, sha256=np.zeros((2, 32), np.uint8), size=np.array([1, 2]), hidden=16),
        m.Fetch(layer=1, expert=2, offset=0, length=65536),
        m.Chunk(layer=1, expert=2, offset=0, total=100, data=np.arange(100, dtype=np.uint8)),
        m.Ready(generation=1, experts=none),
        m.Ping(sequence=1, done=2, queued=3, rss_bytes=4),
        m.Pong(sequence=1),
        m.Goodbye(reason="the operator stopped it", retry=False),
        m.Attach(session=5),
        m.Attached(session=5),
        a_run(),
        a_result(a_run()),
        m.Failure(attempt=7, reason="no such expert here"),
        a_tune(),
        m.Tuned(broadcast=9),
        m.Rows(broadcast=9, first=24, pixels=np.arange(72, dtype=np.uint8).reshape(2, 12, 3)),
        m.Shown(broadcast=9, heard=5, lost=1, decode_s=0.5),
        m.Pilot(broadcast=9, sent=4),
        m.Symbols(broadcast=9, first=0, symbols=np.ones((2, 8, 2), np.float16)),
    ]
