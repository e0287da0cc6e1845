"""How many hertz a device needs to be in time: the inverse of the link's latency model, for many at once."""

from __future__ import annotations

import numpy.typing as npt

from wdmoe.arrays import FloatArray
from wdmoe.solver import _native
from wdmoe.solver.bandwidth import Links


def needed_hz(links: Links, token_s: npt.ArrayLike) -> FloatArray:
    """Bandwidth at which one token takes `token_s` seconds.

    Newton's method on 1 / (time on the air), which is concave in the bandwidth: from the left it never overshoots.

    Args:
        links: (devices,).
        token_s: (n,) seconds, > 0.
    Returns:
        (devices, n) Hz; inf where no bandwidth is enough, 0 where none is needed.
    """
    return _native.needed_hz(links.table, links.flat, _native.floats("token_s", token_s))
