"""What the demo is asked to show, and the runs that show it. Decided here, done elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from wdmoe.backbone.format.bundle import ExpertFile
from wdmoe.config import MOST_HZ, POLICIES, ServingRules, check_budget, check_ranking, is_hertz
from wdmoe.errors import ConfigError
from wdmoe.nodes.demo.links import Links, equal_links, radio_links, unequal_links
from wdmoe.solver.placement.file import write_placement

MOST_DEVICES = 64
TOP_K = ServingRules()


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSettings:
    """One demo."""

    cache: Path  # of experts, shared by all devices and kept
    prompt: str
    devices: int = 8
    tokens: int = 64  # of the answer, at most
    policy: str = "cosine"  # of the first run; the others are top-k
    rank: str = "auto"  # of that policy; auto: what the bundle says
    whole_layers: int = 0  # so many first ones drop nothing
    budget_s: float = 0.0  # of the policy `budget`
    budget_per_token_s: float = 0.0
    max_dropped: float = 0.0  # of the policy `budget`, in place of a time
    rates_bps: tuple[float, ...] = ()  # see `unequal_links`
    bandwidth_hz: float = 0.0  # a band that all share, in place of links with rates of their own
    seed: int = 0
    compare: bool = True  # also with plain top-k

    def __post_init__(self) -> None:
        if not 1 <= self.devices <= MOST_DEVICES:
            raise ConfigError(f"devices must be from 1 to {MOST_DEVICES}, got {self.devices}")
        if self.tokens < 1:
            raise ConfigError(f"tokens must be at least 1, got {self.tokens}")
        if self.policy not in POLICIES:
            raise ConfigError(f"policy must be one of {', '.join(POLICIES)}; got {self.policy!r}")
        check_budget(self.policy, self.budget_s, self.budget_per_token_s, self.max_dropped)
        check_ranking(self.policy, self.rank, self.whole_layers)
        if not self.prompt.strip():
            raise ConfigError("the prompt is empty")
        if self.bandwidth_hz and not is_hertz(self.bandwidth_hz):
            raise ConfigError(f"bandwidth must be from 1 Hz to {MOST_HZ:g} Hz, got {self.bandwidth_hz:g} Hz")
        if self.bandwidth_hz and self.rates_bps:
            raise ConfigError("links have rates of their own, or share a band: give --links or --bandwidth, not both")
        unequal_links(self.devices, self.rates_bps, self.seed)

    @property
    def rules(self) -> ServingRules:
        """Of the first run."""
        return ServingRules(
            policy=self.policy,
            rank=self.rank,
            whole_layers=self.whole_layers,
            budget_s=self.budget_s,
            budget_per_token_s=self.budget_per_token_s,
            max_dropped=self.max_dropped,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """One column of the table: one policy over one set of links."""

    rules: ServingRules
    equal: bool
    links: Links
    bandwidth_hz: float = 0.0  # 0: no band is shared

    @property
    def policy(self) -> str:
        """How it chooses experts."""
        return self.rules.policy

    @property
    def allocation(self) -> str:
        """Who gets how much of the band."""
        return self.rules.allocation

    @property
    def radio(self) -> tuple[Links, float]:
        """What devices must be started anew for."""
        return self.links, self.bandwidth_hz

    @property
    def decides_as(self) -> ServingRules:
        """Equal for runs that compute the same experts, at least where a prompt is the same: top-k has no costs."""
        return replace(self.rules, allocation="optimal") if self.policy == "topk" else self.rules

    @property
    def name(self) -> str:
        """For people and machines."""
        if self.bandwidth_hz:
            return f"{self.policy}, {self.allocation} bandwidth"
        return f"{self.policy}, {'equal' if self.equal else 'unequal'} links"


def plan_runs(settings: DemoSettings) -> tuple[RunPlan, ...]:
    """The chosen policy over unequal links; then top-k over the same links and over equal ones of the same total
    rate, so that what the policy does and what the links do can be told apart. Where they share a band, links are the
    same in all runs, and what is made equal is the bandwidth."""
    if settings.bandwidth_hz:
        return _radio_runs(settings)
    links = unequal_links(settings.devices, settings.rates_bps, settings.seed)
    runs = [RunPlan(rules=settings.rules, equal=len(set(links)) == 1, links=links)]
    if settings.compare:
        runs.append(RunPlan(rules=TOP_K, equal=runs[0].equal, links=links))
        runs.append(RunPlan(rules=TOP_K, equal=True, links=equal_links(links)))
    return tuple(dict.fromkeys(runs))


def _radio_runs(settings: DemoSettings) -> tuple[RunPlan, ...]:
    links = radio_links(settings.devices, settings.seed)
    wanted = [settings.rules]
    if settings.compare:
        wanted += [TOP_K, replace(TOP_K, allocation="equal")]
    return tuple(
        RunPlan(rules=rules, equal=False, links=links, bandwidth_hz=settings.bandwidth_hz)
        for rules in dict.fromkeys(wanted)
    )


def device_names(devices: int) -> tuple[str, ...]:
    """What the devices are called, in the order of their links."""
    return tuple(f"device-{number:0{len(str(devices))}d}" for number in range(1, devices + 1))


def deal_experts(experts: Sequence[ExpertFile], names: Sequence[str]) -> Mapping[str, tuple[ExpertFile, ...]]:
    """Experts in turn to each device: the same in every run, or runs could not be compared.

    Raises:
        ConfigError: there are more devices than experts.
    """
    if len(names) > len(experts):
        raise ConfigError(f"{len(names)} devices are too many for a model of {len(experts)} experts")
    ordered = sorted(experts, key=lambda file: file.id)
    return {name: tuple(ordered[index :: len(names)]) for index, name in enumerate(names)}


def placement_text(dealt: Mapping[str, Sequence[ExpertFile]]) -> str:
    """A placement file that says so."""
    return write_placement({name: [file.id for file in files] for name, files in dealt.items()})
