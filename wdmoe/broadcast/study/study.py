"""The comparison: which settings are measured, with which systems, on which pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import FloatArray, Pixels
from wdmoe.broadcast.baselines.bitrate_ladders import kept_ladders
from wdmoe.broadcast.baselines.classical import (
    SCHEMES,
    Ladder,
    channel_uses,
    even_shares,
    most_bits,
    same_to_both,
    sweep,
)
from wdmoe.broadcast.baselines.classical_fading import fading_bits, fading_fronts, same_fading_fronts
from wdmoe.broadcast.baselines.codecs import CODECS
from wdmoe.broadcast.baselines.single_user import Alone, sent_alone, sent_once, superposition, time_division
from wdmoe.broadcast.codec.model import BroadcastCodec
from wdmoe.broadcast.datasets.pictures import (
    PAIR_KINDS,
    Numbers,
    PairKind,
    load_pictures,
    mean_picture,
    pair_up,
    some_of,
    split_pictures,
)
from wdmoe.broadcast.quality.alpha_sweep import alpha_sweep
from wdmoe.broadcast.quality.channel_draws import Radio
from wdmoe.broadcast.quality.pareto_front import Front

Progress = Callable[[str, float], None]
Fronts = dict[str, Front]  # by name of the system

JOINT, SINGLE, SUBTRACT, ONCE = "joint", "single-user", "superposition, subtracting", "sent once"
MAIN_SNR_DB, MAIN_CBR = (10.0, 5.0), 1 / 6
CBRS = (1 / 12, 1 / 6, 1 / 3)
SNR_PAIRS_DB = ((10.0, 5.0), (15.0, 5.0), (20.0, 10.0), (5.0, 0.0))
GAPS_DB = (0.0, 5.0, 10.0, 15.0, 20.0)  # around a mean of 10 dB
GAP_MEAN_DB = 10.0
CSI_ERRORS = (0.0, 0.05, 0.1, 0.2)
MOST_BITS = (1771, 3542)  # limits of ladders: the best link at (10, 5) dB and CBR 1/6, and over all settings
ONE_ALPHA = np.ones(1)  # the codec does not look at alpha where both users want the same picture
_SWEEP_POINTS = 7  # of a front in sweeps
_CHOOSE = 50  # pictures that time division chooses its numbers of slots by


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One kind of pairs on one radio."""

    kind: PairKind
    pictures: int
    snr_db: tuple[float, float] = MAIN_SNR_DB
    cbr: float = MAIN_CBR
    csi_error: float | None = None
    points: int = 11  # of each front
    subtract: bool = False  # also measure superposition with subtraction

    @property
    def name(self) -> str:
        """What stands in tables: pairs, pictures, SNRs, rate, fading."""
        snr = f"{self.snr_db[0]:g}/{self.snr_db[1]:g} dB"
        fading = "" if self.csi_error is None else f", Rayleigh, CSI error {self.csi_error:g}"
        return f"{self.kind}, {self.pictures} pictures, {snr}, CBR 1/{round(1 / self.cbr)}{fading}"

    @property
    def radio(self) -> Radio:
        """Its channels; the seed is the same in all settings."""
        return Radio(snr_db=self.snr_db, csi_error=self.csi_error)


def main_settings(pictures: int, points: int = 11) -> list[Setting]:
    """The main comparison, one setting for each kind of pairs."""
    return [Setting(kind=kind, pictures=pictures, points=points) for kind in PAIR_KINDS]


def all_settings(most_pictures: int, few_pictures: int, points: int = 11) -> list[Setting]:
    """The main comparison on `most_pictures`, then sweeps of SNRs, rates, gaps and CSI errors on `few_pictures`."""
    found = main_settings(most_pictures, points) + _sweeps(few_pictures, min(points, _SWEEP_POINTS))
    return list({each.name: each for each in reversed(found)}.values())[::-1]  # of one name the first


def _sweeps(pictures: int, points: int) -> list[Setting]:
    found: list[Setting] = []
    some = partial(Setting, pictures=pictures, points=points)
    for kind in PAIR_KINDS:
        found += [some(kind=kind, snr_db=snr, subtract=snr == MAIN_SNR_DB) for snr in SNR_PAIRS_DB]
        found += [some(kind=kind, cbr=cbr) for cbr in CBRS]
    found += [some(kind="different class", snr_db=at_gap(gap)) for gap in GAPS_DB]
    found += [some(kind="different class", csi_error=error) for error in CSI_ERRORS]
    return found


def at_gap(gap_db: float) -> tuple[float, float]:
    """The pair of SNRs of a gap."""
    return GAP_MEAN_DB + gap_db / 2, GAP_MEAN_DB - gap_db / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """The pictures of a study; `choose` and `test` share none, and none was trained on."""

    pixels: Pixels  # (picture, side, side, 3)
    labels: npt.NDArray[np.integer]  # (picture,)
    choose: Numbers
    test: Numbers
    blank: Pixels  # (side, side, 3) what a user shows who gets nothing

    def pairs(self, kind: PairKind, count: int) -> Numbers:
        """(count, 2) numbers of pictures to report on."""
        return pair_up(kind, some_of(self.test, self.labels, count), self.labels)

    def some_to_choose_by(self, most: int) -> Numbers:
        """Numbers of pictures to choose by, all classes alike."""
        return some_of(self.choose, self.labels, min(most, len(self.choose)))


