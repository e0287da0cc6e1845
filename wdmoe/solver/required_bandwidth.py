"""How many hertz a device needs to be in time: the inverse of the link's latency model, for many at once."""

from __future__ import annotations

import numpy.typing as npt

from wdmoe.arrays import FloatArray
from wdmoe.solver import _native
from wdmoe.solver.bandwidth import Links, one_draw


def needed_hz(links: Links, token_s: npt.ArrayLike) -> FloatArray:
    """Bandwidth at which one token takes `token_s` seconds.

    Newton's method on 1 / (time on the air), which is concave in the bandwidth: from the left it never overshoots.

    Args:
        links: (devices,).
        token_s: (n,) seconds, 0 to 1e100.
    Returns:
        (devices, n) Hz; inf where no bandwidth is enough, 0 where none is needed.
    Raises:
        ValueError: an argument is not as above; the message names it.
    """
    wanted_s = _native.floats("token_s", token_s)
    if wanted_s.ndim != 1 or _native.first_bad(wanted_s.reshape(1, -1), positive=False) >= 0:
        raise ValueError(f"token_s must be (n,), finite and not negative, got shape {wanted_s.shape}")
    return _native.needed_hz(one_draw(links), links.flat, wanted_s)
