"""An experiment: four users on one block, by two joint blocks that take turns or lie on top of each other.

The strongest user is paired with the weakest. All of a system's numbers (slots or power of each joint block, both
alphas, or the slots of each user) are chosen on pictures to choose by: the worst user shall have the highest mean PSNR.
Classical codecs give each user the same number of bits at capacity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from wdmoe.arrays import FloatArray
from wdmoe.broadcast.baselines.classical import channel_uses
from wdmoe.broadcast.baselines.codecs import CODECS
from wdmoe.broadcast.baselines.single_user import Scrambler, decibels, sent_alone, told
from wdmoe.broadcast.codec.model import as_pictures, as_pixels
from wdmoe.broadcast.datasets.pictures import Numbers, pair_up, some_of
from wdmoe.broadcast.quality.alpha_sweep import EACH, alpha_sweep, rows_of, tokens_of
from wdmoe.broadcast.quality.channel_draws import Radio
from wdmoe.broadcast.quality.metrics import psnr_db
from wdmoe.broadcast.study.study import MAIN_CBR, Study
from wdmoe.errors import ConfigError
from wdmoe.wireless.broadcast import capacity_bits

SNR_DB = ((15.0, 0.0), (10.0, 5.0))  # of the two joint blocks' users
TURNS, LAYERS, ALONE = "joint, taking turns", "joint, superposed", "single-user, time division"
_ALPHAS = np.linspace(0.1, 0.9, 9)
_POWERS = (0.3, 0.5, 0.7, 0.85)
_CHOOSE = 20  # sets of pictures


@dataclass(frozen=True, slots=True)
class FourUsers:
    """One system: what was chosen, and what came out."""

    chosen: tuple[float, ...]
    psnr_db: FloatArray  # (set, 4): users of 15, 0, 10 and 5 dB


def run_four(study: Study, pictures: int) -> dict[str, FourUsers]:
    """Every system on as many sets of held-out pictures of different classes, by name."""
    choose = _sets(study.material.some_to_choose_by(_CHOOSE), study.material.labels)
    chosen = {
        TURNS: choose_turns(study, choose),
        LAYERS: choose_layers(study, choose),
        ALONE: tuple(_choose_slots(_alone(study, choose))),
    }
    chosen |= {f"{CODECS[name]().name}, time division": () for name in study.classical}
    return {name: FourUsers(how, measure_four(study, pictures, name, how)) for name, how in chosen.items()}


def measure_four(
    study: Study, pictures: int, system: str, chosen: tuple[float, ...], first_sets: int | None = None
) -> FloatArray:
    """(set, 4) PSNR of one system with these numbers, of the first so many sets.

    Raises:
        ConfigError: the system is not one of these, or has other numbers.
    """
    material = study.material
    sets = _sets(some_of(material.test, material.labels, pictures), material.labels)[:first_sets]
    classical = {f"{CODECS[name]().name}, time division": name for name in CODECS}
    if len(chosen) != {TURNS: 3, LAYERS: 3, ALONE: 4}.get(system, 0) or system not in {*_JOINT, ALONE, *classical}:
        raise ConfigError(f"{system!r} is no system for four users with {len(chosen)} numbers")
    if system == ALONE:
        return _at_slots(_alone(study, sets), list(chosen))
    return _equal_bits(study, classical[system], sets) if system in classical else _JOINT[system](study, sets, chosen)


def choose_turns(study: Study, sets: Numbers) -> tuple[float, ...]:
    """Slots of the first joint block, and both alphas."""
    kept = study.joint.settings.kept(MAIN_CBR)
    best: list[list[tuple[float, float]]] = [[], []]  # of each joint block by slots: worst user's PSNR, alpha
    for block in (0, 1):
        for slots in range(1, kept):
            means = alpha_sweep(
                study.joint, study.material.pixels, _pairs(sets, block), _ALPHAS, Radio(snr_db=SNR_DB[block]), slots
            ).psnr_db.mean(axis=1)
            best[block].append(_worst(means))
    worst = [min(best[0][slots - 1][0], best[1][kept - slots - 1][0]) for slots in range(1, kept)]
    slots = int(np.argmax(worst)) + 1
    return float(slots), best[0][slots - 1][1], best[1][kept - slots - 1][1]


def turns(study: Study, sets: Numbers, chosen: tuple[float, ...]) -> FloatArray:
    """(set, 4) PSNR where joint blocks take turns."""
    kept, first = study.joint.settings.kept(MAIN_CBR), int(chosen[0])
    found = [
        alpha_sweep(
            study.joint, study.material.pixels, _pairs(sets, block), [alpha], Radio(snr_db=SNR_DB[block]), slots
        ).psnr_db[0]
        for block, alpha, slots in ((0, chosen[1], first), (1, chosen[2], kept - first))
    ]
    return np.concatenate(found, axis=1)


def choose_layers(study: Study, sets: Numbers) -> tuple[float, ...]:
    """Power of the first joint block, and both alphas."""
    tried = []
    for power in _POWERS:
        means = np.stack([layers(study, sets, (power, alpha, alpha)).mean(axis=0) for alpha in _ALPHAS])
        first, second = _worst(means[:, :2]), _worst(means[:, 2:])
        tried.append((min(first[0], second[0]), power, first[1], second[1]))
    return max(tried)[1:]


@torch.no_grad()
def layers(study: Study, sets: Numbers, chosen: tuple[float, ...]) -> FloatArray:
    """(set, 4) PSNR where joint blocks are superposed; each user counts the other block as noise."""
    codec, kept = study.joint, study.joint.settings.kept(MAIN_CBR)
    tokens = tokens_of(codec, study.material.pixels)
    scrambler = Scrambler(tokens, kept)
    found = np.empty((len(sets), 4))
    for part in EACH.parts(len(sets)):
        wanted = study.material.pixels[sets[part]]
        count = len(wanted)
        rate, powers = torch.full((count,), kept), (chosen[0], 1 - chosen[0])
        alphas = [torch.full((count,), float(alpha)) for alpha in chosen[1:]]
        total = torch.zeros(count, tokens, codec.settings.slots, 2)
        for block, (own, alpha) in enumerate(zip(powers, alphas, strict=True)):
            snrs = told([decibels(own / (1 - own + 10 ** (-snr / 10))) for snr in SNR_DB[block]], count)
            sent = codec.encode(as_pictures(wanted[:, 2 * block : 2 * block + 2]), snrs, alpha, rate)
            total = total + own**0.5 * (scrambler.mix(sent) if block else sent)
        scale = total[:, :, :kept].square().sum(-1).mean(dim=(1, 2)).sqrt()
        for block, (own, alpha) in enumerate(zip(powers, alphas, strict=True)):
            radio, pairs = Radio(snr_db=SNR_DB[block]), _pairs(sets[part], block)
            draws = radio.draws(pairs, tokens, codec.settings.slots)
            heard = radio.heard(total / scale[:, None, None, None], rows_of(SNR_DB[block], count), draws)
            noise = scale[:, None] ** 2 / 10 ** (heard.snr_db / 10) + 1 - own
            symbols = heard.symbols * (scale / own**0.5)[:, None, None, None, None]
            if block:
                symbols = torch.stack([scrambler.undo(symbols[:, user]) for user in (0, 1)], dim=1)
            shown = codec.decode_both(symbols, 10 * torch.log10(own / noise), alpha, rate)
            found[part, 2 * block : 2 * block + 2] = psnr_db(wanted[:, 2 * block : 2 * block + 2], as_pixels(shown))
    return found


_JOINT: dict[str, Callable[[Study, Numbers, tuple[float, ...]], FloatArray]] = {TURNS: turns, LAYERS: layers}


def _sets(numbers: Numbers, labels: npt.ArrayLike) -> Numbers:
    """(set, 4): every picture once for each user."""
    pairs = pair_up("different class", numbers, labels)
    return np.concatenate([pairs, np.roll(pairs, len(pairs) // 2, axis=0)], axis=1)


def _pairs(sets: Numbers, block: int) -> Numbers:
    return sets[:, 2 * block : 2 * block + 2]


def _worst(means: FloatArray) -> tuple[float, float]:
    """The best mean PSNR of the worse user of (alpha, 2), and its alpha."""
    place = int(np.argmax(means.min(axis=1)))
    return float(means[place].min()), float(_ALPHAS[place])


def _alone(study: Study, sets: Numbers) -> FloatArray:
    """(user, slots + 1, set) PSNR of the single-user codec."""
    kept, blank = study.single.settings.kept(MAIN_CBR), study.material.blank
    found = []
    for block in (0, 1):
        numbers = np.unique(_pairs(sets, block))
        alone = sent_alone(study.single, study.material.pixels, numbers, Radio(snr_db=SNR_DB[block]), kept, blank)
        found += [alone.found[user][:, np.searchsorted(numbers, _pairs(sets, block)[:, user]), 0] for user in (0, 1)]
    return np.stack(found)


def _choose_slots(alone: FloatArray) -> list[float]:
    """Slots of each user that give all the same mean PSNR; a part of a slot is one in that part of the blocks."""
    means = np.maximum.accumulate(alone.mean(axis=2), axis=1)  # (user, slots + 1)
    slots = np.arange(means.shape[1], dtype=np.float64)
    low, high = means[:, 0].max(), means[:, -1].min()
    for _ in range(50):
        middle = (low + high) / 2
        need = [float(np.interp(middle, own, slots)) for own in means]
        low, high = (middle, high) if sum(need) <= slots[-1] else (low, middle)
    return [float(np.interp(low, own, slots)) for own in means]


def _at_slots(alone: FloatArray, slots: list[float]) -> FloatArray:
    whole = np.arange(alone.shape[1])
    return np.stack(
        [
            np.array([np.interp(part, whole, own[:, place]) for place in range(own.shape[1])])
            for own, part in zip(alone, slots, strict=True)
        ],
        axis=1,
    )


def _equal_bits(study: Study, name: str, sets: Numbers) -> FloatArray:
    """Time division at capacity with the same number of bits for each user."""
    uses = channel_uses(MAIN_CBR, study.material.pixels.shape[1:])
    bits = int(uses / (1 / capacity_bits(np.ravel(SNR_DB))).sum())
    ladders = study.ladders_of(name, np.unique(sets), bits)
    best = {number: ladder.psnr_db[ladder.best(bits)] for number, ladder in ladders.items()}
    return np.array([[best[int(number)] for number in row] for row in sets])
