"""How layers are served: what the model wants, from its bundle, and what the user wants, from the settings."""

from __future__ import annotations

import logging

from wdmoe.backbone.format.bundle import Manifest
from wdmoe.config import StationSettings
from wdmoe.errors import ConfigError
from wdmoe.moe.layer import LayerRules

log = logging.getLogger(__name__)


def rank_of(settings: StationSettings, manifest: Manifest) -> str:
    """What the policy ranks experts by, one of `wdmoe.config.RANKS`."""
    return manifest.rank if settings.rank == "auto" else settings.rank


def layer_rules(settings: StationSettings, manifest: Manifest) -> LayerRules:
    """The rules of a base station.

    Raises:
        ConfigError: no layer is left for the policy.
    """
    rank, layers = rank_of(settings, manifest), len(manifest.moe_layers)
    if settings.whole_layers >= layers:
        raise ConfigError(
            f"--whole-layers {settings.whole_layers} leaves policy {settings.policy} nothing to do: "
            f"{manifest.model} has {layers} layers with experts"
        )
    if rank == "energy" and manifest.rank != "energy":
        log.warning(
            "the bundle of %s does not say that its router predicts the norms of experts' outputs: --rank energy may "
            "drop experts that matter",
            manifest.model,
        )
    return LayerRules(
        policy=settings.policy,
        bandwidth_hz=settings.bandwidth_hz,
        equal_bandwidth=settings.allocation == "equal",
        budget_s=settings.budget_s / layers,
        budget_per_token_s=settings.budget_per_token_s / layers,
        max_dropped=settings.max_dropped,
        renormalise=manifest.on_drop == "renormalise",
        gate_temperature=manifest.gate_temperature,
        rank=rank,
        whole_layers=frozenset(manifest.moe_layers[: settings.whole_layers]),
        deadline_s=settings.deadline_s,
        deadline_per_token_s=settings.deadline_per_token_s,
        wait_for_experts_s=settings.wait_for_experts_s,
    )