def known_material() -> Material:
    """The 10,000 known pictures and their division; MissingExtraError if they were not fetched."""
    pictures = load_pictures()
    split = split_pictures(pictures.labels)
    return Material(
        pixels=pictures.pixels,
        labels=pictures.labels,
        choose=split.choose,
        test=split.test,
        blank=mean_picture(pictures),
    )


@dataclass(slots=True)
class Study:
    """Runs settings. Classical ladders and single pictures are kept between them."""

    material: Material
    joint: BroadcastCodec
    single: BroadcastCodec
    classical: Sequence[str] = tuple(CODECS)
    progress: Progress | None = None
    cache: Path | None = None  # of ladders; the user's unless given
    _alone: dict[tuple[Radio, int, bytes], Alone] = field(default_factory=dict)
    _ladders: dict[tuple[str, int], dict[int, Ladder]] = field(default_factory=dict)

    def run(self, setting: Setting, first_pairs: int | None = None) -> Fronts:
        """Qualities of every system.

        Args:
            first_pairs: only so many of the pairs.
        """
        pairs = self.material.pairs(setting.kind, setting.pictures)[:first_pairs]
        shares, kept = np.linspace(0, 1, setting.points), self.joint.settings.kept(setting.cbr)
        alphas = ONE_ALPHA if setting.kind == "same picture" else shares
        found = {JOINT: alpha_sweep(self.joint, self.material.pixels, pairs, alphas, setting.radio, kept)}
        found |= self._learned(setting, pairs, shares, kept)
        for name in self.classical:
            found |= self._classical(name, setting, pairs)
        return found

    def prepare(self, settings: Sequence[Setting]) -> None:
        """Build the classical ladders that settings need and the cache lacks, on all cores."""
        for name in self.classical:
            for setting in settings:
                numbers = np.unique(self.material.pairs(setting.kind, setting.pictures))
                self.ladders_of(name, numbers, self._most_bits(setting))

    def _learned(self, setting: Setting, pairs: Numbers, shares: FloatArray, kept: int) -> Fronts:
        pixels, radio, blank = self.material.pixels, setting.radio, self.material.blank
        if setting.kind == "same picture":
            once = sent_once(self.single, pixels, pairs[:, 0], radio, kept, setting.points)
            return {f"{SINGLE}, {ONCE}": once}
        layers = superposition(self.single, pixels, pairs, shares, radio, kept, blank)
        alone = self._sent_alone(radio, kept, np.unique(pairs))
        turns = time_division(alone, self.hulls(radio, kept), pairs, shares)
        found = {f"{SINGLE}, time division": turns, f"{SINGLE}, superposition": layers}
        if setting.subtract:
            minus = superposition(self.single, pixels, pairs, shares, radio, kept, blank, subtract=True)
            found[f"{SINGLE}, {SUBTRACT}"] = minus
        return found

    def hulls(self, radio: Radio, kept: int) -> list[Numbers]:
        """Between which numbers of slots time division alternates, by the pictures to choose by."""
        return self._sent_alone(radio, kept, self.material.some_to_choose_by(_CHOOSE)).hulls()

    def _sent_alone(self, radio: Radio, kept: int, numbers: Numbers) -> Alone:
        key = (radio, kept, numbers.tobytes())
        if key not in self._alone:
            pixels, blank = self.material.pixels, self.material.blank
            self._alone[key] = sent_alone(self.single, pixels, numbers, radio, kept, blank)
        return self._alone[key]

    def _classical(self, name: str, setting: Setting, pairs: Numbers) -> Fronts:
        title, radio, uses = CODECS[name]().name, setting.radio, self._uses(setting)
        ladders = self.ladders_of(name, np.unique(pairs), self._most_bits(setting))
        same = setting.kind == "same picture"
        if setting.csi_error is not None:
            if same:
                return same_fading_fronts(title, ladders, pairs[:, 0], radio, uses, ONCE)
            return fading_fronts(title, ladders, pairs, radio, uses, setting.points)
        if same:
            return {f"{title}, {ONCE}": same_to_both(ladders, pairs[:, 0], setting.snr_db, uses)}
        return {
            f"{title}, {scheme}": sweep(
                ladders, pairs, setting.snr_db, uses, scheme, even_shares(setting.snr_db, scheme, setting.points)
            )
            for scheme in SCHEMES
        }

    def _uses(self, setting: Setting) -> int:
        return channel_uses(setting.cbr, self.material.pixels.shape[1:])

    def _most_bits(self, setting: Setting) -> int:
        """Up to where ladders must go."""
        uses = self._uses(setting)
        return most_bits(setting.snr_db, uses) if setting.csi_error is None else fading_bits(setting.radio, uses)

    def ladders_of(self, name: str, numbers: Numbers, need_bits: int) -> Mapping[int, Ladder]:
        """Ladders of pictures up to at least these bits."""
        key = (name, next((tier for tier in MOST_BITS if tier >= need_bits), need_bits))
        known = self._ladders.setdefault(key, {})
        missing = {int(number): self.material.pixels[number] for number in numbers if number not in known}
        if missing:
            known |= kept_ladders(CODECS[name](), missing, self.material.blank, key[1], self.progress, self.cache)
        return {int(number): known[int(number)] for number in numbers}
