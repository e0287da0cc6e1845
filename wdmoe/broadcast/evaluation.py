"""What both users see through a codec, over a sweep of alpha: the points of its region."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from wdmoe.broadcast.batches import as_pictures
from wdmoe.broadcast.fading import awgn, draw_unit
from wdmoe.broadcast.metrics import FloatArray, psnr_db
from wdmoe.broadcast.model import USERS, BroadcastCodec

_AT_ONCE = 64


@torch.no_grad()
def alpha_sweep(
    codec: BroadcastCodec,
    pairs: npt.NDArray[np.uint8],
    alphas: npt.ArrayLike,
    snr_db: tuple[float, float],
    kept: int,
    seed: int,
) -> FloatArray:
    """PSNR of both users on steady channels; every alpha meets the same noise.

    Args:
        codec: put into evaluation mode.
        pairs: (pair, 2, side, side, 3) pictures.
        alphas: (point,) 0 to 1.
        snr_db: of the two users.
        kept: symbols of a token, see `ModelSettings.kept`.
        seed: of the noise.
    Returns:
        (point, pair, 2) dB, of pixels rounded to 0..255 as a screen has them.
    """
    codec.eval()
    device, patch = next(codec.parameters()).device, codec.settings.patch
    tokens = (pairs.shape[2] // patch) * (pairs.shape[3] // patch)
    points = np.asarray(alphas, dtype=np.float32)
    generator = torch.Generator().manual_seed(seed)
    found = np.empty((len(points), len(pairs), USERS))
    for start in range(0, len(pairs), _AT_ONCE):
        part = pairs[start : start + _AT_ONCE]
        count = len(part)
        pictures = as_pictures(part).to(device)
        noise = draw_unit(generator, count, USERS, tokens, codec.settings.slots).to(device)
        snrs = torch.tensor([snr_db] * count, device=device)
        rate = torch.full((count,), kept, device=device)
        for place, point in enumerate(points):
            alpha = torch.full((count,), float(point), device=device)
            heard = awgn(codec.encode(pictures, snrs, alpha, rate), snrs, noise)
            shown = codec.decode_both(heard.symbols, heard.snr_db, alpha, rate)
            found[place, start : start + count] = psnr_db(part, as_pixels(shown))
    return found


def as_pixels(pictures: torch.Tensor) -> npt.NDArray[np.uint8]:
    """(..., 3, side, side), about 0 to 1, to (..., side, side, 3) uint8."""
    levels = (pictures.float().clamp(0, 1) * 255).round().to(torch.uint8).movedim(-3, -1)
    return np.asarray(levels.cpu().numpy())
