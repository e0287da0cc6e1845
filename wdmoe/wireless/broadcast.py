"""One waveform, several users: the degraded Gaussian broadcast channel, and the rates that fit through it.

Symbols are complex baseband channel uses of mean power 1. A user's SNR is 1 over the power of its *complex* noise, half
of which lies in the real and half in the imaginary part; taking the whole power for each part is a mistake of 3 dB.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import ComplexArray, FloatArray
from wdmoe.errors import ConfigError
from wdmoe.wireless.checks import MOST_DB, broadcast, decibels, finite, not_negative, unmasked, within
from wdmoe.wireless.fading import draw_rayleigh

POWER_TOLERANCE = 1e-3  # relative: what float32 arithmetic and the sum over a long block may leave


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """What the users hear, and what they know of their channels."""

    symbols: ComplexArray  # (user, block, use)
    gain: ComplexArray  # (user, block): the amplitude that was there
    known_gain: ComplexArray  # (user, block): the estimate that a receiver works with
    noise_power: FloatArray  # (user,): complex, both parts together


def noise_power(snr_db: npt.ArrayLike) -> FloatArray:
    """Power of complex noise beside symbols of power 1: (...,) for (...,) dB within -1000 to 1000, else ConfigError."""
    return np.asarray(10 ** (-decibels("snr_db", snr_db) / 10))


def draw_noise(rng: np.random.Generator, power: npt.ArrayLike, shape: tuple[int, ...]) -> ComplexArray:
    """Circular complex Gaussian noise.

    Args:
        rng: the only source of randomness.
        power: (...,) of real and imaginary part together, finite, >= 0; it must fit `shape`.
        shape: of the draws.
    Raises:
        ConfigError: a power is not as above, or shapes do not fit.
    """
    powers = within("power", power, 0, math.inf)
    if broadcast(power=powers, draws=np.empty(shape)) != shape:
        raise ConfigError(f"power {powers.shape} must fit the shape of the draws, {shape}")
    return np.asarray(draw_rayleigh(rng, shape) * np.sqrt(powers))


def broadcast_awgn(rng: np.random.Generator, symbols: npt.ArrayLike, snr_db: npt.ArrayLike) -> Received:
    """Send blocks to users whose channels are steady and known: each hears the same symbols in noise of its own.

    Args:
        rng: the only source of randomness.
        symbols: (block, use) complex, mean power 1 in every block.
        snr_db: (user,) dB within -1000 to 1000.
    Raises:
        ConfigError: symbols are not of mean power 1, an SNR is not as above, or a shape is another one.
    """
    sent, powers = _checked(symbols, snr_db)
    gain = np.ones((powers.size, sent.shape[0]), dtype=np.complex128)
    return _received(rng, sent, powers, gain, gain)


def broadcast_rayleigh(
    rng: np.random.Generator, symbols: npt.ArrayLike, snr_db: npt.ArrayLike, csi_error: float = 0.0
) -> Received:
    """Send blocks through independent flat Rayleigh fading, one amplitude of mean power 1 for each block and user.

    Receivers know the minimum mean square error estimate: the error is independent of the estimate, and both powers
    sum to 1. So 0 is perfect knowledge and 1 is none.

    Args:
        rng: the only source of randomness.
        symbols: (block, use) complex, mean power 1 in every block.
        snr_db: (user,) mean SNR, dB within -1000 to 1000.
        csi_error: variance of the estimation error, 0 to 1.
    Raises:
        ConfigError: as in `broadcast_awgn`, or the variance is not as above.
    Source: Hassibi and Hochwald, IEEE Trans. Inf. Theory 49(4), 2003, for the estimate.
    """
    sent, powers = _checked(symbols, snr_db)
    error = float(within("csi_error", csi_error, 0, 1))
    shape = (powers.size, sent.shape[0])
    known = draw_rayleigh(rng, shape) * math.sqrt(1 - error)
    return _received(rng, sent, powers, known + draw_rayleigh(rng, shape) * math.sqrt(error), known)


def capacity_bits(snr_db: npt.ArrayLike) -> FloatArray:
    """Bits that one complex channel use of a Gaussian channel carries: (...,) for (...,) dB, else ConfigError.

    Source: Shannon 1948; Cover and Thomas, 2nd ed., section 9.1 (twice its formula: a complex use is two real ones).
    """
    return np.asarray(np.log1p(10 ** (decibels("snr_db", snr_db) / 10)) / math.log(2))


def effective_snr_db(snr_db: npt.ArrayLike, known_power: npt.ArrayLike, csi_error: float) -> FloatArray:
    """SNR of a block whose receiver knows an estimate of its gain only: `|h_est|^2 P / (e P + s)` [D].

    The error is independent of the estimate and counts as noise as strong as all that is sent, whatever layer of it a
    receiver cancels first. `capacity_bits` and `superposition_bits` of this SNR can be reached: a lower bound of the
    capacity.

    Args:
        snr_db: (...,) mean SNR `P / s`, dB within -1000 to 1000.
        known_power: (...,) `|h_est|^2`, >= 0; its mean over fading is 1 - `csi_error`.
        csi_error: variance `e` of the estimation error, 0 to 1.
    Returns:
        (...,) dB within -1000 to 1000.
    Raises:
        ConfigError: a value is not as above, or shapes do not fit.
    Source: Medard, IEEE Trans. Inf. Theory 46(3), 2000; Hassibi and Hochwald, 49(4), 2003.
    """
    noise, power = noise_power(snr_db), not_negative("known_power", known_power)
    error = float(within("csi_error", csi_error, 0, 1))
    broadcast(snr_db=noise, known_power=power)
    ratio = np.clip(power / (error + noise), 10 ** (-MOST_DB / 10), 10 ** (MOST_DB / 10))
    return np.asarray(np.clip(10 * np.log10(ratio), -MOST_DB, MOST_DB))


def time_division_bits(snr_db: npt.ArrayLike, share: npt.ArrayLike) -> FloatArray:
    """Rates of two users that take turns at full power, `tau_i log2(1 + P / s_i)` [D].

    Args:
        snr_db: (..., 2) dB.
        share: (...,) of the uses that the first user has, 0 to 1.
    Returns:
        (..., 2) bits per channel use of the whole block.
    Raises:
        ConfigError: a value is not as above, or shapes do not fit.
    """
    alone, part = capacity_bits(_pair(snr_db)), within("share", share, 0, 1)
    broadcast(snr_db=alone[..., 0], share=part)
    return np.stack(np.broadcast_arrays(part * alone[..., 0], (1 - part) * alone[..., 1]), axis=-1)


def superposition_bits(snr_db: npt.ArrayLike, share: npt.ArrayLike) -> FloatArray:
    """Rates of two superposed codewords; the stronger user cancels the other one's first (SIC) [D].

    With `b` the stronger user's share of the power: `log2(1 + b P / s1)` and `log2(1 + (1 - b) P / (b P + s2))`. This
    is the capacity region of the channel: its border bounds every scheme that sends bits, time division too.

    Args:
        snr_db: (..., 2) dB, in any order.
        share: (...,) of the power that the first user has, 0 to 1.
    Returns:
        (..., 2) bits per channel use.
    Raises:
        ConfigError: a value is not as above, or shapes do not fit.
    Source: Cover and Thomas, 2nd ed., section 15.1.3.
    """
    snr, part = 10 ** (_pair(snr_db) / 10), within("share", share, 0, 1)
    broadcast(snr_db=snr[..., 0], share=part)
    first_is_stronger = snr[..., 0] >= snr[..., 1]
    own = np.stack(np.broadcast_arrays(part, 1 - part), axis=-1)
    other = np.stack(np.broadcast_arrays(1 - part, part), axis=-1)
    heard = np.where(np.stack([first_is_stronger, ~first_is_stronger], axis=-1), 0.0, other)  # interference
    return np.asarray(np.log1p(own * snr / (heard * snr + 1)) / math.log(2))


def _pair(snr_db: npt.ArrayLike) -> FloatArray:
    pair = decibels("snr_db", snr_db)
    if pair.ndim == 0 or pair.shape[-1] != 2:
        raise ConfigError(f"snr_db must have the two users in its last axis, got shape {pair.shape}")
    return pair


def _checked(symbols: npt.ArrayLike, snr_db: npt.ArrayLike) -> tuple[ComplexArray, FloatArray]:
    sent = np.asarray(unmasked("symbols", symbols), dtype=np.complex128)
    powers = noise_power(snr_db)
    if sent.ndim != 2 or sent.shape[1] == 0 or powers.ndim != 1:
        raise ConfigError(f"need symbols (block, use) and snr_db (user,), got shapes {sent.shape} and {powers.shape}")
    mean = finite("power of symbols", (sent.real**2 + sent.imag**2).mean(axis=1))
    if np.any(np.abs(mean - 1) > POWER_TOLERANCE):
        wrong = mean[np.argmax(np.abs(mean - 1))]
        raise ConfigError(f"symbols must have the mean power 1 in every block, got {wrong:g}")
    return sent, powers


def _received(
    rng: np.random.Generator, sent: ComplexArray, powers: FloatArray, gain: ComplexArray, known: ComplexArray
) -> Received:
    noise = draw_noise(rng, powers[:, None, None], (powers.size, *sent.shape))
    return Received(symbols=gain[..., None] * sent + noise, gain=gain, known_gain=known, noise_power=powers)
