"""Pictures as people have them, as RGB: every mode, turned as the camera says, bounded before they are unpacked."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL import __version__ as pillow_version

from wdmoe.arrays import Pixels
from wdmoe.broadcast.codec.tiling import Grid
from wdmoe.errors import ConfigError

MOST_FILE_BYTES = 256 << 20
_WHITE = (255, 255, 255)
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")


def read_picture(file: Path) -> tuple[Pixels, tuple[str, ...]]:
    """Read a picture of any format Pillow knows.

    Of an animation the first frame is taken; what is transparent lies on white; 16 bits become 8 by rounding; an
    orientation from EXIF is followed. Colour profiles are not.

    Returns:
        (height, width, 3), and a line for people for each thing that was changed.
    Raises:
        ConfigError: the file is missing, no picture, damaged, or larger than 4000x3000 pixels either way up.
    """
    try:
        if file.stat().st_size > MOST_FILE_BYTES:
            raise ConfigError(f"{file} has more than {MOST_FILE_BYTES >> 20} MiB: too large for a picture")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow on odd metadata and large sizes: the size is checked here
            with Image.open(file) as image:
                return _taken(file, image)
    except UnidentifiedImageError as error:
        raise ConfigError(f"{file} is not a picture in a format that Pillow {pillow_version} reads") from error
    except Image.DecompressionBombError as error:
        raise ConfigError(f"{file} is too large: at most 4000x3000 pixels, either way up") from error
    except OSError as error:
        # Pillow's own failures are OSErrors without a number
        what = error.strerror or f"the picture is damaged or cut off ({error})"
        raise ConfigError(f"{file}: {what}") from error
    except (ValueError, SyntaxError, EOFError, IndexError, TypeError, KeyError, OverflowError) as error:
        raise ConfigError(f"{file}: the picture is damaged ({error})") from error


def _taken(file: Path, image: Image.Image) -> tuple[Pixels, tuple[str, ...]]:
    width, height = image.size
    try:
        Grid(height, width)  # before a pixel is unpacked
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    notes = []
    frames = int(getattr(image, "n_frames", 1))
    if frames > 1:
        notes.append(f"{file} is animated: only the first of its {frames} frames is sent")
    image.load()
    upright = ImageOps.exif_transpose(image)
    if _has_alpha(upright):
        notes.append(f"{file} is partly transparent: it is laid on white")
    return _as_rgb(upright), tuple(notes)


def _as_rgb(image: Image.Image) -> Pixels:
    if image.mode in _SIXTEEN_BITS:
        grey = (np.asarray(image).astype(np.float32) / 257).round().astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode in ("I", "F"):  # no range of their own: the 16 bits of most PNG and TIFF files, or 0 to 255
        value = np.asarray(image).astype(np.float64)
        if not np.isfinite(value).all() or value.min() < 0 or value.max() > 65535:
            raise ValueError(f"values from {value.min():g} to {value.max():g} of mode {image.mode}")
        grey = (value / 257 if value.max() > 255 else value).round().astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if _has_alpha(image):
        clear = image.convert("RGBA")
        image = Image.new("RGB", image.size, _WHITE)
        image.paste(clear, mask=clear.getchannel("A"))
    return np.ascontiguousarray(image.convert("RGB"))


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
