"""What two users get when codecs send bits at the capacity of the link: time division, and superposition with SIC.

Both are bounds: no code reaches capacity on a few hundred symbols, so a real link does worse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import FloatArray, Pixels
from wdmoe.broadcast.baselines.codecs import Codec
from wdmoe.broadcast.quality.pareto_front import QUALITIES, Front, front_of, qualities_of
from wdmoe.errors import ConfigError
from wdmoe.wireless.broadcast import capacity_bits, superposition_bits, time_division_bits

_ABOVE = 2  # rungs in a row that do not fit before a ladder is left: a rung may be smaller than the one below it

SCHEMES: dict[str, Callable[[npt.ArrayLike, npt.ArrayLike], FloatArray]] = {
    "time division": time_division_bits,
    "superposition": superposition_bits,
}


@dataclass(frozen=True, slots=True)
class Ladder:
    """One picture at every quality that any link here carries, and at none (rung 0, no bits)."""

    bits: npt.NDArray[np.int64]  # (rung,) ascending
    psnr_db: FloatArray  # (rung,)
    ssim: FloatArray  # (rung,)
    ms_ssim: FloatArray  # (rung,), not a number where the picture is too small for it

    def best(self, budget_bits: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """(...,) the rung of the highest PSNR among those that fit (...,) budgets."""
        best_so_far = np.maximum.accumulate(self.psnr_db)
        best_rung = np.searchsorted(best_so_far, best_so_far)  # the first that reached it
        return np.asarray(best_rung[np.searchsorted(self.bits, np.asarray(budget_bits), side="right") - 1])


def build_ladder(codec: Codec, picture: Pixels, blank: Pixels, most_bits: int) -> Ladder:
    """Write one picture at rising qualities until they no longer fit.

    Args:
        codec: its variants are all tried; a ladder has the rungs of all.
        picture: (height, width, 3).
        blank: same shape: what a user shows who gets no picture, as no rung fits.
        most_bits: of the best link that will be asked for.
    Returns:
        The ladder, only of rungs that fit `most_bits`.
    """
    bits, shown = [0], [blank]
    for variant in range(codec.variants):
        over = 0
        for rung in range(codec.rungs):
            file = codec.encode(picture, variant, rung)
            length = 8 * codec.payload_bytes(file)
            over = over + 1 if length > most_bits else 0
            if over == _ABOVE:
                break
            if not over:
                bits.append(length)
                shown.append(codec.decode(file))
    wanted = np.broadcast_to(picture, (len(shown), *picture.shape))
    order = np.argsort(bits, kind="stable")
    got = np.stack(shown)[order]
    return Ladder(np.array(bits)[order], *qualities_of(wanted, got).T)


def channel_uses(cbr: float, picture_shape: tuple[int, ...]) -> int:
    """Complex channel uses of a picture: CBR times its height, width and channels, rounded down.

    Raises:
        ConfigError: CBR is not above 0 and at most 1.
    """
    if not 0 < cbr <= 1:
        raise ConfigError(f"cbr must be above 0 and at most 1, got {cbr}")
    return int(cbr * np.prod(picture_shape) + 1e-9)


def most_bits(snr_db: npt.ArrayLike, uses: int) -> int:
    """Bits that the better of the users gets if it has all of the block."""
    return int(uses * capacity_bits(snr_db).max())


def sweep(
    ladders: Mapping[int, Ladder],
    pairs: npt.ArrayLike,
    snr_db: tuple[float, float],
    uses: int,
    scheme: str,
    shares: npt.ArrayLike,
) -> Front:
    """Both users' qualities as the first one's share of the block or of the power goes through `shares`.

    Args:
        ladders: by number of the picture.
        pairs: (pair, 2) numbers of pictures.
        snr_db: of the two users.
        uses: complex channel uses for the whole block.
        scheme: one of `SCHEMES`.
        shares: (point,) 0 to 1.
    Raises:
        ConfigError: the scheme is unknown, or a share or SNR is out of range.
    """
    if scheme not in SCHEMES:
        raise ConfigError(f"scheme must be one of {', '.join(SCHEMES)}; got {scheme!r}")
    share = np.asarray(shares, dtype=np.float64)
    return front_of_bits(ladders, pairs, share, uses * SCHEMES[scheme](snr_db, share)[:, None])


def same_to_both(
    ladders: Mapping[int, Ladder], numbers: npt.ArrayLike, snr_db: tuple[float, float], uses: int
) -> Front:
    """One point: both users want the same picture and get it at the weaker one's capacity.

    Args:
        numbers: (picture,) numbers; the rest as in `sweep`.
    """
    wanted = np.asarray(numbers)
    bits = np.full((1, 1, 1), uses * capacity_bits(snr_db).min())
    return front_of_bits(ladders, np.stack([wanted, wanted], axis=1), np.ones(1), bits)


def even_shares(snr_db: tuple[float, float], scheme: str, points: int) -> FloatArray:
    """Shares of the first user, 0 to 1, whose rates lie evenly for the stronger user: a sweep without gaps.

    Raises:
        ConfigError: the scheme is unknown, or there are fewer than two points.
    """
    if scheme not in SCHEMES or points < 2:
        raise ConfigError(f"need one of {', '.join(SCHEMES)} and two points or more, got {scheme!r} and {points}")
    part = np.linspace(0, 1, points)
    if scheme == "superposition":
        strongest = 10 ** (max(snr_db) / 10)
        part = np.clip(np.expm1(part * np.log1p(strongest)) / strongest, 0, 1)
    return part if snr_db[0] >= snr_db[1] else 1 - part[::-1]


def front_of_bits(ladders: Mapping[int, Ladder], pairs: npt.ArrayLike, share: FloatArray, bits: FloatArray) -> Front:
    """What users see whose links carry so many bits.

    Args:
        bits: (point, pair, 2), or 1 where all are alike; rounded down to whole ones.
        ladders, pairs, share: as in `sweep`.
    """
    numbers = np.asarray(pairs)
    budget = np.floor(np.broadcast_to(bits, (share.size, *numbers.shape)) + 1e-9).astype(np.int64)
    rungs = np.empty_like(budget)
    for place in np.ndindex(numbers.shape):
        rungs[(slice(None), *place)] = ladders[int(numbers[place])].best(budget[(slice(None), *place)])
    return front_of_rungs(ladders, numbers, share, rungs)


def front_of_rungs(
    ladders: Mapping[int, Ladder], pairs: npt.ArrayLike, share: FloatArray, rungs: npt.NDArray[np.int64]
) -> Front:
    """What users see who get these rungs (point, pair, 2); the rest as in `sweep`."""
    numbers = np.asarray(pairs)
    quality = np.empty((*rungs.shape, len(QUALITIES)))
    for place in np.ndindex(numbers.shape):
        ladder = ladders[int(numbers[place])]
        for place_of, name in enumerate(QUALITIES):
            quality[(slice(None), *place, place_of)] = getattr(ladder, name)[rungs[(slice(None), *place)]]
    return front_of(share, quality)
