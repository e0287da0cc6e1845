"""The quality law: what mean PSNR a user can expect of a share, both SNRs and a rate, fitted to measurements [D].

    PSNR = sum over i, j, k, l of c[i, j, k, l] A_i(share) S_j(own SNR) R_k(CBR) T_l(the other's SNR),  all c >= 0

A, S and R are 1 and ramps from 0 to 1 between knots, so the law never falls as share, own SNR or rate rise, whatever
was measured. T is a pair that goes down and up: the other user's SNR may help or harm. Beyond the outer knots the law
stays flat. It is a mean over pairs of different classes; a single picture may lie several decibels off.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import FloatArray
from wdmoe.errors import ConfigError

FORMAT = 1
LAW_FILE = Path(__file__).resolve().parents[1] / "data" / "law.json"  # of the shipped codec
SHARE_KNOTS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
SNR_KNOTS_DB = (0.0, 5.0, 10.0, 20.0)
CBR_KNOTS = (1 / 12, 1 / 6, 1 / 3)
SHAPE = (len(SHARE_KNOTS), len(SNR_KNOTS_DB), len(CBR_KNOTS), 2)


@dataclass(frozen=True, slots=True)
class LawError:
    """How far the law lies from measurements it was not fitted to."""

    points: int
    rms_db: float
    most_db: float


@dataclass(frozen=True, slots=True)
class Law:
    """The fitted coefficients, none negative."""

    coefficients: FloatArray  # `SHAPE`
    error: LawError
    weights_sha256: str  # of the model that was measured

    def __post_init__(self) -> None:
        if self.coefficients.shape != SHAPE or not np.all(self.coefficients >= 0):  # also refuses NaN
            raise ConfigError(f"a quality law needs coefficients of shape {SHAPE}, none negative")

    def psnr_db(
        self, share: npt.ArrayLike, own_db: npt.ArrayLike, other_db: npt.ArrayLike, cbr: npt.ArrayLike
    ) -> FloatArray:
        """Expected mean PSNR of a user, (...,) dB, of (...,) shares (alpha, or 1 - alpha), SNRs and rates."""
        return design(share, own_db, other_db, cbr) @ self.coefficients.ravel()

    def both_db(self, alpha: npt.ArrayLike, snr_db: tuple[float, float], cbr: float) -> FloatArray:
        """(..., 2) dB of both users."""
        first = np.asarray(alpha, dtype=np.float64)
        users = ((first, *snr_db), (1 - first, *snr_db[::-1]))
        return np.stack([self.psnr_db(share, own, other, cbr) for share, own, other in users], axis=-1)


def design(share: npt.ArrayLike, own_db: npt.ArrayLike, other_db: npt.ArrayLike, cbr: npt.ArrayLike) -> FloatArray:
    """(..., coefficient): what each coefficient of the law is multiplied with."""
    parts = np.broadcast_arrays(*(np.asarray(each, dtype=np.float64) for each in (share, own_db, cbr, other_db)))
    other = np.clip((parts[3] - SNR_KNOTS_DB[0]) / (SNR_KNOTS_DB[-1] - SNR_KNOTS_DB[0]), 0, 1)
    factors = [
        _ramps(parts[0], SHARE_KNOTS),
        _ramps(parts[1], SNR_KNOTS_DB),
        _ramps(parts[2], CBR_KNOTS),
        np.stack([1 - other, other], axis=-1),
    ]
    return np.asarray(np.einsum("...i,...j,...k,...l->...ijkl", *factors).reshape(*parts[0].shape, -1))


def save_law(law: Law, file: Path) -> None:
    """Write JSON; ConfigError if it cannot be written."""
    told = {
        "format": FORMAT,
        "coefficients": np.round(law.coefficients, 6).tolist(),
        "error": {"points": law.error.points, "rms_db": law.error.rms_db, "most_db": law.error.most_db},
        "weights_sha256": law.weights_sha256,
    }
    try:
        file.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror or error}") from error


def load_law(file: Path) -> Law:
    """The law of a file of `save_law`; ConfigError if it is not one."""
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        if told["format"] != FORMAT:
            raise ConfigError(f"{file} is a quality law of format {told['format']!r}, not {FORMAT}")
        off = told["error"]
        error = LawError(int(off["points"]), float(off["rms_db"]), float(off["most_db"]))
        coefficients = np.array(told["coefficients"], dtype=np.float64)
        return Law(coefficients, error, str(told["weights_sha256"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{file} is not a quality law; make one: tools/study/fit_quality_law") from error


def _ramps(values: FloatArray, knots: tuple[float, ...]) -> FloatArray:
    """(..., knot): 1, and for each pair of knots what goes from 0 to 1 between them."""
    ends = np.array(knots)
    rising = np.clip((values[..., None] - ends[:-1]) / np.diff(ends), 0, 1)
    return np.concatenate([np.ones_like(values)[..., None], rising], axis=-1)
