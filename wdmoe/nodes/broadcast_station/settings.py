"""What a broadcast is asked to do, checked before anything starts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from wdmoe.broadcast.codec.receiver import HIGHEST_DB, LOWEST_DB
from wdmoe.config import state_home
from wdmoe.errors import BundleError, ConfigError

FADINGS = ("awgn", "rayleigh")
SHIPPED_MODEL = Path(__file__).parent.parent.parent / "broadcast" / "data" / "codec.safetensors"
LOCAL_BIND = "tcp://127.0.0.1:*"


@dataclass(frozen=True, slots=True, kw_only=True)
class BroadcastSettings:
    """One broadcast of two pictures to two devices."""

    pictures: tuple[Path, Path]
    out: Path  # folder for what comes back
    snr_db: tuple[float, float] = (10.0, 5.0)
    alpha: float | None = None  # None: chosen for the aim
    aim: str = ""  # of the choice, see `wdmoe.broadcast.quality.operating_point`; "": max-min
    cbr: float = 1 / 6  # complex channel uses of a block, over the values of one tile
    fading: str = "awgn"
    seed: int = 0  # of the emulated channels
    model: Path | None = None  # None: the one that is shipped
    bind: str = ""  # "": two device processes on this machine; else where real ones dial in
    advertise: str = ""
    wait_s: float = 120.0  # for the devices to join
    state: Path = field(default_factory=lambda: state_home() / "bs")  # with `bind`: key, and who was admitted

    def __post_init__(self) -> None:
        for snr_db in self.snr_db:
            if not LOWEST_DB <= snr_db <= HIGHEST_DB:  # also refuses NaN
                raise ConfigError(f"snr must be from {LOWEST_DB:g} to {HIGHEST_DB:g} dB, got {snr_db:g}")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha must be from 0 to 1 or auto, got {self.alpha:g}")
        if self.aim and self.alpha is not None:
            raise ConfigError(f"an aim chooses alpha, which is given as {self.alpha:g}: leave out one of them")
        if not 0 < self.cbr <= 1:
            raise ConfigError(f"cbr must be above 0 and at most 1, as in 1/6, got {self.cbr:g}")
        if self.fading not in FADINGS:
            raise ConfigError(f"fading must be one of {', '.join(FADINGS)}; got {self.fading!r}")
        if not 0 <= self.seed < 1 << 63:
            raise ConfigError(f"seed must be from 0 to 2**63 - 1, got {self.seed}")
        if not 0 < self.wait_s < math.inf:
            raise ConfigError(f"the wait for devices must be positive and finite, got {self.wait_s:g} s")

    @property
    def model_file(self) -> Path:
        """Raises BundleError where none is given and none is shipped."""
        if self.model is None and not SHIPPED_MODEL.is_file():
            raise BundleError(
                "no trained broadcast model is shipped with this version: give one with --model FILE "
                "(tools/study/train_broadcast writes model.safetensors)"
            )
        return self.model or SHIPPED_MODEL
