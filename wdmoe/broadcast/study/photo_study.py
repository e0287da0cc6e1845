"""The comparison on photographs: the codec in tiles of 32x32, classical codecs on the whole picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import Pixels
from wdmoe.broadcast.baselines.bitrate_ladders import AnyCodec, kept_ladders
from wdmoe.broadcast.baselines.classical import SCHEMES, channel_uses, even_shares, most_bits, same_to_both, sweep
from wdmoe.broadcast.baselines.codecs import CODECS, Jpeg2000
from wdmoe.broadcast.baselines.single_user import sent_alone, sent_once, superposition, time_division
from wdmoe.broadcast.quality.alpha_sweep import alpha_sweep
from wdmoe.broadcast.quality.channel_draws import Radio
from wdmoe.broadcast.quality.pareto_front import Front
from wdmoe.broadcast.study.photographs import HEIGHT, TILES, WHOLE, WIDTH, load_photographs, tile_pairs, tiled
from wdmoe.broadcast.study.study import JOINT, MAIN_CBR, MAIN_SNR_DB, ONCE, ONE_ALPHA, SINGLE, Fronts, Study

KINDS = ("same photograph", "different photographs")
_POINTS = 9
# A photograph gains from more resolutions than 32x32 has, and fits links that leave it a hundredth of its raw size.
_CODECS: dict[str, Callable[[], AnyCodec]] = {
    **CODECS,
    "jpeg2000": partial(Jpeg2000, levels=(6,), rungs=90, highest_ratio=500.0),
}
_SEED = 1  # other noise than the small pictures'


def photograph_name(kind: str) -> str:
    """As `Setting.name`."""
    return f"{kind}, {MAIN_SNR_DB[0]:g}/{MAIN_SNR_DB[1]:g} dB, CBR 1/{round(1 / MAIN_CBR)}"


def run_photographs(study: Study, classical: Sequence[str], first_pairs: int | None = None) -> dict[str, Fronts]:
    """Fronts of whole photographs by name of the setting; each photograph is paired with itself, and with the next.

    Args:
        study: codecs, progress and cache.
        classical: names of classical codecs.
        first_pairs: only so many of the pairs.
    Raises:
        MissingExtraError: the photographs were not fetched.
    """
    photographs = np.stack(list(load_photographs().values()))
    numbers = np.arange(len(photographs))
    found: dict[str, Fronts] = {}
    for kind in KINDS:
        shift = 0 if kind == KINDS[0] else -1
        pairs = np.stack([numbers, np.roll(numbers, shift)], axis=1)[:first_pairs]
        fronts = _learned(study, tiled(photographs), pairs)
        for name in classical:
            fronts |= _classical(study, name, photographs, pairs)
        found[photograph_name(kind)] = fronts
    return found


def _learned(study: Study, tiles: Pixels, pairs: npt.NDArray[np.int64]) -> Fronts:
    """Each photograph's figures stand at all of its tiles; one of them is kept."""
    radio, kept = Radio(snr_db=MAIN_SNR_DB, seed=_SEED), study.joint.settings.kept(MAIN_CBR)
    shares, blank = np.linspace(0, 1, _POINTS), study.material.blank
    wanted = tile_pairs(pairs)
    same = np.array_equal(pairs[:, 0], pairs[:, 1])
    found = {JOINT: alpha_sweep(study.joint, tiles, wanted, ONE_ALPHA if same else shares, radio, kept, WHOLE)}
    if same:
        once = sent_once(study.single, tiles, wanted[:, 0], radio, kept, _POINTS, WHOLE)
        found[f"{SINGLE}, {ONCE}"] = once
    else:
        alone = sent_alone(study.single, tiles, tile_pairs(_unique(pairs))[:, 0], radio, kept, blank, WHOLE)
        hulls = study.hulls(radio, kept)
        found[f"{SINGLE}, time division"] = time_division(alone, hulls, wanted, shares)
        layers = superposition(study.single, tiles, wanted, shares, radio, kept, blank, judge=WHOLE)
        found[f"{SINGLE}, superposition"] = layers
    return {name: front.of(slice(None, None, TILES)) for name, front in found.items()}


def _unique(pairs: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.stack([np.unique(pairs)] * 2, axis=1)


def _classical(study: Study, name: str, photographs: Pixels, pairs: npt.NDArray[np.int64]) -> Fronts:
    codec, uses = _CODECS[name](), channel_uses(MAIN_CBR, (HEIGHT, WIDTH, 3))
    blank = np.broadcast_to(np.rint(study.material.blank.mean(axis=(0, 1))), photographs.shape[1:])
    wanted = {int(number): photographs[number] for number in np.unique(pairs)}
    most = most_bits(MAIN_SNR_DB, uses)
    ladders = kept_ladders(codec, wanted, blank.astype(np.uint8), most, study.progress, study.cache)
    if np.array_equal(pairs[:, 0], pairs[:, 1]):
        return {f"{codec.name}, {ONCE}": same_to_both(ladders, pairs[:, 0], MAIN_SNR_DB, uses)}
    found: dict[str, Front] = {}
    for scheme in SCHEMES:
        shares = even_shares(MAIN_SNR_DB, scheme, _POINTS)
        found[f"{codec.name}, {scheme}"] = sweep(ladders, pairs, MAIN_SNR_DB, uses, scheme, shares)
    return found
