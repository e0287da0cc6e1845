"""What the symbols of a comparison go through: for a picture and a user the same noise and fading in every system.

Draws are keyed by user and number of the wanted picture. So systems are compared in the same noise, a part of the
pairs gives the same figures as all of them, and it does not matter who is paired with whom.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wdmoe.arrays import FloatArray
from wdmoe.broadcast.codec.channel import Heard, awgn, rayleigh
from wdmoe.errors import ConfigError
from wdmoe.wireless.broadcast import effective_snr_db


@dataclass(frozen=True, slots=True)
class Draws:
    """Unit draws of some blocks, see `wdmoe.broadcast.codec.channel`."""

    noise: Tensor  # (block, user, token, slot, 2)
    known: Tensor  # (block, user, 2)
    error: Tensor  # (block, user, 2)

    def only(self, user: int) -> Draws:
        """What one user hears: its axis stays, of size 1."""
        return Draws(*(each[:, user : user + 1] for each in (self.noise, self.known, self.error)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Radio:
    """Two users' channels."""

    snr_db: tuple[float, float]
    csi_error: float | None = None  # none: steady and known; else Rayleigh fading with this variance of the estimate
    seed: int = 0

    def __post_init__(self) -> None:
        if not all(-30 <= each <= 40 for each in self.snr_db):  # also refuses NaN
            raise ConfigError(f"SNRs must be from -30 to 40 dB, got {self.snr_db}")

    def draws(self, pairs: npt.ArrayLike, tokens: int, slots: int, first_user: int = 0) -> Draws:
        """The draws of blocks.

        Args:
            pairs: (block, user) number of the picture that each of them wants.
            tokens, slots: of a block.
            first_user: whom the first column is for.
        """
        wanted = np.asarray(pairs)
        size = 2 * tokens * slots
        found = np.empty((*wanted.shape, size + 4), dtype=np.float32)
        for (block, user), number in np.ndenumerate(wanted):
            rng = np.random.default_rng([self.seed, first_user + user, int(number)])
            found[block, user] = rng.standard_normal(size + 4, dtype=np.float32)
        unit = torch.from_numpy(found * np.float32(0.5**0.5))
        return Draws(unit[..., 4:].reshape(*wanted.shape, tokens, slots, 2), unit[..., :2], unit[..., 2:4])

    def effective_snr_db(self, pairs: npt.ArrayLike) -> FloatArray:
        """(block, user) dB: what receivers of `heard` know their SNR to be; see `wdmoe.wireless.broadcast`.

        Args:
            pairs: (block, user) as in `draws`, and it is the same draws.
        """
        wanted = np.asarray(pairs)
        if self.csi_error is None:
            return np.broadcast_to(np.asarray(self.snr_db, dtype=np.float64), wanted.shape)
        known = self.draws(wanted, 0, 0).known.square().sum(-1).double().numpy() * (1 - self.csi_error)
        return effective_snr_db(self.snr_db, known, self.csi_error)

    def mean_effective_snr_db(self) -> FloatArray:
        """(user,) dB: the mean ratio over fading, which is all that a transmitter knows."""
        if self.csi_error is None:
            return np.asarray(self.snr_db, dtype=np.float64)
        return effective_snr_db(self.snr_db, 1 - self.csi_error, self.csi_error)

    def heard(self, symbols: Tensor, snr_db: Tensor, draws: Draws) -> Heard:
        """What users of these SNRs (block, user) make of symbols (block, token, slot, 2)."""
        if self.csi_error is None:
            return awgn(symbols, snr_db, draws.noise)
        return rayleigh(symbols, snr_db, draws.noise, draws.known, draws.error, self.csi_error)
