"""The broadcast channel between encoder and decoders in PyTorch, so that gradients pass; what receivers make of it.

The randomness comes in as tensors: whoever trains draws it from a seed, whoever deploys does not need it. It is the
same channel as `wdmoe.wireless.broadcast`. The last axis is real and imaginary part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from wdmoe.errors import ConfigError

_LEAST_DB, _MOST_DB = -30.0, 40.0  # of the SNR that a decoder is told: a deep fade has no use for more digits


@dataclass(frozen=True, slots=True)
class Heard:
    """What the two users' decoders are given."""

    symbols: Tensor  # (block, user, token, slot, 2), equalised; zero where nothing was sent
    snr_db: Tensor  # (block, user): as each of them knows it


def draw_unit(generator: torch.Generator, *shape: int) -> Tensor:
    """Circular complex Gaussian draws of power 1, half of it in each part: (*shape, 2) float32 on the CPU."""
    return torch.randn(*shape, 2, generator=generator) * math.sqrt(0.5)


def awgn(symbols: Tensor, snr_db: Tensor, noise: Tensor) -> Heard:
    """Steady, known channels.

    Args:
        symbols: (block, token, slot, 2) of mean power 1 over the slots that are used, zero in the others.
        snr_db: (block, user).
        noise: (block, user, token, slot, 2) as of `draw_unit`.
    Raises:
        ConfigError: shapes do not belong together.
    """
    _check(symbols, snr_db, noise)
    heard = symbols[:, None] + noise * _amplitude(snr_db)[..., None, None, None]
    return Heard(heard * _used(symbols), snr_db)


def rayleigh(symbols: Tensor, snr_db: Tensor, noise: Tensor, known: Tensor, error: Tensor, csi_error: float) -> Heard:
    """Flat Rayleigh fading of each block and user, equalised without bias by what the receiver knows of it.

    The receiver's estimate is that of least mean square error: the amplitude is the estimate, of power 1 - csi_error,
    plus an independent error of power csi_error. The receiver counts the error as noise, which it is to it [D].

    Args:
        symbols, snr_db, noise: as in `awgn`; the SNRs are means over fading.
        known, error: (block, user, 2) as of `draw_unit`, for the estimate and its error.
        csi_error: 0 (perfect knowledge) to below 1.
    Raises:
        ConfigError: shapes do not belong together, or `csi_error` is out of range.
    """
    _check(symbols, snr_db, noise)
    if not 0 <= csi_error < 1:
        raise ConfigError(f"csi_error must be at least 0 and below 1, got {csi_error}")
    estimate = known * math.sqrt(1 - csi_error)
    gain = estimate + error * math.sqrt(csi_error)
    sent = _times(gain[:, :, None, None], symbols[:, None])
    heard = sent + noise * _amplitude(snr_db)[..., None, None, None]
    power = estimate.square().sum(-1)
    unknown = 10 ** (-snr_db / 10) + csi_error
    power = power.clamp_min(10 ** (_LEAST_DB / 10) * unknown)  # a fade so deep is not divided by
    matched = estimate * torch.tensor([1.0, -1.0], device=estimate.device) / power[..., None]
    snr = 10 * torch.log10(power / unknown)
    return Heard(_times(matched[:, :, None, None], heard) * _used(symbols), snr.clamp(_LEAST_DB, _MOST_DB))


def _amplitude(snr_db: Tensor) -> Tensor:
    return torch.as_tensor(10 ** (-snr_db / 20))


def _used(symbols: Tensor) -> Tensor:
    """(block, 1, 1, slot, 1): a slot that no token of a block uses was not sent."""
    used: Tensor = (symbols.detach() != 0).any(dim=-1).any(dim=1)
    return used[:, None, None, :, None].to(symbols.dtype)


def _times(one: Tensor, other: Tensor) -> Tensor:
    real = one[..., 0] * other[..., 0] - one[..., 1] * other[..., 1]
    imaginary = one[..., 0] * other[..., 1] + one[..., 1] * other[..., 0]
    return torch.stack([real, imaginary], dim=-1)


def _check(symbols: Tensor, snr_db: Tensor, noise: Tensor) -> None:
    block, *rest = symbols.shape
    if symbols.ndim != 4 or snr_db.ndim != 2 or noise.shape != (block, snr_db.shape[1], *rest):
        raise ConfigError(
            "need symbols (block, token, slot, 2), snr_db (block, user) and noise (block, user, token, slot, 2), got "
            f"{tuple(symbols.shape)}, {tuple(snr_db.shape)} and {tuple(noise.shape)}"
        )
