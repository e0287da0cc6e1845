"""What a base station needs to look at its devices' answers: the bands and the experts of its bundle."""

from __future__ import annotations

from collections.abc import Callable

from wdmoe.backbone.format.bundle import Bundle
from wdmoe.moe.providers import OnnxExpert, cpu_chain
from wdmoe.moe.verification.norm_band import NormBand
from wdmoe.moe.verification.recompute import Recomputer
from wdmoe.moe.verification.verifier import Verifier

VERIFY_BYTES = 320 << 20  # of experts opened at the station: all of the default model's


def norm_band(bundle: Bundle) -> NormBand:
    """As its export measured."""
    bounds = {file.id: file.output_norm for file in bundle.manifest.experts if file.output_norm is not None}
    return NormBand(bundle.manifest.experts_per_layer, bounds)


def open_verifier(bundle: Bundle, post: Callable[[Callable[[], None]], None]) -> Verifier:
    """Its thread runs; the caller closes it. `post` runs an action on the model thread."""
    recomputer = Recomputer(bundle.expert_bytes, lambda data: OnnxExpert(data, 1, cpu_chain()), VERIFY_BYTES)
    return Verifier(recomputer, post)
