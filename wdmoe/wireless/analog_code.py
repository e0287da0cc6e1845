"""Linear codes that put vectors into symbols, and the receiver's estimate of least mean square error.

A code is a matrix: it takes the components of a vector along some directions, gives each its energy and sends it in one
real part of a symbol or in several. The block is brought to power 1 by its root mean square, which travels beside it:
16 bits, its logarithm in steps of 1/1024 of an octave.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import ComplexArray, FloatArray
from wdmoe.errors import ConfigError
from wdmoe.wireless.analog import allocate_energy
from wdmoe.wireless.checks import numbers_of

SCALE_BITS = 16
_STEPS = 1024  # of an octave: so fine that the power of what is sent is 1 within 0.07 %
_MOST = 2 ** (SCALE_BITS - 1) - 1
_SEED = 20241110  # of the directions that a short block sends: sender and receivers draw the same ones


@dataclass(frozen=True, slots=True, eq=False)
class Spectrum:
    """How vectors vary: what a code is fitted to."""

    mean: FloatArray  # (values,)
    variances: FloatArray  # (values,) along the directions, falling
    directions: FloatArray  # (values, values) orthonormal rows

    @staticmethod
    def of(mean: FloatArray, covariance: FloatArray) -> Spectrum:
        """Principal directions (Karhunen-Loeve) of a covariance (values, values)."""
        variances, columns = np.linalg.eigh(covariance)
        return Spectrum(mean, np.maximum(variances[::-1], 0.0), np.ascontiguousarray(columns.T[::-1]))


@dataclass(frozen=True, slots=True, eq=False)
class AnalogCode:
    """One matrix; `plain_code` and `fitted_code` make it."""

    symbols: int  # complex, of a block
    mean: FloatArray  # (values,) that is not sent: receivers know it
    directions: FloatArray | None  # (components, values) orthonormal rows; None: the values themselves
    variances: FloatArray  # (components,) that receivers expect
    energy: FloatArray  # (components,) over all its uses; the sum is 2 x symbols

    @property
    def place(self) -> npt.NDArray[np.intp]:
        """(2 x symbols,) the component that each real part carries: all in turn, then from the first again."""
        return np.arange(2 * self.symbols) % len(self.energy)

    def encode(self, vectors: FloatArray) -> tuple[ComplexArray, FloatArray]:
        """Vectors as symbols.

        Args:
            vectors: (block, values) finite float64.
        Returns:
            (block, symbols) of mean power 1, and (block,) the scale that travels beside them; 0: nothing was sent.
        """
        centred = vectors - self.mean
        components = centred if self.directions is None else centred @ self.directions.T
        uses = (components * self._amplitude())[:, self.place]
        scale = _rounded(np.sqrt((uses**2).mean(axis=1)))
        nothing = scale == 0
        uses = np.where(nothing[:, None], 1.0, uses / np.where(nothing, 1.0, scale)[:, None])
        return (uses[:, 0::2] + 1j * uses[:, 1::2]) / np.sqrt(2), scale

    def decode(
        self, received: ComplexArray, scale: FloatArray, snr: npt.ArrayLike, agreement: FloatArray | float = 1.0
    ) -> FloatArray:
        """The vectors of least mean square error.

        Args:
            received: (block, symbols).
            scale: (block,) as it came.
            snr: () or (block,) of this user, plain ratio, > 0.
            agreement: (block,) how much of the block is the wanted vector's, from `superpose`; 1: all of it.
        Returns:
            (block, values).
        """
        uses = np.stack([received.real, received.imag], axis=-1).reshape(len(received), -1) * np.sqrt(2)
        count = len(self.energy)
        sums = np.zeros((len(uses), count))
        for start in range(0, uses.shape[1], count):  # each component adds up where it was sent
            part = uses[:, start : start + count]
            sums[:, : part.shape[1]] += part
        noise = np.broadcast_to(1 / numbers_of("snr", snr), (len(uses),))
        gain = self.variances * self._amplitude() / (self.energy + noise[:, None])
        components = sums * gain * (scale * agreement)[:, None]
        return self.mean + (components if self.directions is None else components @ self.directions)

    def _amplitude(self) -> FloatArray:
        uses = np.bincount(self.place, minlength=len(self.energy))
        with np.errstate(divide="ignore", invalid="ignore"):
            found = np.sqrt(self.energy / (uses * self.variances))
        return np.where(self.energy > 0, found, 0.0)


@functools.lru_cache(maxsize=16)
def plain_code(values: int, symbols: int) -> AnalogCode:
    """The values themselves, in turn until the block is full; where it is too short, as many random directions.

    Raises:
        ConfigError: there is no value or no symbol.
    """
    _check(values, symbols)
    uses, directions = 2 * symbols, None
    if uses < values:
        square = np.random.default_rng(_SEED).standard_normal((values, uses))
        directions = np.ascontiguousarray(np.linalg.qr(square)[0].T)
    count = min(uses, values)
    energy = np.bincount(np.arange(uses) % count, minlength=count).astype(np.float64)
    return AnalogCode(symbols, np.zeros(values), directions, np.ones(count), energy)


def fitted_code(spectrum: Spectrum, symbols: int, snr: float) -> AnalogCode:
    """The principal directions, each with the energy that makes the error least at one SNR.

    Args:
        snr: plain ratio, > 0; users with another one decode with their own.
    Raises:
        ConfigError: there is no symbol, or nothing varies.
    """
    _check(len(spectrum.mean), symbols)
    count = min(2 * symbols, len(spectrum.mean))
    variances = spectrum.variances[:count]
    energy = allocate_energy(variances, 2.0 * symbols, snr)
    return AnalogCode(symbols, spectrum.mean, spectrum.directions[:count], variances, energy)


def superpose(first: ComplexArray, second: ComplexArray, share: float) -> tuple[ComplexArray, FloatArray]:
    """Two blocks in one, of power 1 again.

    Args:
        first, second: (block, symbols) of power 1.
        share: of the power, that the first has, 0 to 1.
    Returns:
        (block, symbols), and (2, block) how much of it is the first's and the second's: their correlation with it,
        which travels beside them.
    """
    both = np.sqrt(share) * first + np.sqrt(1 - share) * second
    power = (both.real**2 + both.imag**2).mean(axis=1)
    nothing = power < 1e-12  # they cancel each other
    both = np.where(nothing[:, None], 1.0, both / np.sqrt(np.where(nothing, 1.0, power))[:, None])
    common = np.stack([(each.conj() * both).real.mean(axis=1) for each in (first, second)])
    return both, np.where(nothing, 0.0, common)


def _rounded(scale: FloatArray) -> FloatArray:
    """As 16 bits say it."""
    with np.errstate(divide="ignore"):
        steps = np.round(np.log2(scale) * _STEPS)
    return np.where(steps < -_MOST, 0.0, np.exp2(np.minimum(steps, _MOST) / _STEPS))


def _check(values: int, symbols: int) -> None:
    if values < 1 or symbols < 1:
        raise ConfigError(f"a code needs values and symbols, got {values} and {symbols}")
