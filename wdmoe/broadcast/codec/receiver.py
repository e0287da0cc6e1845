"""What one user makes of the waveform: an emulated channel, and the equaliser in front of the decoder. NumPy alone.

The same channel and equaliser as `wdmoe.broadcast.codec.channel`, with draws that depend on seed, user and number of
the block only: whatever else was lost, a block is heard the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import Float32Array
from wdmoe.errors import ConfigError
from wdmoe.wireless.broadcast import Received, broadcast_awgn, broadcast_rayleigh

LOWEST_DB, HIGHEST_DB = -30.0, 40.0  # that a decoder can be told


@dataclass(frozen=True, slots=True, kw_only=True)
class Ear:
    """One user's emulated channel. Raises ConfigError if the SNR is out of range."""

    user: int
    snr_db: float
    fades: bool
    seed: int

    def __post_init__(self) -> None:
        if not LOWEST_DB <= self.snr_db <= HIGHEST_DB:
            raise ConfigError(f"snr must be from {LOWEST_DB:g} to {HIGHEST_DB:g} dB, got {self.snr_db:g}")

    def hear(self, number: int, symbols: npt.NDArray[Any]) -> tuple[Float32Array, float]:
        """One block after channel and equaliser.

        Args:
            number: of the block.
            symbols: (use, 2) real and imaginary part, mean power 1.
        Returns:
            (use, 2) and the block's SNR in dB, as the decoder is told.
        Raises:
            ConfigError: the symbols are not of mean power 1, or not finite.
        """
        rng = np.random.default_rng([self.seed, self.user, number])
        sent = np.ascontiguousarray(symbols, np.float64).view(np.complex128).reshape(1, -1)
        if not self.fades:
            return _parts(broadcast_awgn(rng, sent, [self.snr_db]).symbols[0, 0]), self.snr_db
        return _equalised(broadcast_rayleigh(rng, sent, [self.snr_db]))


def _equalised(received: Received) -> tuple[Float32Array, float]:
    """Without bias, the amplitude known. A fade deeper than a decoder can be told is not divided by."""
    known, noise = complex(received.known_gain[0, 0]), float(received.noise_power[0])
    power = max(abs(known) ** 2, 10 ** (LOWEST_DB / 10) * noise)
    snr_db = 10 * np.log10(power / noise)
    matched = np.conj(known) / power
    return _parts(received.symbols[0, 0] * matched), float(np.clip(snr_db, LOWEST_DB, HIGHEST_DB))


def _parts(symbols: npt.NDArray[np.complex128]) -> Float32Array:
    return np.stack([symbols.real, symbols.imag], axis=-1).astype(np.float32)
