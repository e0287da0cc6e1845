"""The way down without bits: a token's hidden vector goes out once as amplitudes, and every device hears it.

A block of S complex symbols takes `S / band` seconds, whoever listens; S is `ratio x hidden / 2`. What differs is the
quality: `wdmoe.wireless.analog`. A block is repeated until its weakest listener's SNR, which adds up, reaches a floor
[D]: for 10 dB that takes less time than 8 bits a value at that device's capacity, whatever its SNR. Beside the symbols
travel 16 bits, the block's scale, at the rate of the weakest listener.

With a `share`, tokens go out two by two: both vectors of a pair are superposed in one block, and the first has this
share of the power. It halves the symbols; 16 bits more for each token say how much of the block is its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from wdmoe.arrays import FloatArray, IntArray
from wdmoe.solver.layer.radio_state import RadioState

TRANSFORMS = ("none", "klt")
BESIDE_BITS = 16  # of each number that travels beside a block


@dataclass(frozen=True, slots=True, kw_only=True)
class Analog:
    """How hidden vectors are broadcast."""

    ratio: float = 1.0  # complex symbols for each pair of values
    floor_db: float = 10.0  # least SNR at any listener, all repetitions of a block together
    transform: str = "none"  # "klt": along principal directions that were fitted beforehand; it changes no time
    share: float = 0.0  # of a pair's power, that its first token has; 0: no pairs

    def __post_init__(self) -> None:
        if not 1 / 64 <= self.ratio <= 64:
            raise ValueError(f"analog_ratio must be 1/64 to 64, got {self.ratio}")
        if not -300 <= self.floor_db <= 300:
            raise ValueError(f"analog_floor_db must be -300 to 300, got {self.floor_db}")
        if self.transform not in TRANSFORMS:
            raise ValueError(f"analog_transform must be one of {', '.join(TRANSFORMS)}, got {self.transform!r}")
        if not 0 <= self.share < 1:
            raise ValueError(f"analog_share must be at least 0 and below 1, got {self.share}")

    @property
    def floor(self) -> float:
        """The floor as a plain ratio."""
        return float(10 ** (self.floor_db / 10))


@dataclass(frozen=True, slots=True, eq=False)
class Cast:
    """How the tokens of a layer are broadcast."""

    snr: FloatArray  # (devices,) plain ratio, of one block, as it is; 0 where not even a bit gets through
    weakest: float  # SNR of the weakest of all listeners, as the sender thought; infinite where nobody listens
    repeats: FloatArray  # (tokens,) times that its block is sent; 0 where nobody computes it, infinite where in vain
    seconds: float  # of all blocks and what travels beside them


def block_symbols(hidden: int, ratio: float) -> int:
    """Complex symbols of one block, at least one."""
    return max(1, round(hidden * ratio / 2))


def cast(air: RadioState, analog: Analog, device: IntArray) -> Cast:
    """Broadcast each token to the devices that compute it.

    Args:
        device: (tokens, top_k), -1 where dropped.
    """
    snr = _heard(air, _efficiency(air))
    weakest = np.where(device >= 0, snr[device], np.inf).min(axis=1, initial=np.inf)
    sent = np.isfinite(weakest)
    with np.errstate(divide="ignore"):
        repeats = np.where(sent, np.maximum(np.ceil(analog.floor / weakest * (1 - 1e-12)), 1.0), 0.0)
    if analog.share:
        repeats[sent] = _in_pairs(repeats[sent])
    return Cast(snr, float(weakest.min(initial=np.inf)), repeats, _seconds(air, analog, device, repeats))


def cast_again(air: RadioState, analog: Analog, device: IntArray, decided: Cast) -> Cast:
    """What was decided, over a channel that is another: blocks go out as often, and are heard as it is.

    What travels beside them are bits, which take what they take; for ever where a listener gets none of them.
    """
    seconds = _seconds(air, analog, device, decided.repeats)
    return Cast(_heard(air, _efficiency(air)), decided.weakest, decided.repeats, seconds)


def _efficiency(air: RadioState) -> FloatArray:
    """(devices,) bit/s/Hz of what travels beside the blocks."""
    given = air.downlink_efficiency
    return np.log1p(air.downlink_snr_hz / air.total_hz) / np.log(2) if given is None else given


def _heard(air: RadioState, efficiency: FloatArray) -> FloatArray:
    return np.where(efficiency > 0, air.downlink_snr_hz / air.total_hz, 0.0)


def _seconds(air: RadioState, analog: Analog, device: IntArray, repeats: FloatArray) -> float:
    """Of all blocks, each sent so often, and what travels beside them."""
    sent = repeats > 0
    slowest = np.where(device >= 0, _efficiency(air)[device], np.inf).min(axis=1, initial=np.inf)
    with np.errstate(divide="ignore"):
        beside = float((BESIDE_BITS / slowest[sent]).sum())
    blocks = float(repeats.sum())
    if analog.share:
        blocks, beside = float(repeats[sent][::2].sum()), 2 * beside
    return (blocks * block_symbols(air.hidden, analog.ratio) + beside) / air.total_hz


def _in_pairs(repeats: FloatArray) -> FloatArray:
    """As often as the pair's weaker one needs; the last may have no partner."""
    count = len(repeats) // 2 * 2
    pairs = np.repeat(repeats[:count].reshape(-1, 2).max(axis=1), 2)
    return np.concatenate([pairs, repeats[count:]])
