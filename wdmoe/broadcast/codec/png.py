"""A picture as a PNG file, with nothing but the standard library: devices need not have Pillow."""

from __future__ import annotations

import struct
import zlib

import numpy as np

from wdmoe.arrays import Pixels

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_EIGHT_BIT_RGB = bytes((8, 2, 0, 0, 0))


def png_bytes(picture: Pixels) -> bytes:
    """The file of a picture (height, width, 3). Source: ISO/IEC 15948."""
    height, width, _ = picture.shape
    lines = np.zeros((height, 1 + 3 * width), np.uint8)  # each begins with its filter: none
    lines[:, 1:] = picture.reshape(height, -1)
    head = struct.pack(">II", width, height) + _EIGHT_BIT_RGB
    body = zlib.compress(lines.data, level=1)
    return _SIGNATURE + _chunk(b"IHDR", head) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
