"""What the comparison of training losses is asked for: how they train, on which pictures and radios they are measured.

Measured is on the pictures to choose by: which loss to take is a choice, so those to report on are not looked at.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import Pixels
from wdmoe.broadcast.codec.model import ModelSettings
from wdmoe.broadcast.datasets.pictures import Numbers, PairKind, load_pictures, pair_up, some_of, split_pictures
from wdmoe.broadcast.study.study import Setting
from wdmoe.broadcast.training.batches import Draws
from wdmoe.broadcast.training.losses import LOSSES
from wdmoe.broadcast.training.training import Training
from wdmoe.errors import ConfigError

START = "start"  # the system that all losses begin with, and its folder
SYSTEMS = (*LOSSES, START)
KINDS: tuple[PairKind, ...] = ("different class", "same class")
SNR_PAIRS_DB = ((10.0, 5.0), (5.0, 0.0), (20.0, 10.0))
CBR = 1 / 6


@dataclass(frozen=True, slots=True, kw_only=True)
class LossPlan:
    """What was asked for: all of it decides the figures, but how often is saved."""

    training: Training  # its loss is not looked at
    draws: Draws = field(default_factory=Draws)
    model: ModelSettings = field(default_factory=ModelSettings)
    begin: str = ""  # SHA-256 of the model file that every loss begins with; empty: untrained
    pictures: int = 500
    points: int = 11  # of each front
    curve_pairs: int = 100

    def __post_init__(self) -> None:
        if self.points < 2:
            raise ConfigError(f"points must be at least 2, got {self.points}")

    def told(self) -> dict[str, Any]:
        """For the manifest."""
        training = {name: value for name, value in asdict(self.training).items() if name != "loss"}
        sizes = {"pictures": self.pictures, "points": self.points, "curve_pairs": self.curve_pairs}
        settings = {"training": training, "batches": asdict(self.draws), "model": asdict(self.model)}
        return {"command": self.command(), "begin": self.begin, **sizes, **settings}

    def command(self) -> str:
        """That makes the same results."""
        flags = {
            "steps": self.training.steps,
            "batch": self.draws.batch,
            "rate": f"{self.training.learning_rate:g}",
            "pictures": self.pictures,
            "points": self.points,
            "curve-pairs": self.curve_pairs,
            "save-every": self.training.save_every,
            "seed": self.draws.seed,
            "begin": "MODEL" if self.begin else "none",
        }
        return " ".join(["tools/study/broadcast_losses OUT", *(f"--{name} {value}" for name, value in flags.items())])


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """The pictures to train on and those to choose by. Those to report on are among neither."""

    pixels: Pixels  # (picture, side, side, 3)
    labels: npt.NDArray[np.integer]  # (picture,)
    train: Numbers
    choose: Numbers

    def pairs(self, kind: PairKind, count: int) -> Numbers:
        """(count, 2) numbers of pictures to choose by; ConfigError if there are not so many."""
        return pair_up(kind, some_of(self.choose, self.labels, count), self.labels)


def known_pool() -> Pool:
    """Of the 10,000 known pictures; MissingExtraError if they were not fetched."""
    pictures = load_pictures()
    split = split_pictures(pictures.labels)
    return Pool(pixels=pictures.pixels, labels=pictures.labels, train=split.train, choose=split.choose)


def loss_settings(pictures: int, points: int) -> list[Setting]:
    """All that every system is measured in."""
    return [
        Setting(kind=kind, pictures=pictures, points=points, snr_db=snr_db, cbr=CBR)
        for kind in KINDS
        for snr_db in SNR_PAIRS_DB
    ]
