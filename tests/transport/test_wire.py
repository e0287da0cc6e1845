"""The codec: what goes in comes out, and what is odd is refused in one line."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.lab.wire_examples import ANY_MESSAGE, MESSAGES, a_result, a_run, every_kind, same
from wdmoe.errors import ProtocolError, VersionError
from wdmoe.transport.codec import messages as m
from wdmoe.transport.codec.fields import Tensor
from wdmoe.transport.codec.framing import join, split
from wdmoe.transport.codec.messages import PROTOCOL_VERSION, Message
from wdmoe.transport.codec.schema import BY_KIND, BY_NUMBER
from wdmoe.transport.codec.wire import DEFAULT_LIMITS, MAX_HEADER_BYTES, Limits, decode, encode

INSECURE = Limits(checksum=True)


def with_header(frames: list[Any], **changes: Any) -> list[Any]:
    """The same message with other header fields; `...` removes one."""
    header = msgpack.unpackb(frames[0][2:], use_list=False) | changes
    kept = {name: value for name, value in header.items() if value is not ...}
    return [bytes(frames[0][:2]) + msgpack.packb(kept), *frames[1:]]


def refusal(frames: list[Any], limits: Limits = DEFAULT_LIMITS) -> str:
    with pytest.raises(ProtocolError) as caught:
        decode(frames, limits)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 300
    return text


@settings(max_examples=400)
@given(ANY_MESSAGE)
def test_round_trip(message: Message) -> None:
    assert same(decode(encode(message)), message)


@settings(max_examples=100)
@given(ANY_MESSAGE)
def test_round_trip_with_a_checksum(message: Message) -> None:
    assert same(decode(encode(message, checksum=True), INSECURE), message)


@settings(max_examples=100)
@given(ANY_MESSAGE)
def test_round_trip_from_memoryviews_in_the_middle_of_a_buffer(message: Message) -> None:
    frames = [memoryview(b"x" + bytes(frame))[1:] for frame in encode(message)]
    decoded = decode(frames)
    assert same(decoded, message)
    for field in dataclasses.fields(decoded):
        value = getattr(decoded, field.name)
        assert not isinstance(value, np.ndarray) or value.flags.aligned, "native code reads whole words"


@settings(max_examples=200)
@given(ANY_MESSAGE, st.booleans())
def test_round_trip_in_one_frame(message: Message, checksum: bool) -> None:
    parts = encode(message, checksum)
    frame = join(parts)
    assert frame[:2] == parts[0][:2], "version and number are where every version has them"
    assert [bytes(part) for part in split(memoryview(frame))] == [bytes(part) for part in parts]
    assert same(decode(split(memoryview(frame))), message)
    assert all(frame.find(bytes(part)) >= 0 for part in parts[1:])


def test_tensors_begin_at_whole_words_of_the_frame() -> None:
    frame = np.frombuffer(join(encode(a_run(count=3, hidden=5))), np.uint8)
    begin = frame.__array_interface__["data"][0]
    for part in split(memoryview(frame))[1:]:
        assert (np.frombuffer(part, np.uint8).__array_interface__["data"][0] - begin) % 8 == 0


@pytest.mark.parametrize("cut", [2, 3, 4, 7, 30, -1])
def test_a_frame_that_is_cut_is_refused(cut: int) -> None:
    with pytest.raises(ProtocolError, match="a frame of"):
        split(memoryview(join(encode(a_run()))[:cut]))


def test_every_message_has_one_row_in_the_table_with_its_own_fields() -> None:
    kinds = set(typing.get_args(Message))
    assert set(BY_KIND) == kinds == set(MESSAGES) == {type(message) for message in every_kind()}
    for schema in BY_NUMBER.values():
        assert set(schema.fields) == {field.name for field in dataclasses.fields(schema.kind)}
    assert len(BY_NUMBER) == len(kinds)


def test_layout_is_version_number_map_and_raw_little_endian_tensors() -> None:
    run = a_run(count=2, hidden=3)
    header, tokens, rows, weights = encode(run)
    assert (header[0], header[1]) == (PROTOCOL_VERSION, 18)
    fields = msgpack.unpackb(header[2:])
    assert fields["tokens"] == ["f32", 2, 3]
    assert fields["counts"] == [2, 2]
    assert bytes(tokens) == run.tokens.astype("<f4").tobytes()
    assert bytes(rows) == run.rows.astype("<i4").tobytes()
    assert bytes(weights) == run.weights.astype("<f4").tobytes()


def test_large_tensors_are_not_copied() -> None:
    data = np.zeros(1 << 20, np.uint8)
    chunk = m.Chunk(layer=0, expert=0, offset=0, total=1 << 20, data=data)
    _, frame = encode(chunk)
    assert np.shares_memory(np.frombuffer(frame, np.uint8), data)
    decoded = decode([encode(chunk)[0], frame])
    assert isinstance(decoded, m.Chunk)
    assert np.shares_memory(decoded.data, data)


def test_arrays_that_are_not_contiguous_travel_all_the_same() -> None:
    wide = np.arange(200_000, dtype=np.float32).reshape(200, 1000)
    for tokens in (wide[::2], wide[:2, ::3], wide.T[:3].T):
        result = dataclasses.replace(a_result(a_run()), partial=tokens)
        assert same(decode(encode(result)), dataclasses.replace(result, partial=np.ascontiguousarray(tokens)))


@pytest.mark.parametrize("message", every_kind(), ids=lambda message: type(message).__name__)
def test_missing_unknown_and_mistyped_fields_are_refused_by_name(message: Message) -> None:
    frames = encode(message)
    names = list(msgpack.unpackb(frames[0][2:]))
    for name in names:
        assert name in refusal(with_header(frames, **{name: ...}))
        for wrong in (None, {"a": 1}, [[]], -1, "\n", float("nan"), 2**64 - 1 if name == "layer" else -(2**63)):
            assert name in refusal(with_header(frames, **{name: wrong}))
    assert "surprise" in refusal(with_header(frames, surprise=1))


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (m.Run, "remaining_s", float("inf")),
        (m.Run, "remaining_s", -0.5),
        (m.Run, "remaining_s", 1),
        (m.Run, "layer", True),
        (m.Run, "layer", 2**31),
        (m.Run, "attempt", 1.0),
        (m.Run, "experts", []),
        (m.Run, "experts", [4, 4]),
        (m.Run, "experts", [4]),
        (m.Run, "counts", [2, 0]),
        (m.Run, "counts", [1, 2]),
        (m.Run, "counts", [2**31 - 1, 2**31 - 1]),
        (m.Run, "tokens", ["f64", 1, 16]),
        (m.Run, "tokens", ["i32", 1, 16]),
        (m.Run, "tokens", ["f32", 16]),
        (m.Run, "tokens", ["f32", 1, 8]),
        (m.Run, "tokens", ["f16", 1, 16]),
        (m.Run, "tokens", ["f32", True, 16]),
        (m.Run, "tokens", ["f32", 1.0, 16]),
        (m.Run, "tokens", ["f32", -1, -16]),
        (m.Run, "tokens", ["f32", {}, 16]),
        (m.Run, "tokens", [{}, 1, 16]),
        (m.Run, "tokens", [["f32"], 1, 16]),
        (m.Run, "tokens", []),
        (m.Run, "tokens", ["f32", 2**31 - 1, 2**31 - 1]),
        (m.Run, "rows", ["i32", 1]),
        (m.Welcome, "data_port", 65536),
        (m.Welcome, "manifest_sha256", "0F" * 32),
        (m.Welcome, "enrolled", 1),
        (m.Hello, "enrol_key", "a" * 39 + " "),
        (m.Hello, "enrol_key", "a" * 41),
        (m.Hello, "report", {}),
        (m.Chunk, "offset", 1),
        (m.Goodbye, "reason", "x" * 513),
        (m.Goodbye, "reason", "two\nlines"),
        (m.Goodbye, "reason", "\x1b[2Jcleared your terminal"),
        (m.Place, "size", ["i64", 1]),
    ],
)
def test_values_out_of_range_are_refused(kind: type[Any], name: str, value: Any) -> None:
    message = next(message for message in every_kind() if type(message) is kind)
    assert kind.__name__ in refusal(with_header(encode(message), **{name: value}))


def test_a_shape_of_the_right_value_but_the_wrong_type_is_refused_after_the_right_one_too() -> None:
    frames = encode(a_run())
    decode(frames)  # shapes are remembered, and 1 == 1.0 == True
    refusal(with_header(frames, tokens=["f32", 1.0, 16]))
    refusal(with_header(frames, tokens=["f32", True, 16]))


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": np.array([0, 1], np.int32)},
        {"rows": np.array([0, -1], np.int32)},
        {"rows": np.zeros(3, np.int32), "weights": np.zeros(3, np.float32)},
        {"weights": np.zeros(3, np.float32)},
        {"experts": (1, 1)},
        {"experts": (1,)},
        {"counts": (2, 0)},
        {"rows": np.zeros(2, np.int64)},
        {"tokens": np.zeros((1, 16))},
        {"tokens": np.zeros(16, np.float32)},
        {"remaining_s": float("nan")},
        {"attempt": -1},
        {"layer": "3"},
        {"experts": ("a", "b")},
    ],
)
def test_what_a_receiver_would_refuse_is_not_sent(changes: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match="Run"):
        encode(a_run(**changes))


def test_rows_out_of_range_are_found_among_many() -> None:
    tokens = 200
    frames = encode(a_run(count=tokens))
    rows = np.tile(np.arange(tokens, dtype=np.int32), 2)
    rows[-1] = tokens
    frames[2] = rows.tobytes()
    assert f"{tokens} tokens" in refusal(frames)


def test_negative_experts_are_refused_on_both_sides() -> None:
    with pytest.raises(ProtocolError, match="experts"):
        encode(m.Ready(generation=1, experts=np.array([[0, -1]], np.int32)))
    frames = encode(m.Ready(generation=1, experts=np.array([[0, 1]], np.int32)))
    frames[1] = np.array([[0, -1]], "<i4").tobytes()
    assert "experts" in refusal(frames)


def test_numpy_scalars_and_lists_are_written_as_plain_values() -> None:
    run = a_run(attempt=np.uint64(2**63), layer=np.int64(3), experts=[np.int32(4), 2], remaining_s=np.float32(0.5))
    decoded = decode(encode(run))
    assert isinstance(decoded, m.Run)
    assert (decoded.attempt, decoded.layer, decoded.experts, decoded.remaining_s) == (2**63, 3, (4, 2), 0.5)


def test_texts_for_people_are_tidied_before_they_travel() -> None:
    decoded = decode(encode(m.Failure(attempt=0, reason="first\nsecond\x00\x1b[31m" + "x" * 600)))
    assert isinstance(decoded, m.Failure)
    assert decoded.reason.startswith("first second??[31mx")
    assert len(decoded.reason) == 512


def test_another_version_is_named_with_ours() -> None:
    frames = encode(m.Pong(sequence=1))
    frames[0] = b"\x09" + bytes(frames[0][1:])
    with pytest.raises(VersionError, match=f"version 9 .* speaks {PROTOCOL_VERSION}"):
        decode(frames)
    with pytest.raises(VersionError):
        decode([b"\x09\xff" + b"a future header that is not even msgpack"])


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b""],
        [b"\x02"],
        [b"\x02\x08"],
        [b"\x02\x00\x80"],
        [b"\x02\xff\x80"],
        [b"\x02\x08\x80"],
        [b"\x02\x08\xc1"],
        [b"\x02\x08\x90"],
        [b"\x02\x08" + b"\x91" * 4000],
        [b"\x02\x08" + b"\x80" * 4000],
        [b"\x02\x08\xdf\xff\xff\xff\xff"],
        [b"\x02\x08\xdd\xff\xff\xff\xff"],
        [b"\x02\x08\xdb\xff\xff\xff\xff"],
        [b"\x02\x08\xc6\xff\xff\xff\xff"],
        [b"\x02\x08\x81\xa8sequence\xc4\x01x"],
        [b"\x02\x08\x81\xa8sequence\xd4\x01x"],
        [b"\x02\x08\x81\x01\x01"],
        [b"\x02\x08\x81\xa8sequence\x01\x01"],
        [b"\x02\x08\x81\xa8\xff\xff\xff\xff\xff\xff\xff\xff\x01"],
        [b"\x02\x08" + b"\x80" * MAX_HEADER_BYTES],
        [b"\x02\x08\x81\xa8sequence\x01", b""],
    ],
    ids=lambda frames: repr(b"|".join(frames)[:24]),
)
def test_frames_that_are_no_message(frames: list[bytes]) -> None:
    refusal(frames)


def test_a_megabyte_of_empty_maps_costs_nothing() -> None:
    assert "1048578 bytes" in refusal([b"\x02\x08" + b"\x80" * (1 << 20)])


def test_messages_above_the_limit_are_refused() -> None:
    frames = encode(a_run(hidden=1000))
    assert "this side accepts 4000" in refusal(frames, Limits(max_message_bytes=4000))


def test_a_header_that_is_too_long_is_not_sent() -> None:
    many = 1000
    run = a_run(
        experts=tuple(range(100_000, 100_000 + many)),
        counts=(1,) * many,
        rows=np.zeros(many, np.int32),
        weights=np.zeros(many, np.float32),
    )
    with pytest.raises(ProtocolError, match=str(MAX_HEADER_BYTES)):
        encode(run)


@settings(max_examples=300)
@given(st.data())
def test_z12_a_checksum_finds_every_flipped_bit(data: st.DataObject) -> None:
    frame = bytearray(join(encode(a_run(count=2), checksum=True)))
    bit = data.draw(st.integers(0, 8 * len(frame) - 1))
    frame[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ProtocolError):
        decode(split(memoryview(frame)), INSECURE)


def test_an_insecure_channel_insists_on_the_checksum() -> None:
    assert "checksum" in refusal(encode(a_run()), INSECURE)
    assert same(decode(encode(a_run(), checksum=True)), a_run()), "and everybody else verifies one that is there"


def test_tensors_describe_themselves_for_the_documentation() -> None:
    assert str(Tensor(("f32", "f16"), ("tokens", "hidden"))) == "f16/f32 (tokens, hidden)"


def test_the_documentation_has_the_table_as_it_is(repository: Path) -> None:
    page = (repository / "docs" / "wire.md").read_text()
    for schema in BY_NUMBER.values():
        fields = ", ".join(
            f"{name}: {field}" if isinstance(field, Tensor) else name for name, field in schema.fields.items()
        )
        assert f"| {schema.number} | {schema.kind.__name__} | {fields} |" in page
