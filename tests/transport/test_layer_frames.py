"""The native codec of a layer's two messages against its twin, the general codec: same bytes, same messages."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.lab.wire_examples import MESSAGES, a_result, a_run, every_kind, same
from wdmoe.errors import ProtocolError
from wdmoe.transport.codec import _native
from wdmoe.transport.codec.framing import join, pack, split, unpack
from wdmoe.transport.codec.messages import PROTOCOL_VERSION, Message, Result, Run
from wdmoe.transport.codec.wire import Limits, decode, encode

LIMITS = Limits()
CASES = 20_000


def general(frame: bytes | bytearray) -> Message | None:
    """What the twin reads; None where it refuses."""
    try:
        return decode(split(memoryview(frame)), LIMITS)
    except ProtocolError:
        return None


def native(frame: bytes | bytearray) -> Message | None:
    return _native.read(memoryview(frame), PROTOCOL_VERSION)


def in_order(run: Run) -> Run:
    return dataclasses.replace(run, experts=tuple(sorted(run.experts)))


@given(MESSAGES[Run].map(in_order) | MESSAGES[Result])
def test_the_same_bytes_and_the_same_message(message: Message) -> None:
    frame = _native.write(message, PROTOCOL_VERSION)
    assert frame is not None
    assert frame == join(encode(message))
    heard = native(frame)
    assert heard is not None, "it goes the native way"
    assert same(heard, message)
    assert same(general(frame), message)


@given(MESSAGES[Run])
def test_experts_in_any_order_arrive(run: Run) -> None:
    frame = pack(run, LIMITS)
    assert same(unpack(memoryview(frame), LIMITS), run)
    assert (native(frame) is None) == (list(run.experts) != sorted(run.experts))


@settings(max_examples=300)
@given(MESSAGES[Run].map(in_order) | MESSAGES[Result], st.data())
def test_one_other_byte_is_judged_as_the_twin_does(message: Message, data: st.DataObject) -> None:
    frame = bytearray(join(encode(message)))
    place = data.draw(st.integers(0, min(len(frame), 400) - 1))
    byte = data.draw(st.integers(0, 255))
    assume(frame[place] != byte)
    frame[place] = byte
    assert_agree(frame)


def test_odd_frames_are_judged_as_the_twin_does(rng: np.random.Generator) -> None:
    kinds: list[Message] = [a_run(), a_run(40, 7), a_result(a_run(3, 5)), in_order(a_run()), in_order(a_run(300, 3))]
    frames = [join(encode(kind)) for kind in kinds]
    native_too = 0
    for _ in range(CASES):
        frame = bytearray(frames[int(rng.integers(len(frames)))])
        for _ in range(int(rng.integers(1, 4))):
            spoil(frame, rng)
        native_too += assert_agree(frame)
    assert native_too > CASES / 50, "some of these are good frames"


def spoil(frame: bytearray, rng: np.random.Generator) -> None:
    """Another byte, mostly where the map is; a byte more, a byte less; another end."""
    place = int(rng.integers(min(len(frame), 200 if rng.integers(4) else 2000) or 1))
    how = int(rng.integers(6))
    if how == 0:
        frame.insert(place, int(rng.integers(256)))
    elif how == 1 and frame:
        del frame[place]
    elif how == 2:
        del frame[len(frame) - int(rng.integers(min(len(frame), 20) + 1)) :]
    elif frame:
        frame[place] = int(rng.choice([0, 1, 0x7F, 0x80, 0xCB, 0xCC, 0xCF, 0xDC, 0xFF, rng.integers(256)]))


def assert_agree(frame: bytearray) -> bool:
    """Whatever the native codec takes, the general one takes, too, as the same. Returns whether it took it."""
    heard = native(frame)
    if heard is not None:
        assert same(heard, general(frame))
    try:
        message = unpack(memoryview(frame), LIMITS)
    except ProtocolError:
        message = None
    assert same(message, general(frame))
    return heard is not None


@pytest.mark.parametrize("shift", range(8))
def test_a_frame_may_begin_anywhere(shift: int) -> None:
    for run in (in_order(a_run(3, 7)), in_order(a_run(100, 500))):
        frame = join(encode(run))
        memory = bytearray(shift) + frame
        heard = _native.read(memoryview(memory)[shift:], PROTOCOL_VERSION)
        assert same(heard, run)
        assert isinstance(heard, Run)
        assert all(each.flags.aligned for each in (heard.tokens, heard.rows, heard.weights))


def test_a_large_tensor_is_not_copied() -> None:
    frame = np.frombuffer(join(encode(in_order(a_run(100, 500)))), np.uint8)
    heard = _native.read(frame.data, PROTOCOL_VERSION)
    assert isinstance(heard, Run)
    assert np.shares_memory(heard.tokens, frame) == (frame.ctypes.data % 8 == 0)


RUN = in_order(a_run(2, 4))
UNUSUAL: dict[str, dict[str, Any]] = {
    "a bool": {"attempt": True},
    "a NumPy number": {"layer": np.int32(3)},
    "an integer for seconds": {"remaining_s": 1},
    "less than nothing": {"remaining_s": -1.0},
    "no number": {"remaining_s": float("nan")},
    "no end": {"bandwidth_hz": float("inf")},
    "a negative attempt": {"attempt": -1},
    "an attempt of 65 bits": {"attempt": 2**64},
    "a list": {"experts": [2, 4]},
    "no experts": {"experts": (), "counts": ()},
    "an expert twice": {"experts": (2, 2)},
    "a count of none": {"counts": (4, 0)},
    "counts that are too few": {"counts": (1, 2)},
    "more counts than experts": {"counts": (1, 1, 2)},
    "a row beyond the tokens": {"rows": np.array([0, 1, 0, 2], np.int32)},
    "a row below 0": {"rows": np.array([0, 1, 0, -1], np.int32)},
    "wide rows": {"rows": np.zeros(4, np.int64)},
    "wide tokens": {"tokens": np.zeros((2, 4))},
    "tokens of another byte order": {"tokens": np.zeros((2, 4), ">f4")},
    "tokens in another order": {"tokens": np.asfortranarray(np.zeros((2, 4), np.float32))},
    "every second token": {"tokens": np.zeros((4, 4), np.float32)[::2]},
    "a flat token": {"tokens": np.zeros(8, np.float32)},
    "masked tokens": {"tokens": np.ma.masked_array(np.zeros((2, 4), np.float32))},
    "no tokens": {"tokens": np.zeros((2, 0), np.float32)},
    "more experts than it has room for": {
        "experts": tuple(range(300)),
        "counts": (1,) * 300,
        "rows": np.zeros(300, np.int32),
        "weights": np.zeros(300, np.float32),
    },
}


@pytest.mark.parametrize("changes", UNUSUAL.values(), ids=UNUSUAL)
def test_what_is_unusual_is_left_to_the_twin(changes: dict[str, Any]) -> None:
    run = dataclasses.replace(RUN, **changes)
    assert _native.write(run, PROTOCOL_VERSION) is None
    try:
        parts = encode(run)
    except ProtocolError:
        with pytest.raises(ProtocolError):
            pack(run, LIMITS)
    else:
        assert pack(run, LIMITS) == join(parts)


def test_other_messages_and_versions_are_left_to_the_twin() -> None:
    for message in every_kind():
        if not isinstance(message, (Run, Result)):
            assert _native.write(message, PROTOCOL_VERSION) is None
            assert native(join(encode(message))) is None
    assert _native.read(memoryview(join(encode(RUN))), PROTOCOL_VERSION + 1) is None
    for size in range(12):
        assert native(bytes(size)) is None


def test_limits_hold_on_the_native_way() -> None:
    frame = pack(RUN, LIMITS)
    small = Limits(max_message_bytes=len(frame) - 60)  # the lengths in front do not count when it is read
    with pytest.raises(ProtocolError, match="accepts"):
        pack(RUN, small)
    with pytest.raises(ProtocolError, match="accepts"):
        unpack(memoryview(frame), small)
    with pytest.raises(ProtocolError, match="checksum"):
        unpack(memoryview(frame), Limits(checksum=True))
