"""Classical picture codecs as baselines, with nothing counted but what the picture itself took.

Their files carry much that both ends of a link can agree on beforehand, and on a 32x32 picture that would be most of
the file. So a payload is, exactly:

JPEG 2000
    The bodies of the tile-parts, from behind SOD to the end of the tile-part. Not counted: SOC, SIZ, COD, QCD, COM,
    SOT, SOD, EOC, which depend on the size of the picture and on settings alone (rate is set by truncation).
HEVC intra
    The NAL units of coded slices (types 0 to 31, with their headers) in the box `mdat`. Not counted: every HEIF box,
    VPS, SPS and PPS, SEI, the four bytes of length before each unit.
AVIF
    The OBUs of frames, frame headers and tile groups (with their header byte) in `mdat`. Not counted: every box,
    sequence header, temporal delimiter, metadata, padding, and the length field of each OBU.

Nor is it counted which of a codec's variants (chroma subsampling, levels of the wavelet) was the best for a picture.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from wdmoe.arrays import Pixels
from wdmoe.errors import ConfigError, MissingExtraError

_SOC, _SOT, _SOD, _EOC = b"\xff\x4f", b"\xff\x90", b"\xff\x93", b"\xff\xd9"
_OBU_FRAME_HEADER, _OBU_TILE_GROUP, _OBU_FRAME, _OBU_REDUNDANT_FRAME_HEADER = 3, 4, 6, 7
_OBU_COUNTED = {_OBU_FRAME_HEADER, _OBU_TILE_GROUP, _OBU_FRAME, _OBU_REDUNDANT_FRAME_HEADER}
_MOST_SLICE_TYPE = 31  # NAL units of coded slices; parameter sets and SEI come behind


class Codec(Protocol):
    """One way to write a picture at a ladder of qualities."""

    @property
    def name(self) -> str:
        """For tables."""
        ...

    @property
    def variants(self) -> int:
        """Ways to write a picture that are all tried."""
        ...

    @property
    def rungs(self) -> int:
        """Qualities."""
        ...

    def encode(self, picture: Pixels, variant: int, rung: int) -> bytes:
        """A file of the picture (height, width, 3); rung 0 is the lowest quality."""
        ...

    def payload_bytes(self, file: bytes) -> int:
        """What of the file has to be sent; ConfigError if it is not such a file."""
        ...

    def decode(self, file: bytes) -> Pixels:
        """The picture (height, width, 3) of a file."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Jpeg2000:
    """OpenJPEG by Pillow: irreversible wavelet with colour transform, one layer, rate by truncation."""

    levels: tuple[int, ...] = (3, 4)  # resolutions; more of them cost a small picture more than they save
    rungs: int = 60
    highest_ratio: float = 24.0  # raw size over that of the codestream with its header, of rung 0
    lowest_ratio: float = 2.0
    name: str = "JPEG 2000"

    @property
    def variants(self) -> int:  # noqa: D102
        return len(self.levels)

    def encode(self, picture: Pixels, variant: int, rung: int) -> bytes:  # noqa: D102
        place = rung / max(1, self.rungs - 1)
        ratio = self.highest_ratio * (self.lowest_ratio / self.highest_ratio) ** place
        return _written(
            picture,
            "JPEG2000",
            no_jp2=True,
            irreversible=True,
            mct=1,  # Pillow leaves the colour transform away unless asked
            num_resolutions=self.levels[variant],
            quality_mode="rates",
            quality_layers=[ratio],
        )

    def payload_bytes(self, file: bytes) -> int:  # noqa: D102
        return sum(_tile_bodies(file))

    def decode(self, file: bytes) -> Pixels:  # noqa: D102
        return _read(file)


