"""What is simulated, as frozen records in SI units. `scenario_file` reads them; docs/simulation.md has every key."""

from __future__ import annotations

from dataclasses import dataclass, replace

from wdmoe.solver.layer.plan import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class RadioSetup:
    """Both ends of all links, in SI units."""

    carrier_hz: float
    bandwidth_hz: float
    station_power_w: float
    device_power_w: float
    noise_w_hz: float  # at every receiver, noise figure included
    spending: str
    law: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelSetup:
    """What is between the antennas."""

    path_loss: str
    exponent: float  # of log-distance
    shadowing_db: float  # standard deviation; the scenarios of TR 38.901 have their own
    fading: str
    k_factor_db: float  # of rician
    changes: str  # fading is one for the whole pass, anew for each layer, or moves on from layer to layer (doppler)
    doppler_hz: float  # largest shift; with "doppler" only
    block_s: float  # from one layer to the next; with "doppler" only


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSetup:
    """The devices; tuples have one entry each."""

    nearest_m: tuple[float, ...]
    farthest_m: tuple[float, ...]  # drawn uniformly between the two, anew for each draw; equal: it stands there
    flop_s: tuple[float, ...]
    memory_bytes_s: tuple[float, ...]  # 0: compute by FLOP alone
    experts: tuple[int, ...]  # how many it has room for, in each layer

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.nearest_m)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSetup:
    """The model whose experts travel, and whose gates are replayed."""

    trace: str  # file, or "default": the shipped trace of the default model
    hidden: int
    inner: int  # neurons of an expert
    weight_bytes: float
    tokens: int  # of one pass: 1 is decoding, more is prefill
    passes: int  # for each draw, of other tokens each
    station_s: float  # attention and gate of one layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to run the layer, compared with the others on the same draws."""

    name: str
    policy: Policy
    placement: str
    replicas: int  # most devices that hold one expert
    rank: str = "probability"  # what the policy ranks by, see `wdmoe.solver.ranking`
    whole_layers: int = 0  # so many layers from the first on keep all their experts
    csi_layers: int = 1  # the channel is measured every so many layers; 0: at the beginning of a pass
    csi_delay: int = 0  # and a measurement is so many layers old when it is first used

    def policy_of(self, layer: int) -> Policy:
        """The policy of a layer, counted from 0."""
        return replace(self.policy, name="topk") if layer < self.whole_layers else self.policy

    def measured(self, layer: int) -> int:
        """The layer whose channel this one is decided by. A pass begins with a channel that is known."""
        latest = layer // self.csi_layers * self.csi_layers if self.csi_layers else 0
        return max(latest - self.csi_delay, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """All that decides the figures, but for the draws' number and the seed, which a caller may change."""

    name: str
    about: str
    seed: int
    draws: int
    radio: RadioSetup
    channel: ChannelSetup
    devices: DeviceSetup
    model: ModelSetup
    variants: tuple[Variant, ...]  # the first is the baseline
    backend: str  # where draws are computed: loky (processes of this machine), dask, dask:ADDRESS, ray or ray:ADDRESS
    source: str  # the file's text, kept with the results
