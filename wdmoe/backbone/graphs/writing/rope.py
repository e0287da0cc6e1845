"""Rotary position embeddings as tables: cosines and sines of every position. Formulas as each paper states them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import Float32Array
from wdmoe.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True, eq=False)
class Rope:
    """`frequencies` in radians a token, one for each pair that is rotated; the tables are multiplied by `factor`.

    There are head_size / 2 of them, or fewer where only the first part of a head is rotated.
    """

    frequencies: npt.NDArray[np.float64]
    factor: float = 1.0

    def tables(self, positions: int) -> tuple[Float32Array, Float32Array]:
        """(positions, frequencies) cosines and sines."""
        angles = np.outer(np.arange(positions, dtype=np.float64), self.frequencies)
        cos, sin = self.factor * np.cos(angles), self.factor * np.sin(angles)
        return cos.astype(np.float32), sin.astype(np.float32)


def rope_of(config: Mapping[str, Any], head_size: int) -> Rope:
    """Of a model's config.

    Raises:
        UnsupportedModelError: a kind that is not known here.
    """
    asked = _asked(config)
    kind = _kind(asked)
    theta = float(asked["rope_theta"])
    size = int(head_size * float(asked.get("partial_rotary_factor") or 1.0))
    plain = theta ** (-np.arange(0, size, 2, dtype=np.float64) / size)
    if kind == "default":
        return Rope(plain)
    if kind == "linear":
        return Rope(plain / float(asked["factor"]))
    if kind == "llama3":
        return Rope(_llama3(plain, asked))
    if kind == "yarn":
        return _yarn(plain, theta, size, asked, config)
    if kind == "longrope":
        return _longrope(plain, asked, config)
    raise UnsupportedModelError(f"the graphs know no rotary embedding of the kind {kind!r}")


def latent_sharpness(config: Mapping[str, Any]) -> float:
    """What scores of latent attention are multiplied by, where the context was stretched [DeepSeek-V2, 2024]."""
    asked = _asked(config)
    if _kind(asked) == "default" or not asked.get("mscale_all_dim"):
        return 1.0
    return _temperature(float(asked["factor"]), float(asked["mscale_all_dim"])) ** 2


def _asked(config: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = config["rope_parameters"]  # an export of today writes all of it down
    return found


def _kind(asked: Mapping[str, Any]) -> str:
    return str(asked.get("rope_type", asked.get("type", "default")))


def _llama3(plain: npt.NDArray[np.float64], asked: Mapping[str, Any]) -> npt.NDArray[np.float64]:
    """Long waves are stretched, short ones kept, those between are mixed [Llama 3, 2024]."""
    factor, low, high = (float(asked[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    waves = float(asked["original_max_position_embeddings"]) * plain / (2 * math.pi)  # turns within the first context
    share = np.clip((waves - low) / (high - low), 0, 1)
    return (1 - share) * plain / factor + share * plain


def _yarn(
    plain: npt.NDArray[np.float64], theta: float, size: int, asked: Mapping[str, Any], config: Mapping[str, Any]
) -> Rope:
    """[Peng et al., YaRN, ICLR 2024], section 3: interpolation by parts, and a temperature."""
    factor = float(asked["factor"])
    first = float(asked.get("original_max_position_embeddings") or config["max_position_embeddings"])

    def place(turns: float) -> float:
        return size * math.log(first / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = place(float(asked.get("beta_fast") or 32)), place(float(asked.get("beta_slow") or 1))
    if asked.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = np.clip((np.arange(size // 2) - low) / max(high - low, 0.001), 0, 1)
    return Rope(plain / factor * ramp + plain * (1 - ramp), _yarn_temperature(factor, asked))


def _yarn_temperature(factor: float, asked: Mapping[str, Any]) -> float:
    if asked.get("attention_factor") is not None:
        return float(asked["attention_factor"])
    part, whole = asked.get("mscale"), asked.get("mscale_all_dim")  # of the rotated part of heads, and of all
    if part and whole:
        return _temperature(factor, float(part)) / _temperature(factor, float(whole))
    return _temperature(factor, 1.0)


def _temperature(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(max(factor, 1.0)) + 1


def _longrope(plain: npt.NDArray[np.float64], asked: Mapping[str, Any], config: Mapping[str, Any]) -> Rope:
    """Waves stretched one by one [Ding et al., LongRoPE, 2024], as transformers does it for Phi-MoE.

    It has factors for short and for long texts. For Phi-MoE transformers 5.23 takes the short ones whatever the length.
    Other families change to the long ones in mid-text, and tables of positions cannot.
    """
    if config["model_type"] != "phimoe" or asked["short_mscale"] != asked["long_mscale"]:
        raise UnsupportedModelError("the graphs know no longrope that changes with the length of the text")
    return Rope(plain / np.array(asked["short_factor"], np.float64), float(asked["short_mscale"]))
