"""Which alpha serves a stated aim, by the quality law.

max-min        the worse user as good as can be
equal          both alike, or as near to it as the block allows
target:25dB@1  user 1 (or @2) gets that mean PSNR; the other one all that is left
fair           proportional fairness: the product of what both users have above the floor

As one user's quality only rises along alpha and the other's only falls, max-min and equal name the same alpha; where
the law is flat they may differ.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

from wdmoe.arrays import FloatArray
from wdmoe.broadcast.quality.front_comparison import FLOOR_DB
from wdmoe.broadcast.quality.quality_law import Law
from wdmoe.errors import ConfigError

AimKind = Literal["max-min", "equal", "target", "fair"]

_GRID = np.linspace(0, 1, 1001)
_TARGET = re.compile(r"target:(?P<psnr>\d+(?:\.\d+)?)\s*dB@(?P<user>[12])")


@dataclass(frozen=True, slots=True)
class Aim:
    """What alpha shall do."""

    kind: AimKind
    psnr_db: float = math.nan  # of a target
    user: int = 0  # 0 or 1, of a target


@dataclass(frozen=True, slots=True)
class Choice:
    """An alpha, and what the law expects of it."""

    alpha: float
    psnr_db: tuple[float, float]


def parse_aim(text: str) -> Aim:
    """`max-min`, `equal`, `fair`, or `target:` with a PSNR and a user as in `target:25dB@1`; else ConfigError."""
    if text in ("max-min", "equal", "fair"):
        return Aim(text)  # type: ignore[arg-type]
    found = _TARGET.fullmatch(text)
    if found is None:
        raise ConfigError(f"aim must be max-min, equal, fair, or as in target:25dB@1; got {text!r}")
    return Aim("target", float(found["psnr"]), int(found["user"]) - 1)


def choose_alpha(aim: Aim | str, snr_db: tuple[float, float], cbr: float, law: Law) -> Choice:
    """The alpha for an aim.

    Args:
        aim: or its text.
        snr_db: of both users.
        cbr: of the block.
        law: of the codec that is used.
    Raises:
        ConfigError: the aim is none, an SNR or the rate is no number, or a target cannot be reached.
    """
    if not all(map(math.isfinite, (*snr_db, cbr))):
        raise ConfigError(f"SNRs and cbr must be numbers, got {snr_db} and {cbr}")
    wanted = parse_aim(aim) if isinstance(aim, str) else aim
    both = law.both_db(_GRID, snr_db, cbr)
    if wanted.kind == "target":
        alpha = _reaches(both[:, wanted.user], wanted)
    else:
        # Between points of the grid the law is as good as straight: its knots lie on the grid.
        alpha = float(_GRID[int(np.argmax(_worth(both, wanted.kind)))])
    first, second = law.both_db(alpha, snr_db, cbr)
    return Choice(alpha, (float(first), float(second)))


def _worth(both: FloatArray, kind: AimKind) -> FloatArray:
    """(alpha,) what the aim makes most of."""
    if kind == "max-min":
        return np.asarray(both.min(axis=1))
    if kind == "equal":
        return -np.abs(both[:, 0] - both[:, 1])
    return np.asarray(np.log(np.maximum(both - FLOOR_DB, 1e-3)).sum(axis=1))


def _reaches(quality: FloatArray, aim: Aim) -> float:
    """The alpha that just gives the user its target."""
    alphas, rising = (_GRID, quality) if aim.user == 0 else (_GRID[::-1], quality[::-1])
    reached = np.flatnonzero(rising >= aim.psnr_db)
    if not reached.size:
        raise ConfigError(
            f"user {aim.user + 1} cannot have {aim.psnr_db:g} dB here; all of the block gives {rising[-1]:.2f} dB"
        )
    place = int(reached[0])
    if place == 0:
        return float(alphas[0])
    below, above = rising[place - 1], rising[place]
    part = (aim.psnr_db - below) / (above - below)
    return float(alphas[place - 1] + part * (alphas[place] - alphas[place - 1]))
