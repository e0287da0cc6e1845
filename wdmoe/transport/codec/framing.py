"""One frame for each message: the codec's header and tensors, one after the other.

    byte 0        protocol version
    byte 1        message number
    byte 2        how many tensors follow, 8 at most
    byte 3        0
    4 bytes each  length of the map, then of each tensor: little-endian uint32
    the map, then the tensors; zeros before each tensor so that it begins at a multiple of 8

Not one ZeroMQ frame a tensor: libzmq 4.3.5 aborts the process, or never ends its context, when a socket is closed
and its peer goes with a message of several frames half on its way (trap Z21 in docs/wire.md).

The two messages of a layer go through native code where there is no checksum; it leaves all that is unusual to the
general way, which it must agree with.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct

from wdmoe.errors import ProtocolError
from wdmoe.transport.codec import _native
from wdmoe.transport.codec.fields import Frame
from wdmoe.transport.codec.messages import PROTOCOL_VERSION, Message
from wdmoe.transport.codec.wire import MAX_HEADER_BYTES, Limits, decode, encode

MAX_TENSORS = 8  # no message has more

_ALIGNMENT = 8
_STARTS = tuple(Struct(f"<{1 + count}I") for count in range(MAX_TENSORS + 1))
_FIXED_BYTES = 4


def pack(message: Message, limits: Limits) -> bytes:
    """What travels of a message.

    Raises:
        ProtocolError: it is larger than the peer accepts, or breaks a rule that its receiver applies.
    """
    frame = None if limits.checksum else _native.write(message, PROTOCOL_VERSION)
    if frame is None:
        frame = join(encode(message, limits.checksum))
    if len(frame) > limits.max_message_bytes:
        raise ProtocolError(f"a message of {len(frame)} bytes; the peer accepts {limits.max_message_bytes}")
    return frame


def unpack(frame: memoryview, limits: Limits) -> Message:
    """The message of an untrusted peer; raises as `split` and `wdmoe.transport.codec.wire.decode`."""
    if not limits.checksum and len(frame) <= limits.max_message_bytes:
        message = _native.read(frame, PROTOCOL_VERSION)
        if message is not None:
            return message
    return decode(split(frame), limits)


def join(parts: Sequence[Frame]) -> bytes:
    """What travels, of what `wdmoe.transport.codec.wire.encode` returned. Copies the tensors."""
    header, tensors = parts[0], parts[1:]
    lengths = [len(header) - 2, *map(len, tensors)]
    pieces = [header[:2], bytes((len(tensors), 0)), _STARTS[len(tensors)].pack(*lengths), header[2:]]
    end = _FIXED_BYTES + 4 * len(lengths) + lengths[0]
    for tensor in tensors:
        padding = -end % _ALIGNMENT
        pieces += (bytes(padding), tensor)
        end += padding + len(tensor)
    return b"".join(pieces)


def split(frame: memoryview) -> list[Frame]:
    """The header and the tensors in it, tensors as views, for `wdmoe.transport.codec.wire.decode`.

    Args:
        frame: format "B", from an untrusted peer.
    Raises:
        ProtocolError: lengths do not describe the frame. A frame of another version is not looked into.
    """
    if len(frame) < 2 or frame[0] != PROTOCOL_VERSION:
        return [bytes(frame[:MAX_HEADER_BYTES])]
    count = frame[2] if len(frame) >= _FIXED_BYTES else MAX_TENSORS + 1
    if count > MAX_TENSORS or frame[3] or len(frame) < _FIXED_BYTES + 4 * (1 + count):
        raise ProtocolError(f"a frame of {len(frame)} bytes that does not begin with its lengths")
    lengths = _STARTS[count].unpack_from(frame, _FIXED_BYTES)
    begin = _FIXED_BYTES + 4 * (1 + count)
    end = begin + lengths[0]
    parts: list[Frame] = [bytes(frame[:2]) + bytes(frame[begin:end])]
    for length in lengths[1:]:
        begin = end + -end % _ALIGNMENT
        if any(frame[end:begin]):
            raise ProtocolError("a frame with something between its tensors")
        end = begin + length
        parts.append(frame[begin:end])
    if end != len(frame):
        raise ProtocolError(f"a frame of {len(frame)} bytes whose lengths make {end}")
    return parts
