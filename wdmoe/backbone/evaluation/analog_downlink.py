"""What devices hear of hidden vectors that a base station sends as amplitudes, and the codes it sends them with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from wdmoe.arrays import FloatArray, Int64Array
from wdmoe.backbone.families import experts_modules
from wdmoe.errors import ConfigError
from wdmoe.solver.layer.analog_downlink import Analog, block_symbols
from wdmoe.wireless.analog_code import AnalogCode, Spectrum, fitted_code, plain_code, superpose
from wdmoe.wireless.broadcast import broadcast_awgn
from wdmoe.wireless.checks import MOST_DB


@dataclass(frozen=True, slots=True, eq=False)
class Broadcast:
    """Some tokens of a layer, sent at once over one realisation of the channel."""

    tokens: Int64Array  # (sent,) which
    snr: FloatArray  # (devices,) plain ratio, of one block; 0: it does not listen
    repeats: FloatArray  # (sent,) times that a token's block is sent, >= 1; a device takes the mean of what it hears
    code: AnalogCode
    share: float  # of a pair's power, that its first token has; 0: no pairs
    rng: np.random.Generator

    def heard(self, hidden: torch.Tensor) -> FloatArray:
        """(listeners, sent, width) what those devices estimate, in their order; `hidden` is (tokens, width)."""
        vectors = hidden[torch.from_numpy(self.tokens)].detach().double().cpu().numpy()
        blocks, scale = self.code.encode(vectors)
        agreement = np.ones(len(vectors))
        block_of = np.arange(len(vectors))
        if self.share:
            blocks, agreement = _in_pairs(blocks, self.share)
            block_of = block_of // 2
        listening = self.snr[self.snr > 0]
        decibels = np.minimum(10 * np.log10(listening), MOST_DB)
        received = broadcast_awgn(self.rng, blocks, decibels).symbols[:, block_of]
        sent = blocks[block_of]
        means = sent + (received - sent) / np.sqrt(self.repeats)[:, None]  # whose noise is so much weaker
        pairs = zip(means, 10 ** (decibels / 10), strict=True)
        return np.stack([self.code.decode(each, scale, snr * self.repeats, agreement) for each, snr in pairs])

    def replace(self, vectors: torch.Tensor, hidden: torch.Tensor, token: torch.Tensor, device: torch.Tensor) -> None:
        """Put what is heard where a listener computes one of these tokens.

        Args:
            vectors: (n, width), changed in place.
            hidden: (tokens, width) as it was sent.
            token, device: (n,) of each vector.
        """
        if not len(self.tokens) or not (self.snr > 0).any():
            return
        row, listener = np.full(len(hidden), -1), np.full(len(self.snr), -1)
        row[self.tokens] = np.arange(len(self.tokens))
        listener[self.snr > 0] = np.arange(int((self.snr > 0).sum()))
        rows, listeners = row[token.cpu().numpy()], listener[device.cpu().numpy()]
        here = np.flatnonzero((rows >= 0) & (listeners >= 0))
        found = torch.from_numpy(self.heard(hidden)[listeners[here], rows[here]])
        vectors[torch.from_numpy(here)] = found.to(vectors.device, vectors.dtype)


class Codes:
    """Makes the codes of all layers."""

    def __init__(self, width: int, spectra: Sequence[Spectrum] = ()) -> None:
        """`spectra`: one for each layer with experts, from `fit_spectra`; without them "klt" is refused."""
        self._width, self._spectra = width, spectra

    def of(self, layer: int, analog: Analog, weakest: float) -> AnalogCode:
        """The code of one broadcast; a fitted one does best at its weakest listener.

        Args:
            layer: counted from 0 among those that have experts.
            weakest: SNR of that one, plain ratio, > 0.
        Raises:
            ConfigError: it needs what was not fitted.
        """
        symbols = block_symbols(self._width, analog.ratio)
        if analog.transform == "none":
            return plain_code(self._width, symbols)
        if layer >= len(self._spectra):
            raise ConfigError('analog_transform = "klt" needs activations to be fitted to: none were given')
        return fitted_code(self._spectra[layer], symbols, min(weakest, 10 ** (MOST_DB / 10)))


@torch.no_grad()
def record_hidden(model: object, windows: torch.Tensor) -> list[torch.Tensor]:
    """(tokens, width) float32 on the CPU for each layer with experts: what comes to it while the model reads.

    Args:
        model: a transformers MoE model with all its weights.
        windows: (windows, length) int64 token ids, at least one.
    Raises:
        BundleError: the model has no experts.
    """
    modules = list(experts_modules(model).values())  # type: ignore[arg-type]
    found: list[list[torch.Tensor]] = [[] for _ in modules]
    hooks = [
        module.register_forward_pre_hook(lambda _, given, kept=kept: kept.append(given[0].float().cpu()))
        for module, kept in zip(modules, found, strict=True)
    ]
    try:
        for window in windows:
            model(input_ids=window[None], use_cache=False)  # type: ignore[operator]
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(each) for each in found]


def fit_spectra(model: object, windows: torch.Tensor) -> list[Spectrum]:
    """How the hidden vectors of each layer with experts vary; arguments and errors as `record_hidden`."""
    found = []
    for each in record_hidden(model, windows):
        vectors = each.double().numpy()
        mean = vectors.mean(axis=0)
        centred = vectors - mean
        found.append(Spectrum.of(mean, centred.T @ centred / len(centred)))
    return found


def _in_pairs(blocks: npt.NDArray[np.complex128], share: float) -> tuple[npt.NDArray[np.complex128], FloatArray]:
    """Blocks 0 and 1 in one, 2 and 3, and so on; the last alone where it has no partner. And each one's part in it."""
    count = len(blocks) // 2
    both, common = superpose(blocks[0 : 2 * count : 2], blocks[1 : 2 * count : 2], share)
    agreement = np.ones(len(blocks))
    agreement[: 2 * count] = common.T.reshape(-1)
    return np.concatenate([both, blocks[2 * count :]]), agreement
