"""Sampling with a generator per request, so that a seed means the same whatever else runs beside it."""

from __future__ import annotations

import torch
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from wdmoe.errors import NotFiniteError
from wdmoe.records import Sampling


class OnlyFinite(LogitsProcessor):  # type: ignore[misc]
    """Refuses scores of which the best is not a number: whatever was chosen by them would be garbage."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """(batch, vocabulary) -> (batch, vocabulary). NaN is the largest of whatever it stands among."""
        if not bool(torch.isfinite(scores.amax(dim=-1)).all()):
            raise NotFiniteError("the model's scores for the next token are not finite; the answer ends here")
        return scores


class GumbelMax(LogitsProcessor):  # type: ignore[misc]
    """Adds Gumbel noise, so that the greedy choice that follows is a sample from softmax(scores).

    transformers samples from torch's global generator, which concurrent requests would share.
    Source: Maddison, Tarlow, Minka, "A* Sampling", NeurIPS 2014, section 2.
    """

    def __init__(self, seed: int | None, device: torch.device, drawn: int = 0) -> None:
        """`drawn`: tokens that were drawn with this seed before; this one draws what comes after them."""
        self._generator = torch.Generator(device=device)
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)
        self._drawn = drawn

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """(batch, vocabulary) -> (batch, vocabulary)."""
        while self._drawn:
            self._drawn -= 1
            self._uniform(scores)
        noise = -torch.log(-torch.log(self._uniform(scores).clamp_(1e-300, 1 - 1e-16)))
        return scores + noise.to(scores.dtype)  # type: ignore[return-value]

    def _uniform(self, scores: torch.FloatTensor) -> torch.Tensor:
        return torch.rand(scores.shape, generator=self._generator, device=scores.device, dtype=torch.float64)


def processors(sampling: Sampling, device: torch.device, drawn: int = 0) -> LogitsProcessorList:
    """What turns greedy decoding into the sampling asked for, after so many tokens that were drawn before."""
    steps = LogitsProcessorList([OnlyFinite()])
    if sampling.temperature > 0:
        steps.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_p < 1:
            steps.append(TopPLogitsWarper(sampling.top_p))
        steps.append(GumbelMax(sampling.seed, device, drawn))
    return steps
