"""Classical codecs where each user's channel fades from block to block: two links, which differ in what is told whom.

told mean SNR
    The transmitter knows what that of the learned codecs knows, mean SNRs and the pictures, and besides that channels
    fade and what the CSI error is. It chooses a rung of each picture's ladder, and with it a rate, by the picture's
    mean PSNR over Rayleigh fading [D]. A block whose channel does not carry the rate is lost (outage): the user sees
    the mean training picture.
told each block's SNR
    The transmitter knows the effective SNR of every block beforehand and sends at its capacity, so nothing is lost. No
    learned codec here is told that. It is generous, not a bound on all: shares are the same in every block [D].

Both send to receivers who know an estimate of their gain and count its error as noise, in the draws that the learned
codecs meet for the same users and pictures. Which rung was sent is not counted, as which variant was not.

A superposed receiver decodes its codeword at once, the other one counted as noise, or the other one first and then its
own without it: whichever needs the lower SNR. Thresholds are those of capacity, so these links too are better than any
real one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import FloatArray
from wdmoe.broadcast.baselines.classical import SCHEMES, Ladder, even_shares, front_of_bits, front_of_rungs, most_bits
from wdmoe.broadcast.quality.channel_draws import Radio
from wdmoe.broadcast.quality.pareto_front import Front
from wdmoe.wireless.broadcast import capacity_bits, superposition_bits, time_division_bits

TOLD_MEAN, TOLD_BLOCKS = "told mean SNR", "told each block's SNR"
PEAK = 12.0  # ladders go to where the gain's power is so many times its mean: e^-12, 6 in a million blocks are above
_MOST_BITS_A_USE = 64.0  # a rate that no channel here carries; beyond it exponentials would overflow

Rungs = npt.NDArray[np.int64]


def fading_bits(radio: Radio, uses: int) -> int:
    """Bits that ladders must reach for a block of so many uses; what a rarer block carries beyond stays unused."""
    return most_bits(radio.mean_effective_snr_db() + 10 * np.log10(PEAK), uses)


def at_block_rates(
    ladders: Mapping[int, Ladder], pairs: npt.ArrayLike, radio: Radio, uses: int, scheme: str, points: int
) -> Front:
    """Both users' qualities if each block is sent at the capacity of its channels.

    A share is the stronger user's part of what it would get alone (the weaker one's part is the rest): of time, or as
    much power as that takes. So superposition gives both at least what time division does, in every block.

    Args:
        ladders, pairs, uses, scheme: as in `classical.sweep`.
        radio: of the two users.
        points: of the front.
    """
    snr_db, part = radio.effective_snr_db(pairs), np.linspace(0, 1, points)
    if scheme == "superposition":
        shares = np.stack([even_shares((pair[0], pair[1]), scheme, points) for pair in snr_db], axis=1)
        bits = superposition_bits(snr_db, shares)
    else:
        bits = time_division_bits(snr_db, part[:, None])
    return front_of_bits(ladders, pairs, part, uses * bits)


def same_at_block_rates(ladders: Mapping[int, Ladder], numbers: npt.ArrayLike, radio: Radio, uses: int) -> Front:
    """One point: both want the same picture and get it at the capacity of the channel that is worse in this block."""
    pairs = _twice(numbers)
    bits = capacity_bits(radio.effective_snr_db(pairs)).min(axis=1, keepdims=True)
    return front_of_bits(ladders, pairs, np.ones(1), uses * bits)


def at_chosen_rates(
    ladders: Mapping[int, Ladder], pairs: npt.ArrayLike, radio: Radio, uses: int, scheme: str, points: int
) -> Front:
    """Both users' qualities if rates are chosen for mean SNRs, and blocks are lost that do not carry them.

    By superposition the rung of the user whose mean SNR is lower is chosen first, the other codeword counted as noise;
    then the other user's, who may cancel it.

    Args:
        ladders, pairs, uses, scheme: as in `classical.sweep`.
        radio: of the two users.
        points: of the front.
    """
    mean_db, now = radio.mean_effective_snr_db(), 10 ** (radio.effective_snr_db(pairs) / 10)
    share = even_shares((mean_db[0], mean_db[1]), scheme, points)
    parts = np.stack([share, 1 - share])  # (user, point)
    mean = 10 ** (mean_db / 10)
    choose = _by_layers if scheme == "superposition" else _by_turns
    numbers = np.asarray(pairs)
    rungs = np.empty((points, *numbers.shape), dtype=np.int64)
    for place, pair in enumerate(numbers):
        chosen = choose([_steps(ladders[int(number)]) for number in pair], parts, mean, uses)
        for user, (rung, needs) in enumerate(chosen):
            rungs[:, place, user] = np.where(now[place, user] >= needs, rung, 0)
    return front_of_rungs(ladders, numbers, share, rungs)


def same_at_chosen_rates(ladders: Mapping[int, Ladder], numbers: npt.ArrayLike, radio: Radio, uses: int) -> Front:
    """One point: both want the same picture; its rung is the best by the mean over fading and both users."""
    pairs, mean = _twice(numbers), 10 ** (radio.mean_effective_snr_db() / 10)
    now = 10 ** (radio.effective_snr_db(pairs) / 10)
    rungs = np.empty((1, *pairs.shape), dtype=np.int64)
    for place, number in enumerate(pairs[:, 0]):
        steps = _steps(ladders[int(number)])
        needs = snr_of_bits(steps.bits, uses)
        best = np.argmax(np.sum([steps.expected(needs, each) for each in mean], axis=0))
        rungs[0, place] = np.where(now[place] >= needs[best], steps.rung[best], 0)
    return front_of_rungs(ladders, pairs, np.ones(1), rungs)


def fading_fronts(
    name: str, ladders: Mapping[int, Ladder], pairs: npt.ArrayLike, radio: Radio, uses: int, points: int
) -> dict[str, Front]:
    """Both links by time division and by superposition, by name of the system.

    Args:
        name: of the codec; the rest as in `at_block_rates`.
    """
    links = {TOLD_MEAN: at_chosen_rates, TOLD_BLOCKS: at_block_rates}
    return {
        f"{name}, {told}, {scheme}": link(ladders, pairs, radio, uses, scheme, points)
        for told, link in links.items()
        for scheme in SCHEMES
    }


def same_fading_fronts(
    name: str, ladders: Mapping[int, Ladder], numbers: npt.ArrayLike, radio: Radio, uses: int, how: str
) -> dict[str, Front]:
    """Both links for users who want the same picture; `how` ends the systems' names."""
    links = {TOLD_MEAN: same_at_chosen_rates, TOLD_BLOCKS: same_at_block_rates}
    return {f"{name}, {told}, {how}": link(ladders, numbers, radio, uses) for told, link in links.items()}


