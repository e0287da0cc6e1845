"""What both users see through a codec, over a sweep of alpha: the points of its region."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wdmoe.arrays import FloatArray, Pixels
from wdmoe.broadcast.codec.model import USERS, BroadcastCodec, as_pictures, as_pixels
from wdmoe.broadcast.quality.channel_draws import Radio
from wdmoe.broadcast.quality.pareto_front import QUALITIES, Front, front_of, qualities_of


@dataclass(frozen=True, slots=True)
class Judge:
    """How many pictures are computed at once, and what quality each of these then has."""

    at_once: int = 50
    qualities: Callable[[Pixels, Pixels], FloatArray] = qualities_of  # wanted and shown to (picture, quality)

    def parts(self, count: int) -> Iterator[slice]:
        """What is computed at once."""
        return (slice(start, start + self.at_once) for start in range(0, count, self.at_once))


EACH = Judge()


@torch.no_grad()
def alpha_sweep(
    codec: BroadcastCodec,
    pixels: Pixels,
    pairs: npt.ArrayLike,
    alphas: npt.ArrayLike,
    radio: Radio,
    kept: int,
    judge: Judge = EACH,
) -> Front:
    """Both users' qualities; every alpha meets the same noise.

    Args:
        codec: put into evaluation mode.
        pixels: (picture, side, side, 3) all pictures that pairs may name.
        pairs: (pair, 2) numbers of pictures.
        alphas: (point,) 0 to 1.
        radio: of the two users.
        kept: symbols of a token, see `ModelSettings.kept`.
        judge: of what is shown.
    Returns:
        Qualities of pixels rounded to 0..255 as a screen has them.
    """
    codec.eval()
    device, slots = next(codec.parameters()).device, codec.settings.slots
    points, numbers = np.asarray(alphas, dtype=np.float32), np.asarray(pairs)
    found = np.empty((len(points), len(numbers), USERS, len(QUALITIES)))
    for part in judge.parts(len(numbers)):
        wanted = pixels[numbers[part]]
        count = len(wanted)
        draws = radio.draws(numbers[part], tokens_of(codec, pixels), slots)
        snrs, rate = rows_of(radio.snr_db, count).to(device), torch.full((count,), kept, device=device)
        pictures = as_pictures(wanted).to(device)
        for place, point in enumerate(points):
            alpha = torch.full((count,), float(point), device=device)
            heard = radio.heard(codec.encode(pictures, snrs, alpha, rate).cpu(), snrs.cpu(), draws)
            shown = codec.decode_both(heard.symbols.to(device), heard.snr_db.to(device), alpha, rate)
            for user in range(USERS):
                found[place, part, user] = judge.qualities(wanted[:, user], as_pixels(shown[:, user]))
    return front_of(points, found)


def tokens_of(codec: BroadcastCodec, pixels: Pixels) -> int:
    """Tokens of a picture (picture, height, width, 3)."""
    return int((pixels.shape[1] // codec.settings.patch) * (pixels.shape[2] // codec.settings.patch))


def rows_of(values: npt.ArrayLike, count: int) -> Tensor:
    """(count, ...) float32: the same (...,) values in each row."""
    row = torch.as_tensor(np.asarray(values, dtype=np.float32))
    return row.expand(count, *row.shape).contiguous()


def mean_psnr(front: Front) -> FloatArray:
    """(point, 2) mean over pairs, dB."""
    return np.asarray(front.psnr_db.mean(axis=1))
