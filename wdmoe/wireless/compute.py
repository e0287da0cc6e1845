"""How long experts compute: by arithmetic alone, or by arithmetic and memory (roofline)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import FloatArray
from wdmoe.wireless.checks import broadcast, not_negative, positive

MATRICES = 3  # gate, up and down projection of a gated expert


def expert_flop(hidden: npt.ArrayLike, inner: npt.ArrayLike, activation_flop: npt.ArrayLike = 4.0) -> FloatArray:
    """Operations of one gated expert on one token: `4 m m_h + 2 m_h m + eta m_h + m_h`.

    Two projections up and one down, eta operations an element for the activation and one for the product with it. A
    Mixtral expert (4096, 14336) has 352 MFLOP.

    Args:
        hidden: (...,) m, width of the model, > 0.
        inner: (...,) m_h, width of the expert, > 0.
        activation_flop: (...,) eta, >= 0; SiLU has 4 if exp and division count as one each.
    Returns:
        (...,) FLOP.
    Raises:
        ConfigError: a value is not as above, or shapes do not fit.
    Source: WDMoE, arXiv 2411.06681 [U: recollection, unchecked].
    """
    width, neurons = positive("hidden", hidden), positive("inner", inner)
    each = not_negative("activation_flop", activation_flop)
    broadcast(hidden=width, inner=neurons, activation_flop=each)
    return np.asarray(2 * MATRICES * width * neurons + (each + 1) * neurons)


def expert_bytes(hidden: npt.ArrayLike, inner: npt.ArrayLike, weight_bytes: npt.ArrayLike = 2.0) -> FloatArray:
    """Weights of one gated expert: (...,) bytes, for widths as in `expert_flop` and bytes a weight > 0.

    Raises:
        ConfigError: a value is not as above, or shapes do not fit.
    """
    width, neurons, each = positive("hidden", hidden), positive("inner", inner), positive("weight_bytes", weight_bytes)
    broadcast(hidden=width, inner=neurons, weight_bytes=each)
    return np.asarray(MATRICES * width * neurons * each)


def arithmetic_s(tokens: npt.ArrayLike, flop: npt.ArrayLike, flop_s: npt.ArrayLike) -> FloatArray:
    """Time by arithmetic alone, proportional to the tokens: `tokens flop / C`.

    Args:
        tokens: (...,) of one expert, >= 0.
        flop: (...,) of one token, >= 0.
        flop_s: (...,) C, FLOP per second that the device reaches, > 0.
    Returns:
        (...,) seconds.
    Raises:
        ConfigError: a value is not as above, or shapes do not fit.
    Source: WDMoE, arXiv 2411.06681 [U: recollection, unchecked].
    """
    count, work, speed = not_negative("tokens", tokens), not_negative("flop", flop), positive("flop_s", flop_s)
    broadcast(tokens=count, flop=work, flop_s=speed)
    return np.asarray(count * work / speed)


def roofline_s(
    tokens: npt.ArrayLike,
    flop: npt.ArrayLike,
    flop_s: npt.ArrayLike,
    weight_bytes: npt.ArrayLike,
    memory_bytes_s: npt.ArrayLike,
    token_bytes: npt.ArrayLike = 0.0,
) -> FloatArray:
    """Time by whichever is slower: `max(tokens flop / C, (weights + tokens token_bytes) / M)`, and 0 for no tokens.

    The weights are read once however many tokens there are, so one token costs nearly what fifty do.

    Args:
        tokens, flop, flop_s: (...,) as `arithmetic_s`.
        weight_bytes: (...,) of the expert, >= 0.
        memory_bytes_s: (...,) M, bytes per second that memory delivers, > 0.
        token_bytes: (...,) read and written for each token, >= 0.
    Returns:
        (...,) seconds.
    Raises:
        ConfigError: a value is not as above, or shapes do not fit.
    Source: Williams, Waterman and Patterson, Roofline, Communications of the ACM 52(4), 2009.
    """
    count, weights = not_negative("tokens", tokens), not_negative("weight_bytes", weight_bytes)
    each, memory = not_negative("token_bytes", token_bytes), positive("memory_bytes_s", memory_bytes_s)
    arithmetic = arithmetic_s(count, flop, flop_s)
    broadcast(tokens=arithmetic, weight_bytes=weights, token_bytes=each, memory_bytes_s=memory)
    reading = np.where(count > 0, weights + count * each, 0.0) / memory
    return np.maximum(arithmetic, reading)
