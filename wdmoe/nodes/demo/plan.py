"""What the demo is asked to show, and the runs that show it. Decided here, done elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from wdmoe.backbone.bundle import ExpertFile
from wdmoe.config import POLICIES, check_budget
from wdmoe.errors import ConfigError
from wdmoe.nodes.demo.links import Links, equal_links, unequal_links
from wdmoe.solver.placing.file import write_placement

MOST_DEVICES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSettings:
    """One demo."""

    cache: Path  # of experts, shared by all devices and kept
    prompt: str
    devices: int = 8
    tokens: int = 64  # of the answer, at most
    policy: str = "cosine"
    budget_s: float = 0.0  # of the policy `budget`
    rates_bps: tuple[float, ...] = ()  # see `unequal_links`
    seed: int = 0
    compare: bool = True  # also with plain top-k

    def __post_init__(self) -> None:
        if not 1 <= self.devices <= MOST_DEVICES:
            raise ConfigError(f"devices must be from 1 to {MOST_DEVICES}, got {self.devices}")
        if self.tokens < 1:
            raise ConfigError(f"tokens must be at least 1, got {self.tokens}")
        if self.policy not in POLICIES:
            raise ConfigError(f"policy must be one of {', '.join(POLICIES)}; got {self.policy!r}")
        check_budget(self.policy, self.budget_s)
        if not self.prompt.strip():
            raise ConfigError("the prompt is empty")
        unequal_links(self.devices, self.rates_bps, self.seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """One column of the table: one policy over one set of links."""

    policy: str
    equal: bool
    links: Links

    @property
    def name(self) -> str:
        """For people and machines."""
        return f"{self.policy}, {'equal' if self.equal else 'unequal'} links"


def plan_runs(settings: DemoSettings) -> tuple[RunPlan, ...]:
    """The chosen policy over unequal links; then top-k over the same links and over equal ones of the same total
    rate, so that what the policy does and what the links do can be told apart."""
    links = unequal_links(settings.devices, settings.rates_bps, settings.seed)
    runs = [RunPlan(policy=settings.policy, equal=len(set(links)) == 1, links=links)]
    if settings.compare:
        runs.append(RunPlan(policy="topk", equal=runs[0].equal, links=links))
        runs.append(RunPlan(policy="topk", equal=True, links=equal_links(links)))
    return tuple(dict.fromkeys(runs))


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