@dataclass(frozen=True, slots=True, kw_only=True)
class HevcIntra:
    """x265 by libheif: one intra picture, tuned for PSNR (libheif's own choice is SSIM)."""

    chroma: tuple[str, ...] = ("420", "444")
    preset: str = "slow"
    rungs: int = 51  # one step of its quantiser each
    name: str = "HEVC intra"

    @property
    def variants(self) -> int:  # noqa: D102
        return len(self.chroma)

    def encode(self, picture: Pixels, variant: int, rung: int) -> bytes:  # noqa: D102
        out = io.BytesIO()
        _heif().from_pillow(Image.fromarray(picture)).save(
            out,
            quality=2 * rung,
            chroma=self.chroma[variant],
            enc_params={"tune": "psnr", "preset": self.preset},
        )
        return out.getvalue()

    def payload_bytes(self, file: bytes) -> int:  # noqa: D102
        return sum(length for kind, length in _nal_units(_media(file)) if kind <= _MOST_SLICE_TYPE)

    def decode(self, file: bytes) -> Pixels:  # noqa: D102
        return np.asarray(_heif().open_heif(io.BytesIO(file)).to_pillow().convert("RGB"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Avif:
    """libaom by Pillow: one still picture, tuned for PSNR."""

    subsampling: tuple[str, ...] = ("4:2:0", "4:4:4")
    speed: int = 3  # libaom's effort: 0 is the slowest; 6 costs 0.5 to 1 dB here
    rungs: int = 51
    name: str = "AVIF"

    @property
    def variants(self) -> int:  # noqa: D102
        return len(self.subsampling)

    def encode(self, picture: Pixels, variant: int, rung: int) -> bytes:  # noqa: D102
        return _written(
            picture,
            "AVIF",
            quality=2 * rung,
            subsampling=self.subsampling[variant],
            speed=self.speed,
            max_threads=1,
            advanced={"tune": "psnr"},
        )

    def payload_bytes(self, file: bytes) -> int:  # noqa: D102
        return sum(length for kind, length in _obus(_media(file)) if kind in _OBU_COUNTED)

    def decode(self, file: bytes) -> Pixels:  # noqa: D102
        return _read(file)


CODECS: dict[str, type[Jpeg2000] | type[HevcIntra] | type[Avif]] = {
    "jpeg2000": Jpeg2000,
    "hevc": HevcIntra,
    "avif": Avif,
}


def _written(picture: Pixels, kind: str, **settings: Any) -> bytes:
    out = io.BytesIO()
    try:
        Image.fromarray(picture).save(out, kind, **settings)
    except (KeyError, OSError) as error:
        raise MissingExtraError(f"this Pillow cannot write {kind}: pip install 'wdmoe[broadcast]'") from error
    return out.getvalue()


def _read(file: bytes) -> Pixels:
    with Image.open(io.BytesIO(file)) as picture:
        return np.asarray(picture.convert("RGB"))


def _heif() -> Any:
    try:
        import pillow_heif
    except ImportError as error:
        raise MissingExtraError("HEVC intra needs pillow-heif: pip install 'wdmoe[broadcast]'") from error
    return pillow_heif


def _tile_bodies(stream: bytes) -> Iterator[int]:
    """Lengths of the tile-part bodies of a JPEG 2000 codestream (ITU-T T.800, annex A)."""
    if not stream.startswith(_SOC):
        raise ConfigError("not a JPEG 2000 codestream")
    at = 2
    while at + 4 <= len(stream):
        marker, length = stream[at : at + 2], int.from_bytes(stream[at + 2 : at + 4], "big")
        if marker != _SOT:
            at += 2 + length
            continue
        part = int.from_bytes(stream[at + 6 : at + 10], "big") or len(stream) - len(_EOC) - at  # 0: up to EOC
        body = stream.find(_SOD, at, at + part)
        if body < 0:
            break
        yield at + part - (body + 2)
        at += part
    if stream[at:] != _EOC:
        raise ConfigError("a JPEG 2000 codestream that does not end where it says")


def _media(file: bytes) -> bytes:
    """What is in the boxes `mdat` of an ISO base media file (ISO/IEC 14496-12)."""
    found, at = b"", 0
    while at + 8 <= len(file):
        size, kind, header = int.from_bytes(file[at : at + 4], "big"), file[at + 4 : at + 8], 8
        if size == 1:
            size, header = int.from_bytes(file[at + 8 : at + 16], "big"), 16
        size = size or len(file) - at
        if size < header:
            break
        if kind == b"mdat":
            found += file[at + header : at + size]
        at += size
    if at != len(file) or not found:
        raise ConfigError("not a file of boxes with coded data in it")
    return found


def _nal_units(media: bytes) -> Iterator[tuple[int, int]]:
    """(type, length with header) of HEVC units, each behind four bytes of length (ISO/IEC 14496-15)."""
    at = 0
    while at + 6 <= len(media):
        (length,) = struct.unpack_from(">I", media, at)
        yield (media[at + 4] >> 1) & 63, length
        at += 4 + length
    if at != len(media):
        raise ConfigError("HEVC units that do not fill their box")


def _obus(media: bytes) -> Iterator[tuple[int, int]]:
    """(type, length with header byte) of AV1 units (AV1 specification, section 5.3)."""
    at = 0
    while at < len(media):
        header = media[at]
        extended, sized = bool(header & 4), bool(header & 2)
        at += 1 + extended
        length = len(media) - at
        if sized:
            length, at = _leb128(media, at)
        at += length
        yield (header >> 3) & 15, 1 + extended + length
    if at != len(media):
        raise ConfigError("AV1 units that do not fill their box")


def _leb128(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for place in range(8):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 127) << (7 * place)
        if not byte & 128:
            return value, at
    raise ConfigError("a length in an AV1 unit does not end")
