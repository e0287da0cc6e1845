"""Fading that remembers: the amplitude is constant within a block and correlated between blocks by Jakes' J0.

`BlockFading` is an autoregression (Gauss-Markov process) whose correlation is J0 exactly for lags of up to `order`
blocks. Order 1 has the right correlation between neighbours and `J0^m` instead of `J0(m x)` after m blocks: enough for
"how stale is the last measurement", not for statistics over long tracks, for which take order 20 or more.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import ComplexArray, FloatArray
from wdmoe.errors import ConfigError
from wdmoe.wireless.checks import broadcast, finite, not_negative, positive
from wdmoe.wireless.fading import draw_rayleigh, k_ratio, with_steady_path
from wdmoe.wireless.pathloss import LIGHT_M_S

MOST_ORDER = 200
_LOADING = 1e-9  # J0's matrices are all but singular at low Doppler (Baddour and Beaulieu)
_SERIES_UP_TO = 25.0
_SERIES_POINTS = 128  # J_128(25) < 1e-60 bounds the error of the sum
_ASYMPTOTIC_TERMS = 16


def doppler_hz(speed_m_s: npt.ArrayLike, carrier_hz: npt.ArrayLike) -> FloatArray:
    """Largest Doppler shift, `v f / c`: (...,) hertz for (...,) metres per second >= 0 and (...,) hertz > 0.

    Raises:
        ConfigError: a value is not as above, or shapes do not fit.
    """
    speed, carrier = not_negative("speed_m_s", speed_m_s), positive("carrier_hz", carrier_hz)
    broadcast(speed_m_s=speed, carrier_hz=carrier)
    return np.asarray(speed * carrier / LIGHT_M_S)


def bessel_j0(argument: npt.ArrayLike) -> FloatArray:
    """Bessel function J0 of real arguments, to 1e-12 or better.

    Up to 25 the mean of `cos(x sin t)` over equidistant t; beyond, Hankel's asymptotic series.

    Args:
        argument: (...,) finite.
    Returns:
        (...,) float64.
    Raises:
        ConfigError: the argument is not finite.
    Source: Abramowitz and Stegun, 9.1.18 and 9.2.5.
    """
    size = np.abs(finite("argument", argument))
    angles = np.sin(2 * np.pi * np.arange(_SERIES_POINTS) / _SERIES_POINTS)
    near = np.cos(np.minimum(size, _SERIES_UP_TO)[..., None] * angles).mean(-1)
    return np.where(size <= _SERIES_UP_TO, near, _far_j0(np.maximum(size, _SERIES_UP_TO)))


def _far_j0(size: FloatArray) -> FloatArray:
    even, odd, term = np.ones_like(size), np.zeros_like(size), np.ones_like(size)
    for k in range(1, _ASYMPTOTIC_TERMS):
        term = term * -((2 * k - 1) ** 2) / (k * 8 * size)
        sign = -1 if k % 4 in (2, 3) else 1
        even, odd = (even, odd + sign * term) if k % 2 else (even + sign * term, odd)
    turn = size - np.pi / 4
    return np.asarray(np.sqrt(2 / (np.pi * size)) * (np.cos(turn) * even - np.sin(turn) * odd))


def jakes_correlation(doppler_hz: npt.ArrayLike, lag_s: npt.ArrayLike) -> FloatArray:
    """Correlation of amplitudes some time apart when paths come from all around: `J0(2 pi f_D tau)`.

    Args:
        doppler_hz: (...,) largest Doppler shift, hertz, >= 0.
        lag_s: (...,) seconds, >= 0.
    Returns:
        (...,) -0.41 to 1.
    Raises:
        ConfigError: a value is not as above, or shapes do not fit.
    Source: R. H. Clarke, Bell System Technical Journal 47, 1968; W. C. Jakes, Microwave Mobile Communications, 1974.
    """
    shift, lag = not_negative("doppler_hz", doppler_hz), not_negative("lag_s", lag_s)
    broadcast(doppler_hz=shift, lag_s=lag)
    return bessel_j0(2 * np.pi * shift * lag)


class BlockFading:
    """Amplitudes of links, block after block. Mean power 1; Rician with a steady path of constant phase if K > 0.

    Args:
        rng: the only source of randomness; kept, and drawn from at each `advance`.
        doppler_hz: (link,) largest Doppler shift, hertz, >= 0; 0 stands still.
        block_s: time from block to block, seconds, > 0.
        k_factor: () or (link,) plain ratio, >= 0.
        order: lags, in blocks, at which the correlation is Jakes'; 1 to 200.
    Raises:
        ConfigError: a value is not as above, or shapes do not fit.
    Source: K. E. Baddour and N. C. Beaulieu, IEEE Trans. Wireless Commun. 4(4), 2005, section II.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        doppler_hz: npt.ArrayLike,
        block_s: float,
        *,
        k_factor: npt.ArrayLike = 0.0,
        order: int = 1,
    ) -> None:
        shift, ratio = not_negative("doppler_hz", doppler_hz), k_ratio(k_factor)
        if shift.ndim != 1:
            raise ConfigError(f"doppler_hz must have one axis, the links, got the shape {shift.shape}")
        if broadcast(doppler_hz=shift, k_factor=ratio) != shift.shape:
            raise ConfigError(f"k_factor must have one value or one a link, got the shape {ratio.shape}")
        if not 1 <= order <= MOST_ORDER:
            raise ConfigError(f"order must be within 1 to {MOST_ORDER}, got {order}")
        lags = np.arange(order + 1) * positive("block_s", block_s)
        correlation = jakes_correlation(shift[:, None], lags)
        self._weights, self._fresh, root = _autoregression(correlation)
        self._rng, self._ratio = rng, ratio
        self._phase = 2 * np.pi * rng.random(shift.size)
        self._past = (root @ draw_rayleigh(rng, (shift.size, order, 1)))[..., 0]  # (link, order), newest first

    @property
    def amplitude(self) -> ComplexArray:
        """(link,) complex, of the present block."""
        return with_steady_path(self._past[:, 0], self._phase, self._ratio)

    def advance(self) -> ComplexArray:
        """Go to the next block; its (link,) amplitudes."""
        noise = self._fresh * draw_rayleigh(self._rng, self._fresh.shape)
        newest = (self._weights * self._past).sum(1) + noise
        self._past = np.concatenate([newest[:, None], self._past[:, :-1]], axis=1)
        return self.amplitude

    def track(self, blocks: int) -> ComplexArray:
        """The next `blocks` blocks, (block, link); the same as calling `advance` that often."""
        if blocks < 1:
            raise ConfigError(f"blocks must be 1 or more, got {blocks}")
        return np.stack([self.advance() for _ in range(blocks)])


def _autoregression(correlation: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Yule-Walker: (link, lag) correlation -> weights (link, order), noise (link,), root of the past's covariance."""
    order = correlation.shape[1] - 1
    loading = _LOADING if order > 1 else 0.0
    steps = np.arange(order)
    covariance = correlation[:, np.abs(steps[:, None] - steps)] + loading * np.eye(order)
    covariance /= 1 + loading
    towards = correlation[:, 1:] / (1 + loading)
    weights = np.asarray(np.linalg.solve(covariance, towards[..., None])[..., 0], np.float64)
    unexplained = np.maximum(1 - (weights * towards).sum(1), 0.0)
    return weights, np.sqrt(unexplained), np.asarray(np.linalg.cholesky(covariance), np.float64)