@dataclass(frozen=True, slots=True)
class _Steps:
    """Rungs of a ladder of which each shows more than all below it; the first is none."""

    rung: Rungs  # (step,)
    bits: FloatArray  # (step,)
    psnr_db: FloatArray  # (step,)

    def expected(self, needs: FloatArray, mean_snr: float) -> FloatArray:
        """(..., step) mean PSNR over Rayleigh fading, if steps need these SNRs (..., step) and else none is shown."""
        return np.asarray(self.psnr_db[0] + np.exp(-needs / mean_snr) * (self.psnr_db - self.psnr_db[0]))


def _steps(ladder: Ladder) -> _Steps:
    rung = np.unique(ladder.best(ladder.bits))
    return _Steps(rung, ladder.bits[rung].astype(np.float64), ladder.psnr_db[rung])


Chosen = list[tuple[Rungs, FloatArray]]  # of each user: (point,) rung and what SNR it needs


def _by_turns(steps: list[_Steps], parts: FloatArray, mean_snr: FloatArray, uses: int) -> Chosen:
    """Time division: users do not touch each other."""
    found: Chosen = []
    for own, part, mean in zip(steps, parts, mean_snr, strict=True):
        needs = snr_of_bits(own.bits, uses * part[:, None])
        best = np.argmax(own.expected(needs, mean), axis=1)
        found.append((own.rung[best], _picked(needs, best)))
    return found


