"""A masked array is refused by its name: NumPy would compute with what lies under the mask."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from wdmoe.errors import ConfigError
from wdmoe.wireless import analog, broadcast, compute, fading, pathloss, rates
from wdmoe.wireless.checks import flags

MASKED = np.ma.masked_array([5.0, 7.0], mask=[True, False])
RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("snr_db", partial(analog.analog_distortion, MASKED)),
        ("snr_db", partial(broadcast.noise_power, MASKED)),
        ("symbols", partial(broadcast.broadcast_awgn, RNG, np.ma.masked_array([[1.0, 1.0]]), [1.0, 2.0])),
        ("flop_s", partial(compute.arithmetic_s, 1.0, 1.0, MASKED)),
        ("amplitude", partial(fading.power_gain, MASKED)),
        ("phase_rad", partial(fading.with_steady_path, np.ones(2, complex), MASKED, 1.0)),
        ("k_factor", partial(fading.k_ratio, MASKED)),
        ("distance_m", partial(pathloss.free_space_db, MASKED, 1e9)),
        ("band_hz", partial(rates.fixed_power_bps, MASKED, 1e6)),
        ("seen", partial(flags, "seen", np.ma.masked_array([True]))),
    ],
)
def test_a_masked_array_is_refused(name: str, call: Callable[[], object]) -> None:
    with pytest.raises(ConfigError, match=f"^{name} must not be a masked array"):
        call()
