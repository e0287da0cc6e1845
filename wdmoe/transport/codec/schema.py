"""The table of everything that may travel: message numbers, fields and their kinds, and what must agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from wdmoe.errors import ProtocolError
from wdmoe.records import DeviceReport
from wdmoe.transport.codec import messages as m
from wdmoe.transport.codec.fields import (
    INT32_MAX,
    UINT64_MAX,
    Code,
    Field,
    Flag,
    Frame,
    Int,
    Ints,
    Number,
    Tensor,
    Text,
    shown,
)

Header: TypeAlias = dict[str, Any]

_FEW_ROWS = 64  # up to here a Python list is searched faster than an array


def _pack_fields(fields: Sequence[tuple[str, Callable[[Any], Any]]], record: Any) -> Header:
    header, name = {}, ""
    try:
        for name, pack in fields:
            header[name] = pack(getattr(record, name))
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{name} {error}") from error
    return header


def _unpack_fields(fields: Sequence[tuple[str, Callable[[Any], Any]]], header: Mapping[str, Any]) -> Header:
    values, name = {}, ""
    try:
        for name, unpack in fields:
            values[name] = unpack(header[name])
    except KeyError:
        raise ValueError(f"{name} is missing") from None
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None
    return values


def _refuse_unknown(known: Mapping[str, object], header: Mapping[str, Any]) -> None:
    if len(header) != len(known):  # all known ones were there
        unknown = next(name for name in header if name not in known)
        raise ValueError(f"{shown(unknown)} is not a field of this message")


class Record:
    """A field that is itself a small dataclass and travels as a map of exactly its fields."""

    def __init__(self, kind: type[Any], **fields: Field) -> None:
        self._kind = kind
        self._fields = fields
        self._pack = tuple((name, field.pack) for name, field in fields.items())
        self._unpack = tuple((name, field.unpack) for name, field in fields.items())

    def pack(self, value: Any) -> Header:
        """See `Field`."""
        return _pack_fields(self._pack, value)

    def unpack(self, wire: Any) -> Any:
        """See `Field`."""
        if type(wire) is not dict:
            raise ValueError(f"must be a map, got {shown(wire)}")
        values = _unpack_fields(self._unpack, wire)
        _refuse_unknown(self._fields, wire)
        return self._kind(**values)


class Schema:
    """One kind of message: its number on the wire, its fields, and `agree`, which compares fields.

    Everything a message may hold is fixed here, so a header with one field more or less is refused.
    """

    def __init__(
        self,
        number: int,
        kind: type[Any],
        agree: Callable[[Any], None] | None = None,
        **fields: Field | Tensor,
    ) -> None:
        self.number = number
        self.kind = kind
        self.fields: Mapping[str, Field | Tensor] = fields
        self._agree = agree
        plain = {name: field for name, field in fields.items() if not isinstance(field, Tensor)}
        self._pack = tuple((name, field.pack) for name, field in plain.items())
        self._unpack = tuple((name, field.unpack) for name, field in plain.items())
        self._tensors = tuple((name, field) for name, field in fields.items() if isinstance(field, Tensor))

    def pack(self, message: Any) -> tuple[Header, list[Frame]]:
        """The header map and the tensors of a message.

        Raises:
            ProtocolError: the message breaks the rules that its receiver applies.
        """
        frames, name = [], ""
        try:
            header = _pack_fields(self._pack, message)
            dimensions: dict[str, int] = {}
            for name, tensor in self._tensors:
                header[name], frame = tensor.pack(getattr(message, name), dimensions)
                frames.append(frame)
            if self._agree is not None:
                name = ""
                self._agree(message)
        except ValueError as error:
            raise self._refusal(name, error) from error
        return header, frames

    def unpack(self, header: Header, frames: Sequence[Frame]) -> Any:
        """The message that a peer sent.

        Raises:
            ProtocolError: a field is missing, unknown or does not fit.
        """
        if len(frames) != len(self._tensors):
            raise ProtocolError(f"{self.kind.__name__} has {len(self._tensors)} tensors, got {len(frames)}")
        name = ""
        try:
            values = _unpack_fields(self._unpack, header)
            dimensions: dict[str, int] = {}
            for (name, tensor), frame in zip(self._tensors, frames, strict=True):
                values[name] = tensor.unpack(header.get(name), frame, dimensions)
            name = ""
            _refuse_unknown(self.fields, header)
            message = self.kind(**values)
            if self._agree is not None:
                self._agree(message)
        except ValueError as error:
            raise self._refusal(name, error) from None
        return message

    def _refusal(self, name: str, error: ValueError) -> ProtocolError:
        return ProtocolError(f"{self.kind.__name__} {name + ' ' if name else ''}{error}")


def _agree_run(run: m.Run) -> None:
    """Counts, experts, rows and tokens of a Run describe the same work."""
    if len(run.experts) != len(run.counts):
        raise ValueError(f"has {len(run.experts)} experts but {len(run.counts)} counts")
    if len(set(run.experts)) != len(run.experts):
        raise ValueError("names an expert twice")
    rows, tokens = run.rows, len(run.tokens)
    if sum(run.counts) != len(rows):  # and the shapes say that there are as many weights
        raise ValueError(f"counts {sum(run.counts)} rows but holds {len(rows)}")
    if len(rows) <= _FEW_ROWS:
        few = rows.tolist()
        low, high = min(few), max(few)
    else:
        low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= tokens:
        raise ValueError(f"has rows from {low} to {high}, but {tokens} tokens")


def _agree_chunk(chunk: m.Chunk) -> None:
    if chunk.offset + len(chunk.data) > chunk.total:
        raise ValueError(f"ends at byte {chunk.offset + len(chunk.data)} of a file of {chunk.total}")


def _agree_tune(tune: m.Tune) -> None:
    if tune.shared > tune.blocks:
        raise ValueError(f"shares {tune.shared} of {tune.blocks} blocks")
    if not tune.decoder_sha256:
        raise ValueError("names no decoder")


_INDEX = Int(INT32_MAX)
_SOME = Int(INT32_MAX, least=1)
_COUNT = Int()
_ID = Int(UINT64_MAX)
_SECONDS = Number()
_BYTES = Int()
_NAME = Text(128)
_REASON = Text(512)
_KEY = Code(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}", "a Z85 key of 40 characters")
_SHA256 = Code(r"[0-9a-f]{64}", "a SHA-256 in hex")
_FINGERPRINT = Code(r"[0-9a-f]{1,64}", "a fingerprint in hex")
_ACTIVATIONS = Tensor(("f32", "f16"), ("tokens", "hidden"))
_EXPERTS = Tensor(("i32",), ("experts", 2), least=0)

_REPORT = Record(
    DeviceReport,
    name=_NAME,
    hardware=_NAME,
    system=_NAME,
    provider=_NAME,
    threads=_INDEX,
    memory_bytes=_BYTES,
    flops=Number(),
    downlink_snr_hz=Number(),
    uplink_snr_hz=Number(),
)

_TABLE = (
    # Control plane: asyncio on both ends.
    Schema(1, m.Hello, session=_ID, report=_REPORT, enrol_key=_KEY),
    Schema(
        2,
        m.Welcome,
        session=_ID,
        enrolled=Flag(),
        device_id=_FINGERPRINT,
        data_port=Int(65535),
        lease_s=_SECONDS,
        max_message_bytes=_BYTES,
        model=_NAME,
        manifest_sha256=_SHA256,
    ),
    Schema(
        3,
        m.Place,
        generation=_COUNT,
        experts=_EXPERTS,
        sha256=Tensor(("u8",), ("experts", 32)),
        size=Tensor(("i64",), ("experts",), least=1),
        hidden=_INDEX,
    ),
    Schema(4, m.Fetch, layer=_INDEX, expert=_INDEX, offset=_BYTES, length=_BYTES),
    Schema(
        5,
        m.Chunk,
        _agree_chunk,
        layer=_INDEX,
        expert=_INDEX,
        offset=_BYTES,
        total=_BYTES,
        data=Tensor(("u8",), ("bytes",)),
    ),
    Schema(6, m.Ready, generation=_COUNT, experts=_EXPERTS),
    Schema(7, m.Ping, sequence=_COUNT, done=_COUNT, queued=_COUNT, rss_bytes=_BYTES),
    Schema(8, m.Pong, sequence=_COUNT),
    Schema(9, m.Goodbye, reason=_REASON, retry=Flag()),
    # Control plane of a semantic broadcast.
    Schema(
        10,
        m.Tune,
        _agree_tune,
        broadcast=_ID,
        port=Int(65535, least=1),
        user=Int(1),
        blocks=_SOME,
        shared=_SOME,
        uses=_SOME,
        height=_SOME,
        width=_SOME,
        share=Number(0.0, 1.0),
        snr_db=Number(-1000.0, 1000.0),
        fades=Flag(),
        seed=_ID,
        decoder_sha256=_SHA256,
        decoder_bytes=_SOME,
    ),
    Schema(11, m.Tuned, broadcast=_ID),
    Schema(12, m.Rows, broadcast=_ID, first=_INDEX, pixels=Tensor(("u8",), ("rows", "width", 3))),
    Schema(13, m.Shown, broadcast=_ID, heard=_INDEX, lost=_INDEX, decode_s=_SECONDS),
    # Data plane: blocking sockets, one owner thread on both ends.
    Schema(16, m.Attach, session=_ID),
    Schema(17, m.Attached, session=_ID),
    Schema(
        18,
        m.Run,
        _agree_run,
        attempt=_ID,
        layer=_INDEX,
        remaining_s=_SECONDS,
        bandwidth_hz=Number(),
        experts=Ints(INT32_MAX),
        counts=Ints(INT32_MAX, least=1),
        tokens=_ACTIVATIONS,
        rows=Tensor(("i32",), ("rows",)),
        weights=Tensor(("f32",), ("rows",)),
    ),
    Schema(
        19,
        m.Result,
        attempt=_ID,
        layer=_INDEX,
        compute_s=_SECONDS,
        residence_s=_SECONDS,
        link_down_s=_SECONDS,
        link_up_s=_SECONDS,
        partial=_ACTIVATIONS,
    ),
    Schema(31, m.Failure, attempt=_ID, reason=_REASON),
    # Broadcast plane: the base station speaks, devices listen.
    Schema(32, m.Pilot, broadcast=_ID, sent=_INDEX),
    Schema(33, m.Symbols, broadcast=_ID, first=_INDEX, symbols=Tensor(("f32", "f16"), ("blocks", "uses", 2))),
)

BY_NUMBER: Mapping[int, Schema] = {schema.number: schema for schema in _TABLE}
BY_KIND: Mapping[type[Any], Schema] = {schema.kind: schema for schema in _TABLE}
