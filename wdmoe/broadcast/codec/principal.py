"""The linear part of the codec: principal components of pictures, and how two users share a block's real dimensions.

Sent as they are, without bits, the principal components of a picture with powers in the proportion of their standard
deviations are the best linear code for Gaussian noise [D; Lee and Petersen, IEEE Trans. Commun. 24(12), 1976]. What the
networks add starts from there: untrained, the codec is that linear code.

How a ratio alpha divides dimensions and power follows from the components' spread alone: for each alpha the division
with the least `alpha log D1 + (1 - alpha) log D2` of the errors D, at one reference SNR for both users.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import Float32Array, FloatArray
from wdmoe.errors import ConfigError

REFERENCE_SNR_DB = 8.0
ALPHAS = 65  # of the table of divisions
_TRIED = 64  # divisions of the dimensions, and as many of the power
_LEAST_SPREAD = 1e-3  # relative to the largest: components beyond the pictures' own rank
_CHROMA_SPREAD = 0.4  # of pictures nobody has looked at
_LUMA_CHROMA = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3.0], [2.0], [6.0]])


@dataclass(frozen=True, slots=True)
class Principal:
    """Components of pictures (3, side, side), 0 to 1, most spread first."""

    mean: Float32Array  # (3 side^2,)
    basis: Float32Array  # (3 side^2, component), orthonormal columns
    spread: Float32Array  # (component,) standard deviations, > 0, falling


def fit_principal(pixels: npt.NDArray[np.uint8], components: int) -> Principal:
    """Of pictures (picture, side, side, 3) and their mirror images.

    Raises:
        ConfigError: fewer than two pictures, or more components than values.
    """
    if len(pixels) < 2 or not 1 <= components <= pixels[0].size:
        raise ConfigError(f"need two pictures or more and 1 to {pixels[:1].size} components, got {components}")
    flat = np.moveaxis(pixels, -1, 1).astype(np.float32) / 255
    both = np.concatenate([flat, flat[..., ::-1]]).reshape(2 * len(flat), -1)
    mean = both.mean(axis=0)
    both -= mean
    power, basis = np.linalg.eigh((both.T @ both).astype(np.float64) / len(both))
    spread = np.sqrt(np.maximum(power[::-1][:components], 0))
    spread = np.maximum(spread, _LEAST_SPREAD * spread[0])
    basis = basis[:, ::-1][:, :components]
    basis *= np.sign(basis[np.abs(basis).argmax(axis=0), np.arange(components)])  # eigenvectors have no sign
    return Principal(*(np.ascontiguousarray(part, dtype=np.float32) for part in (mean, basis, spread)))


def assumed_principal(side: int, components: int) -> Principal:
    """For pictures nobody has looked at: cosines of luma and chroma, spread falling with frequency."""
    place, wave = np.indices((side, side))
    cosines = np.cos(np.pi * (2 * place + 1) * wave / (2 * side)) * np.sqrt(2 / side)
    cosines[:, 0] = np.sqrt(1 / side)
    basis = np.einsum("kc,yv,xh->cyxkvh", _LUMA_CHROMA, cosines, cosines).reshape(3 * side**2, -1)
    kind, down, across = np.indices((3, side, side)).reshape(3, -1)
    spread = np.where(kind > 0, _CHROMA_SPREAD, 1.0) * 0.4 * side / (1 + np.hypot(down, across)) ** 1.2
    order = np.argsort(-spread, kind="stable")[:components]
    mean = np.full(3 * side**2, 0.5, np.float32)
    return Principal(mean, np.ascontiguousarray(basis[:, order], np.float32), spread[order].astype(np.float32))


def divisions(spread: npt.ArrayLike, dimensions: int) -> tuple[FloatArray, FloatArray]:
    """The first user's part of a block's dimensions and of its power, for each alpha of an even grid from 0 to 1.

    Args:
        spread: (component,) standard deviations, falling.
        dimensions: real ones that both users share, 2 to the number of components.
    Returns:
        (ALPHAS,) twice: 0 at alpha 0, 1 at alpha 1, never falling; the users are treated alike.
    """
    own = np.asarray(spread, np.float64)
    part = np.arange(1, _TRIED) / _TRIED
    count = np.rint(part * dimensions).astype(int)
    after = np.cumsum(own[::-1] ** 2)[::-1]
    missed = np.append(after, 0.0)[count]
    noise = 10 ** (-REFERENCE_SNR_DB / 10) / dimensions * np.cumsum(own)[count - 1] ** 2
    error = np.log(missed[:, None] + noise[:, None] / part[None, :])  # (dimensions' part, power's part)
    alpha = np.linspace(0, 1, ALPHAS)[:, None, None]
    both = alpha * error + (1 - alpha) * error[::-1, ::-1]
    best = both.reshape(ALPHAS, -1).argmin(axis=1)
    dims, power = part[best // part.size], part[best % part.size]
    alone = np.log(np.append(after, 0.0)[dimensions] + _noise_of_all(own, dimensions))
    single = alpha[:, 0, 0] * alone + (1 - alpha[:, 0, 0]) * np.log(after[0])
    gone = single < both.reshape(ALPHAS, -1).min(axis=1)  # the second user is better left out
    dims, power = np.where(gone, 1.0, dims), np.where(gone, 1.0, power)
    return _balanced(dims), _balanced(power)


def _noise_of_all(spread: FloatArray, dimensions: int) -> float:
    """Error by noise of a user who has every dimension and all power."""
    return float(10 ** (-REFERENCE_SNR_DB / 10) / dimensions * spread[:dimensions].sum() ** 2)


def _balanced(part: FloatArray) -> FloatArray:
    """Never falling, and the same for both users: what one has at alpha, the other has at 1 - alpha."""
    rising = np.maximum.accumulate(part)
    even = (rising + 1 - rising[::-1]) / 2
    even[0], even[-1] = 0.0, 1.0
    return even
