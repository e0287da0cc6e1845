"""Baselines of the broadcast codec that are learned too: a codec for one user, used by turns, in layers, or for both.

The single-user codec serves the first user at alpha 1, whose share is all. There the joint codec is the best linear
code for one picture, so it is its own single-user codec unless another one is given. Two users then get

time division
    each of them some of a block's slots, at full power. How many slots one block uses is chosen on the pictures to
    choose by: a share alternates, from block to block, between the two numbers of slots on the upper hull of the mean
    PSNR there. So numbers of slots that the codec was not trained on cost nothing.
superposition
    two blocks, added with powers b and 1 - b. Each receiver counts the other one's block as noise. Symbols are analog,
    so there is nothing to decode without error and to cancel: no SIC. With `subtract` the stronger user does what comes
    nearest: it decodes the weaker one's picture, encodes it again, takes it away, and measures how much noise is left.
sent once
    one block for both, if they want the same picture; what SNR the encoder is told goes from the weaker user's to the
    stronger one's.

A user who gets no slot or no power sees the mean training picture. Same noise, pairs and figures as for the codec.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wdmoe.arrays import FloatArray, Pixels
from wdmoe.broadcast.codec.model import USERS, BroadcastCodec, as_pictures, as_pixels
from wdmoe.broadcast.quality.alpha_sweep import EACH, Judge, rows_of, tokens_of
from wdmoe.broadcast.quality.channel_draws import Draws, Radio
from wdmoe.broadcast.quality.pareto_front import QUALITIES, Front, front_of
from wdmoe.errors import ConfigError

TOLD_DB = (-3.0, 22.0)  # what encoders were told in training; SNRs beyond are told as the nearest of these
HEARD_DB = (-30.0, 40.0)  # what a decoder can be told
_SCRAMBLE = 20240610  # seed of the order and phases of the second layer
_FIRST = 0  # the user whom the single-user codec serves


@dataclass(frozen=True, slots=True)
class Alone:
    """Pictures sent to one user each, by the number of slots of a token they had."""

    numbers: npt.NDArray[np.int64]  # (picture,)
    found: FloatArray  # (user, slots + 1, picture, quality)

    def hulls(self) -> list[npt.NDArray[np.int64]]:
        """For each user the numbers of slots on the upper hull of the mean PSNR, from 0 to all."""
        return [_upper_hull(means) for means in self.found[..., 0].mean(axis=2)]


@torch.no_grad()
def sent_alone(
    codec: BroadcastCodec,
    pixels: Pixels,
    numbers: npt.ArrayLike,
    radio: Radio,
    slots: int,
    blank: Pixels,
    judge: Judge = EACH,
) -> Alone:
    """Every picture to each user, with no slot, one, and so on.

    Args:
        codec: of one user.
        pixels: (picture, side, side, 3) all pictures that `numbers` may name.
        numbers: (picture,) whom to send.
        radio: of the two users.
        slots: the most.
        blank: what a user without a slot shows.
        judge: of what is shown.
    """
    wanted = np.asarray(numbers, dtype=np.int64)
    found = np.empty((USERS, slots + 1, len(wanted), len(QUALITIES)))
    for part in judge.parts(len(wanted)):
        pictures = pixels[wanted[part]]
        found[:, 0, part] = judge.qualities(pictures, np.broadcast_to(blank, pictures.shape))
        for user in range(USERS):
            draws = radio.draws(wanted[part][:, None], tokens_of(codec, pixels), codec.settings.slots, user)
            for kept in range(1, slots + 1):
                snrs = rows_of(radio.snr_db[user], len(pictures))
                sent = _encoded(codec, pictures, told(radio.snr_db[user], len(pictures)), kept)
                heard = radio.heard(sent, snrs[:, None], draws)
                shown = _decoded(codec, heard.symbols[:, 0], heard.snr_db[:, 0], kept)
                found[user, kept, part] = judge.qualities(pictures, shown)
    return Alone(wanted, found)


def time_division(
    alone: Alone, hulls: list[npt.NDArray[np.int64]], pairs: npt.ArrayLike, shares: npt.ArrayLike
) -> Front:
    """Both users' qualities as the first one's share of the slots goes through `shares`.

    Args:
        alone: every picture of the pairs.
        hulls: of each user, see `Alone.hulls`, of other pictures on the same radio.
        pairs: (pair, 2) numbers of pictures.
        shares: (point,) 0 to 1.
    """
    share, wanted = np.asarray(shares, dtype=np.float64), np.asarray(pairs)
    slots = alone.found.shape[1] - 1
    place = {int(number): place for place, number in enumerate(alone.numbers)}
    found = np.empty((len(share), len(wanted), USERS, len(QUALITIES)))
    for user in range(USERS):
        own = alone.found[user][:, [place[int(number)] for number in wanted[:, user]]]
        for point, part in enumerate(share):
            low, high, weight = _between(hulls[user], slots * (part if user == 0 else 1 - part))
            found[point, :, user] = (1 - weight) * own[low] + weight * own[high]
    return front_of(share, found)


@torch.no_grad()
def superposition(
    codec: BroadcastCodec,
    pixels: Pixels,
    pairs: npt.ArrayLike,
    shares: npt.ArrayLike,
    radio: Radio,
    kept: int,
    blank: Pixels,
    subtract: bool = False,
    judge: Judge = EACH,
) -> Front:
    """Both users' qualities as the first one's share of the power goes through `shares`; else as in `sent_alone`.

    Raises:
        ConfigError: `subtract` on fading channels.
    """
    if subtract and radio.csi_error is not None:
        raise ConfigError("subtraction is for steady channels")
    share, wanted = np.asarray(shares, dtype=np.float64), np.asarray(pairs)
    found = np.empty((len(share), len(wanted), USERS, len(QUALITIES)))
    for part in judge.parts(len(wanted)):
        pictures = pixels[wanted[part]]
        draws = radio.draws(wanted[part], tokens_of(codec, pixels), codec.settings.slots)
        for point, power in enumerate(share):
            layers = _Layers(codec, pictures, radio, draws, float(power), kept)
            for user in range(USERS):
                shown = layers.shown(user, subtract)
                seen = np.broadcast_to(blank, pictures[:, user].shape) if shown is None else shown
                found[point, part, user] = judge.qualities(pictures[:, user], seen)
    return front_of(share, found)


@torch.no_grad()
def sent_once(
    codec: BroadcastCodec,
    pixels: Pixels,
    numbers: npt.ArrayLike,
    radio: Radio,
    kept: int,
    points: int,
    judge: Judge = EACH,
) -> Front:
    """One block for both users; the encoder is told SNRs from the weaker one's to the stronger one's."""
    part_of, wanted = np.linspace(0, 1, points), np.asarray(numbers)
    low, high = sorted(radio.snr_db)
    found = np.empty((points, len(wanted), USERS, len(QUALITIES)))
    for part in judge.parts(len(wanted)):
        pictures = pixels[wanted[part]]
        pairs = np.stack([wanted[part]] * USERS, axis=1)
        draws = radio.draws(pairs, tokens_of(codec, pixels), codec.settings.slots)
        snrs = rows_of(radio.snr_db, len(pictures))
        for point, between in enumerate(part_of):
            between_db = told(low + between * (high - low), len(pictures))
            heard = radio.heard(_encoded(codec, pictures, between_db, kept), snrs, draws)
            for user in range(USERS):
                shown = _decoded(codec, heard.symbols[:, user], heard.snr_db[:, user], kept)
                found[point, part, user] = judge.qualities(pictures, shown)
    return front_of(part_of, found)


class _Layers:
    """Two blocks on top of each other, and what each user makes of them."""

    def __init__(
        self, codec: BroadcastCodec, pictures: Pixels, radio: Radio, draws: Draws, power: float, kept: int
    ) -> None:
        self._codec, self._kept, self._powers = codec, kept, (power, 1 - power)
        self._stronger = int(radio.snr_db[1] > radio.snr_db[0])
        count = len(pictures)
        noises = [10 ** (-snr / 10) for snr in radio.snr_db]
        self._told = [
            told(decibels(own / (1 - own + noise)), count) for own, noise in zip(self._powers, noises, strict=True)
        ]
        self._scrambler = Scrambler(tokens_of(codec, pictures[:, 0]), kept)
        first, second = (self._sent(user, pictures[:, user]) for user in range(USERS))
        total = power**0.5 * first + (1 - power) ** 0.5 * second
        # Alike pictures have alike symbols, so powers do not just add; the scale goes along with the block.
        scale = total[:, :, :kept].square().sum(-1).mean(dim=(1, 2)).sqrt()
        heard = radio.heard(total / scale[:, None, None, None], rows_of(radio.snr_db, count), draws)
        self._heard = heard.symbols * scale[:, None, None, None, None]  # (block, user, token, slot, 2)
        self._noise = scale[:, None] ** 2 / 10 ** (heard.snr_db / 10)  # (block, user)

    def shown(self, user: int, subtract: bool) -> Pixels | None:
        """What a user shows; nothing if it has no power."""
        own, other = self._powers[user], self._powers[1 - user]
        if own == 0:
            return None
        heard, noise = self._heard[:, user], self._noise[:, user]
        if subtract and user == self._stronger and other > 0:
            heard, noise = self._without_weaker(heard, noise)
        else:
            noise = noise + other
        return self._layer(user, heard, noise)

    def _without_weaker(self, heard: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        own, other, weaker = self._powers[self._stronger], self._powers[1 - self._stronger], 1 - self._stronger
        guess = self._layer(weaker, heard, noise + own)
        rest = heard - other**0.5 * self._sent(weaker, guess)
        left = rest[:, :, : self._kept].square().sum(-1).mean(dim=(1, 2)) - own
        return rest, torch.maximum(left, noise)

    def _sent(self, user: int, pictures: Pixels) -> Tensor:
        """A user's layer at power 1; the second one's is scrambled, so that it is like noise to the first."""
        symbols = _encoded(self._codec, pictures, self._told[user], self._kept)
        return self._scrambler.mix(symbols) if user else symbols

    def _layer(self, user: int, heard: Tensor, noise: Tensor) -> Pixels:
        power = self._powers[user]
        symbols = heard / power**0.5
        snr_db = (10 * torch.log10(power / noise)).clamp(*HEARD_DB)
        return _decoded(self._codec, self._scrambler.undo(symbols) if user else symbols, snr_db, self._kept)


class Scrambler:
    """Known to all: another order of the symbols of a block, and other phases."""

    def __init__(self, tokens: int, kept: int) -> None:
        rng = np.random.default_rng(_SCRAMBLE)
        self._kept = kept
        self._order = torch.from_numpy(rng.permutation(tokens * kept))
        self._turn = torch.from_numpy(np.exp(2j * np.pi * rng.random(tokens * kept)).astype(np.complex64))

    def mix(self, symbols: Tensor) -> Tensor:
        """Symbols (block, token, slot, 2) scrambled."""
        return self._put(symbols, self._turn * self._sent(symbols)[:, self._order])

    def undo(self, symbols: Tensor) -> Tensor:
        """The inverse."""
        flat = torch.empty_like(self._sent(symbols))
        flat[:, self._order] = self._sent(symbols) * self._turn.conj()
        return self._put(symbols, flat)

    def _sent(self, symbols: Tensor) -> Tensor:
        return torch.view_as_complex(symbols[:, :, : self._kept].contiguous()).flatten(1)

    def _put(self, like: Tensor, flat: Tensor) -> Tensor:
        found = torch.zeros_like(like)
        found[:, :, : self._kept] = torch.view_as_real(flat.reshape(len(flat), -1, self._kept))
        return found


def _encoded(codec: BroadcastCodec, pictures: Pixels, told_db: Tensor, kept: int) -> Tensor:
    """Symbols of one picture a block, for a user of this SNR."""
    count, device = len(pictures), next(codec.parameters()).device
    snrs = told_db[:, None].expand(-1, USERS).to(device)
    rate, alpha = torch.full((count,), kept, device=device), torch.ones(count, device=device)
    own = as_pictures(pictures).to(device)
    # At alpha 1 the other picture leaves no trace; but it must be another one, or the block would be for both.
    return codec.encode(torch.stack([own, 1 - own], dim=1), snrs, alpha, rate).cpu()


def _decoded(codec: BroadcastCodec, heard: Tensor, snr_db: Tensor, kept: int) -> Pixels:
    count, device = len(heard), next(codec.parameters()).device
    rate, user = torch.full((count,), kept, device=device), torch.full((count,), _FIRST, device=device)
    share = torch.ones(count, device=device)
    return as_pixels(codec.decode(heard.to(device), snr_db.to(device), share, rate, user))


def told(snr_db: npt.ArrayLike, count: int) -> Tensor:
    """(count, ...) rows of SNRs, within what encoders were told in training."""
    return rows_of(np.clip(snr_db, *TOLD_DB), count)


def decibels(ratio: float) -> float:
    """Of a ratio of powers, -30 at least."""
    return 10 * float(np.log10(max(ratio, 1e-3)))


def _upper_hull(values: FloatArray) -> npt.NDArray[np.int64]:
    """Places, from the first to the last, of the corners of the least concave function above (place,) values."""
    corners: list[int] = []
    for place, value in enumerate(values):
        while len(corners) > 1:
            one, two = corners[-2:]
            if (values[two] - values[one]) * (place - one) > (value - values[one]) * (two - one):
                break
            corners.pop()
        corners.append(place)
    return np.array(corners)


def _between(corners: npt.NDArray[np.int64], place: float) -> tuple[int, int, float]:
    """The corners below and above a place, and how far it lies from the lower to the upper one."""
    upper = min(int(np.searchsorted(corners, place + 1e-9, side="right")), len(corners) - 1)
    low, high = int(corners[upper - 1]), int(corners[upper])
    return low, high, float(np.clip((place - low) / (high - low), 0, 1))
