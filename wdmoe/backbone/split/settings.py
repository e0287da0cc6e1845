"""What a split is asked to do, and what it reports."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wdmoe.errors import ConfigError

RANK = "energy"  # what the routers' scores are good for: they are fitted to the norms of experts' outputs
_ALIGN = 8  # grouped matrix products want rows of a multiple of 16 bytes, in 16 bits too
Progress = Callable[[str, float], None]  # (stage, fraction of that stage done)


def quiet(stage: str, done: float) -> None:
    """Progress to nobody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSettings:
    """How a dense model is cut."""

    experts: int = 8
    shared: float = 0.5  # fraction of each FFN's neurons that stays at the base station
    top_k: int = 4
    calibration: tuple[Path, ...] = ()  # (): the shipped text
    held_out: tuple[Path, ...] = ()  # (): the shipped text
    calibration_tokens: int = 12288
    held_out_tokens: int = 4096
    window: int = 512  # tokens of context in calibration and perplexity
    correct: bool = True  # False: cut only, so that with top_k == experts nothing changes
    ridge: float = 1.0  # pull of the refitted weights towards the original, relative to the data
    gate_temperature: float = 0.01
    cluster_tokens: int = 2048  # of the calibration text that neurons are clustered by, at most
    refine_rounds: int = 4  # of clusters and router, in turn
    refine_tokens: int = 4096  # of the calibration text, at most, that they are refined on
    seed: int = 0

    def __post_init__(self) -> None:
        if self.experts < 2:
            raise ConfigError(f"experts must be at least 2, got {self.experts}")
        if not 0 <= self.shared < 1:  # also refuses NaN
            raise ConfigError(f"shared must be at least 0 and below 1, got {self.shared}")
        if not 1 <= self.top_k <= self.experts:
            raise ConfigError(f"top_k must be from 1 to experts ({self.experts}), got {self.top_k}")
        for name in ("ridge", "gate_temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if self.refine_rounds < 0 or min(self.cluster_tokens, self.refine_tokens) < 1:
            raise ConfigError("refine_rounds must be at least 0, cluster_tokens and refine_tokens at least 1")
        if self.window < 8:
            raise ConfigError(f"window must be at least 8 tokens, got {self.window}")
        if min(self.calibration_tokens, self.held_out_tokens) < self.window:
            raise ConfigError(f"calibration and held-out tokens must be at least one window ({self.window})")

    def expert_size(self, neurons: int) -> int:
        """Neurons per expert of an FFN with `neurons`, a multiple of 8; what is left over joins the shared part.

        Raises:
            ConfigError: there are too few neurons for so many experts.
        """
        size = int((1 - self.shared) * neurons) // self.experts // _ALIGN * _ALIGN
        if size == 0:
            raise ConfigError(f"{neurons} neurons are too few for {self.experts} experts with {self.shared} shared")
        return size


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitReport:
    """What a split did. Perplexities are over `tokens` held-out tokens in windows of the settings' length."""

    tokens: int
    calibration_tokens: int
    dense_perplexity: float
    split_perplexity: float
    seconds: float
    sha256: str  # of the dense weights

    @property
    def ratio(self) -> float:
        """Split perplexity over dense perplexity."""
        return self.split_perplexity / self.dense_perplexity

    def as_json(self) -> dict[str, Any]:
        """Plain types for a model card."""
        return {
            "tokens": self.tokens,
            "calibration_tokens": self.calibration_tokens,
            "dense_perplexity": round(self.dense_perplexity, 4),
            "split_perplexity": round(self.split_perplexity, 4),
            "ratio": round(self.ratio, 4),
            "seconds": round(self.seconds, 1),
            "sha256": self.sha256,
        }