def _by_layers(steps: list[_Steps], parts: FloatArray, mean_snr: FloatArray, uses: int) -> Chosen:
    """Superposition: the weaker user's rung first, then the stronger one's, who may cancel it."""
    strong = int(mean_snr[1] > mean_snr[0])
    weak = 1 - strong
    own = [snr_of_bits(each.bits, float(uses))[None] for each in steps]  # (1, step) without another layer
    power = parts[..., None]  # (user, point, 1)
    picked: dict[int, npt.NDArray[np.intp]] = {}
    needs = snr_beside(own[weak], power[weak], power[strong])
    picked[weak] = np.argmax(steps[weak].expected(needs, mean_snr[weak]), axis=1)
    of_weak = own[weak][0, picked[weak]][:, None]
    needs = snr_to_decode(own[strong], of_weak, power[strong], power[weak])
    picked[strong] = np.argmax(steps[strong].expected(needs, mean_snr[strong]), axis=1)
    of_strong = own[strong][0, picked[strong]][:, None]
    either = {strong: _picked(needs, picked[strong])}
    either[weak] = snr_to_decode(of_weak, of_strong, power[weak], power[strong])[:, 0]
    return [(steps[user].rung[picked[user]], either[user]) for user in (0, 1)]


def snr_of_bits(bits: npt.ArrayLike, uses: npt.ArrayLike) -> FloatArray:
    """(...,) SNR at which (...,) uses carry (...,) bits, a plain ratio: `2^(bits / uses) - 1`.

    Infinite for more than 64 bits a use or where there are no uses; 0 for no bits.
    """
    wanted, room = np.broadcast_arrays(np.asarray(bits, dtype=np.float64), np.asarray(uses, dtype=np.float64))
    carried = wanted <= _MOST_BITS_A_USE * room
    rate = np.divide(wanted, room, out=np.zeros_like(wanted), where=carried & (room > 0))
    return np.asarray(np.where(carried, np.expm1(rate * np.log(2)), np.inf))


def snr_beside(own: FloatArray, power: npt.ArrayLike, other_power: npt.ArrayLike) -> FloatArray:
    """SNR that a codeword needs beside another one that counts as noise.

    Args:
        own: (...,) what it would need alone at power 1, see `snr_of_bits`.
        power, other_power: (...,) of the two, summing to 1.
    Returns:
        (...,) `c / (p - q c)`, from `p g / (q g + 1) >= c`; infinite if no SNR is enough.
    """
    need, share, noise = np.broadcast_arrays(own, np.asarray(power), np.asarray(other_power))
    # c = inf at q = 0 is not a number here, and no more possible than at any other q
    left = share - np.multiply(noise, need, out=np.full_like(need, np.inf), where=np.isfinite(need))
    possible = left > 0
    found = np.divide(need, left, out=np.full_like(need, np.inf), where=possible)
    return np.asarray(np.where(need == 0, 0.0, found))


def snr_to_decode(own: FloatArray, other: FloatArray, power: npt.ArrayLike, other_power: npt.ArrayLike) -> FloatArray:
    """SNR that a receiver needs who may decode the other codeword first; arguments and result as in `snr_beside`."""
    at_once = snr_beside(own, power, other_power)
    then_alone = snr_beside(own, power, np.zeros_like(np.asarray(other_power)))
    return np.asarray(np.minimum(at_once, np.maximum(snr_beside(other, other_power, power), then_alone)))


def _picked(values: FloatArray, best: npt.NDArray[np.intp]) -> FloatArray:
    """(point,) of values (point or 1, step)."""
    return np.asarray(values[np.arange(best.size) if len(values) > 1 else 0, best])


def _twice(numbers: npt.ArrayLike) -> npt.NDArray[np.int64]:
    return np.stack([np.asarray(numbers, dtype=np.int64)] * 2, axis=1)
