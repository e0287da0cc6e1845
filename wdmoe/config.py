"""Settings of the running programs: frozen, checked once when made, in SI units."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from wdmoe.errors import ConfigError

POLICIES = ("topk", "cosine", "bottleneck", "budget")
PROVIDERS = ("auto", "cpu", "cuda", "tensorrt")
ALLOCATIONS = ("optimal", "equal")
ENGINES = ("auto", "graphs", "transformers")
STATION_PRECISIONS = ("fp32", "int8", "int4")
JOIN_USES = 64  # devices that may join by one token, where nothing else is said
MOST_HZ = 1e24  # a watt over the noise density of room temperature is 2.5e20 Hz
PRECISIONS = ("fp32", "fp16", "int8")
RANKS = ("probability", "energy")  # what a policy ranks experts by, see `wdmoe.solver.ranking`


def state_home() -> Path:
    """Where keys and identities live: `$XDG_STATE_HOME/wdmoe`, else `~/.local/state/wdmoe`."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "wdmoe"


def cache_home() -> Path:
    """Where what can be made or fetched again lives: `$XDG_CACHE_HOME/wdmoe`, else `~/.cache/wdmoe`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wdmoe"


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:  # also refuses NaN
        raise ConfigError(f"{name} must be positive and finite, got {value}")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def is_hertz(value: float) -> bool:
    """Whether it can be a bandwidth, or an SNR over a noise density."""
    return 1 <= value <= MOST_HZ


def check_budget(policy: str, budget_s: float, per_token_s: float = 0.0, max_dropped: float = 0.0) -> None:
    """Raises ConfigError where the policy `budget` has none, or another one has one, which it would not look at."""
    if policy == "budget" and max_dropped != 0:
        if budget_s != 0 or per_token_s != 0:
            raise ConfigError("policy budget bounds the time or what is dropped: give --budget or --max-dropped")
        if not 0 < max_dropped < 1:  # also refuses NaN
            raise ConfigError(f"max_dropped must be above 0 and below 1, got {max_dropped}")
    elif policy == "budget":
        if budget_s == 0:
            raise ConfigError(
                "policy budget needs --budget, the time for a pass's experts, as in --budget 150ms, or --max-dropped, "
                "the share of the experts' worth that may be dropped, as in --max-dropped 0.05"
            )
        _positive("budget", budget_s)
        if not 0 <= per_token_s < math.inf:
            raise ConfigError(f"budget_per_token must be zero or positive, got {per_token_s}")
    elif budget_s != 0 or per_token_s != 0:
        raise ConfigError(f"--budget is for --policy budget; policy {policy} does not look at it")
    elif max_dropped != 0:
        raise ConfigError(f"--max-dropped is for --policy budget; policy {policy} does not look at it")


def check_ranking(policy: str, rank: str, whole_layers: int) -> None:
    """Raises ConfigError where the policy would not look at what is said of its ranking, or that cannot be."""
    _one_of("rank", rank, ("auto", *RANKS))
    if whole_layers < 0:
        raise ConfigError(f"whole_layers must not be negative, got {whole_layers}")
    if policy == "topk" and (rank != "auto" or whole_layers):
        raise ConfigError("--rank and --whole-layers are for a policy that drops experts; policy topk drops none")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkEmulation:
    """A radio link in user space: what the device waits before it computes and before it answers. 0 means no limit.

    With SNRs it has the rate of the band that the base station gives it, where that shares one.
    """

    downlink_bps: float = 0.0
    uplink_bps: float = 0.0
    downlink_snr_hz: float = 0.0  # received power over noise density, hertz; both or none
    uplink_snr_hz: float = 0.0

    def __post_init__(self) -> None:
        for name in ("downlink_bps", "uplink_bps"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ConfigError(f"link {name} must be zero (no limit) or positive, got {value}")
        snrs = (self.downlink_snr_hz, self.uplink_snr_hz)
        if snrs != (0, 0) and not all(map(is_hertz, snrs)):
            given = " and ".join(f"{snr:g} Hz" for snr in snrs)
            raise ConfigError(f"link SNRs must both be from 1 Hz to {MOST_HZ:g} Hz, got {given}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSettings:
    """One device node."""

    join: str  # token, or tcp:// endpoint when insecure
    name: str = ""  # "": the host name
    provider: str = "auto"
    threads: int = 1  # per expert run; more only helps experts of several million weights
    memory_bytes: int = 0  # offered to experts; 0: half of what is free at start
    cache: Path = field(default_factory=lambda: cache_home() / "experts")
    cache_bytes: int = 4 << 30
    state: Path = field(default_factory=lambda: state_home() / "device")
    link: LinkEmulation = field(default_factory=LinkEmulation)
    save_pictures: Path | None = None  # folder for what a semantic broadcast brings; None: they only go back
    insecure: bool = False

    def __post_init__(self) -> None:
        _one_of("provider", self.provider, PROVIDERS)
        _positive("threads", self.threads)
        _positive("cache_bytes", self.cache_bytes)
        if self.memory_bytes < 0:
            raise ConfigError(f"memory must not be negative, got {self.memory_bytes}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StationSettings:
    """One base station."""

    bundle: Path
    bind: str = "tcp://*:5555"  # control plane
    data_port: int = 0  # data plane, same interface; 0: one above the control port
    advertise: str = ""  # host name or address that devices shall dial; "": this machine's addresses
    http_host: str = "127.0.0.1"
    http_port: int = 8080  # -1: no HTTP
    api_key: str = ""
    policy: str = "topk"
    rank: str = "auto"  # what the policy ranks experts by; auto: what the bundle says
    whole_layers: int = 0  # so many MoE layers from the first on keep all their experts
    bandwidth_hz: float = 0.0  # the band that all devices share; 0: each has a link of its own
    allocation: str = "optimal"  # who gets how much of it
    budget_s: float = 0.0  # `budget`: what a forward pass may spend in experts, over all layers
    budget_per_token_s: float = 0.0  # and this more for each token after the first, as a prompt has them
    max_dropped: float = 0.0  # `budget` without a time: share of the experts' worth that a request may drop in a layer
    deadline_s: float = 1.0  # longest wait for experts of one layer, plus deadline_per_token_s for each token
    deadline_per_token_s: float = 0.02
    prefill_chunk: int = 128  # tokens of a prompt in one forward pass
    max_active: int = 0  # requests computed at the same time; 0: as many as the engine is good for
    max_queued: int = 16  # requests waiting behind them before new ones are turned away
    wait_for_experts_s: float = 20.0  # longest wait for experts that every device lost, between two tokens; 0: none
    lease_s: float = 3.0
    engine: str = "auto"  # what computes attention and gate: graphs where there are some, else transformers
    station_precision: str = "fp32"  # of its large matrices, in graphs
    kv_bytes: int = 0  # for keys and values of active requests; 0: half of what is free once the model is loaded
    prefix_cache_bytes: int = 256 << 20  # of keys and values kept for requests that begin with the same tokens
    device: str = "auto"  # torch device of attention and gate
    dtype: str = "auto"
    threads: int = 0  # of attention and gate; 0: half of the cores in graphs, 4 at most, else what torch takes
    verify: float = 0.05  # share of a trusted device's answers that is computed again; 0: odd answers only
    placement: Path | None = None
    # Devices that hold each expert, memory allowing: with 2, a lost one costs time but no quality. 0: 2, and further
    # copies on devices that would else hold nothing.
    copies: int = 0
    record_trace: Path | None = None  # where to leave a gate trace of what was served
    state: Path = field(default_factory=lambda: state_home() / "bs")
    join_uses: int | None = JOIN_USES  # devices that may join by one of its tokens; None: as many as come
    insecure: bool = False

    def __post_init__(self) -> None:
        _one_of("policy", self.policy, POLICIES)
        _one_of("allocation", self.allocation, ALLOCATIONS)
        _one_of("engine", self.engine, ENGINES)
        _one_of("station_precision", self.station_precision, STATION_PRECISIONS)
        if self.bandwidth_hz and not is_hertz(self.bandwidth_hz):
            raise ConfigError(f"bandwidth must be from 1 Hz to {MOST_HZ:g} Hz, got {self.bandwidth_hz:g} Hz")
        check_budget(self.policy, self.budget_s, self.budget_per_token_s, self.max_dropped)
        check_ranking(self.policy, self.rank, self.whole_layers)
        for name in ("deadline_s", "prefill_chunk", "lease_s"):
            _positive(name, getattr(self, name))
        if self.join_uses is not None:
            _positive("join_uses", self.join_uses)
        if not 0 <= self.verify <= 1:  # also refuses NaN
            raise ConfigError(f"verify must be from 0 to 1, got {self.verify}")
        if not 0 <= self.wait_for_experts_s < math.inf:
            raise ConfigError(f"wait_for_experts must be zero or positive, got {self.wait_for_experts_s}")
        if self.copies not in range(4):
            raise ConfigError(f"copies must be 1, 2 or 3, or 0 to let the base station decide, got {self.copies}")
        for name in ("max_active", "max_queued", "deadline_per_token_s", "threads", "kv_bytes", "prefix_cache_bytes"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")

    @property
    def join_file(self) -> Path:
        """Where the station keeps a join token ready."""
        return self.state / "join-token"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingRules:
    """What of a base station's settings may change from one answer to the next; see `StationSettings`."""

    policy: str = "topk"
    rank: str = "auto"
    whole_layers: int = 0
    budget_s: float = 0.0
    budget_per_token_s: float = 0.0
    max_dropped: float = 0.0
    allocation: str = "optimal"

    def of(self, settings: StationSettings) -> StationSettings:
        """The same station under these rules."""
        return replace(settings, **asdict(self))
