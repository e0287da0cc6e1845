"""The codec: a message becomes parts, and parts from anybody become a message or a ProtocolError.

    part 0      byte 0        protocol version
                byte 1        message number (`wdmoe.transport.codec.schema`)
                bytes 2...    msgpack map of the fields, 4 KiB with the two bytes at most
    parts 1...  raw little-endian tensors, in the order of the table; the map holds dtype and shape of each

With a checksum the map ends with `crc32`: the CRC-32 of everything before its four bytes and of all tensors.
Encryption makes it superfluous, so it is used on insecure channels only. How the parts travel in one frame:
`wdmoe.transport.codec.framing`.

Nothing is allocated for a length that a peer merely claims, and tensors are views of the frame they came in.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import msgpack

from wdmoe.errors import ProtocolError, VersionError
from wdmoe.transport.codec.fields import Frame, shown
from wdmoe.transport.codec.messages import PROTOCOL_VERSION, Message
from wdmoe.transport.codec.schema import BY_KIND, BY_NUMBER, Header, Schema

MAX_HEADER_BYTES = 4096
MAX_MESSAGE_BYTES = 16 << 20

_START = {number: bytes((PROTOCOL_VERSION, number)) for number in BY_NUMBER}
_CHECKSUM = "crc32"
_CHECKSUM_BYTES = 4
_CHECKSUM_UNSET = 2**32 - 1  # packed as five bytes, so that the real value fits in their place
_PARTS = threading.local()  # a Packer holds a buffer: one per thread


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a channel accepts."""

    max_message_bytes: int = MAX_MESSAGE_BYTES  # all parts together
    checksum: bool = False  # refuse messages without one


DEFAULT_LIMITS = Limits()


def encode(message: Message, checksum: bool = False) -> list[Frame]:
    """Write a message as parts.

    Large tensors are not copied: their parts are the arrays' own memory.

    Raises:
        ProtocolError: the message breaks a rule that `decode` would apply.
    """
    schema = BY_KIND[type(message)]
    header, parts = schema.pack(message)
    if checksum:
        header[_CHECKSUM] = _CHECKSUM_UNSET
    start = _START[schema.number] + _packer().pack(header)
    if len(start) > MAX_HEADER_BYTES:
        raise ProtocolError(f"a header of {len(start)} bytes, not 2 to {MAX_HEADER_BYTES}")
    if checksum:
        covered = start[:-_CHECKSUM_BYTES]
        start = covered + _crc32(covered, parts).to_bytes(_CHECKSUM_BYTES, "big")
    parts.insert(0, start)
    return parts


def decode(parts: Sequence[Frame], limits: Limits = DEFAULT_LIMITS) -> Message:
    """Read the parts of an untrusted peer's message.

    Args:
        parts: bytes, or memoryviews of format "B".
        limits: what this channel accepts.
    Returns:
        The message; its arrays are aligned, and views of `parts` where those are.
    Raises:
        VersionError: the peer speaks another protocol version.
        ProtocolError: anything else a correct peer would not send.
    """
    size = sum(map(len, parts))
    if size > limits.max_message_bytes:
        raise ProtocolError(f"a message of {size} bytes; this side accepts {limits.max_message_bytes}")
    if not parts or not 2 <= len(parts[0]) <= MAX_HEADER_BYTES:
        raise ProtocolError(f"a header of {len(parts[0]) if parts else 0} bytes, not 2 to {MAX_HEADER_BYTES}")
    start = bytes(parts[0])
    schema = _schema_of(start)
    header = _unpack_header(start)
    tensors = parts[1:]
    if _CHECKSUM in header:
        _verify_checksum(header, start, tensors)
    elif limits.checksum:
        raise ProtocolError(f"{schema.kind.__name__} lacks the checksum that an insecure channel needs")
    return cast(Message, schema.unpack(header, tensors))


def _schema_of(start: bytes) -> Schema:
    if start[0] != PROTOCOL_VERSION:
        raise VersionError(f"protocol version {start[0]} not spoken here; this side speaks {PROTOCOL_VERSION}")
    schema = BY_NUMBER.get(start[1])
    if schema is None:
        raise ProtocolError(f"message number {start[1]} is not known")
    return schema


def _unpack_header(start: bytes) -> Header:
    try:
        header = msgpack.unpackb(
            start[2:],
            use_list=False,
            strict_map_key=True,
            max_array_len=1024,
            max_map_len=64,
            max_str_len=MAX_HEADER_BYTES,
            max_bin_len=0,
            max_ext_len=0,
        )
    except Exception as error:  # msgpack has six unrelated types for "not msgpack"
        raise ProtocolError(f"a header that is not a msgpack map: {type(error).__name__}") from error
    if type(header) is not dict:
        raise ProtocolError(f"a header that is not a msgpack map, but {shown(header)}")
    return header


def _verify_checksum(header: Header, start: bytes, tensors: Sequence[Frame]) -> None:
    found = header.pop(_CHECKSUM)
    wanted = _crc32(start[:-_CHECKSUM_BYTES], tensors)
    if type(found) is not int or found != wanted or start[-_CHECKSUM_BYTES:] != wanted.to_bytes(4, "big"):
        raise ProtocolError("a message that was damaged on its way: its checksum does not match")


def _crc32(start: bytes, tensors: Sequence[Frame]) -> int:
    value = zlib.crc32(start)
    for frame in tensors:
        value = zlib.crc32(frame, value)
    return value


def _packer() -> Any:
    try:
        return _PARTS.packer
    except AttributeError:
        _PARTS.packer = msgpack.Packer()
        return _PARTS.packer
