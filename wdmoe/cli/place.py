"""The command that plans where experts live: `place`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from wdmoe.cli.failures import needs_extra
from wdmoe.cli.params import FILE, SIZE, TIME, refuse_idle
from wdmoe.errors import ConfigError
from wdmoe.units import format_quantity, parse_quantity

if TYPE_CHECKING:
    from wdmoe.results.gate_trace import GateTrace
    from wdmoe.solver.placement.problem import PlacementProblem, Plan


@dataclass(frozen=True, slots=True)
class Place:
    """A device as the command line states it."""

    name: str
    memory_bytes: float
    token_s: float


class _Device(click.ParamType):  # type: ignore[type-arg]  # generic only since click 8.4
    name = "name=memory,time"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Place:
        """Split at the last equals sign, so that names may hold one."""
        text = str(value)
        name, equals, rest = text.rpartition("=")
        memory, comma, time = rest.partition(",")
        if not (name and equals and comma):
            self.fail(f"{text!r} is no NAME=MEMORY,TIME: write one as in kitchen=8GiB,2ms", param, ctx)
        try:
            return _place(name, memory, time)
        except ConfigError as error:
            self.fail(str(error), param, ctx)


@click.command()
@click.argument("trace", type=FILE)
@click.option("--device", "flags", type=_Device(), multiple=True, help="One device; repeat the option for each.")
@click.option("--devices", "file", type=FILE, help="JSON file of devices, in place of --device; the form stands above.")
@click.option(
    "--expert-size", type=SIZE, required=True, help="Memory of one expert. On a CPU each weight takes 4 bytes."
)
@click.option(
    "--replicas",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Largest number of copies of an expert.",
)
@click.option("--exact/--greedy", default=False, help="Prove the optimum, or end at once.  [default: --greedy]")
@click.option(
    "--time-limit",
    type=TIME,
    default="60s",
    show_default=True,
    help="Time for --exact. After it the best plan so far counts.",
)
def place(
    trace: Path,
    flags: tuple[Place, ...],
    file: Path | None,
    expert_size: float,
    replicas: int,
    exact: bool,
    time_limit: float,
) -> None:
    """Plan which device holds which expert, by how often a trace uses each expert.

    TRACE is a file that `wdmoe-node trace` wrote. Describe each device by its name (as in `wdmoe-node device --name`),
    the memory that it offers, and the time that one token takes through one expert there, link and computing together.

    The plan fits the memory of every device and keeps a token's time in the experts of all layers as short as
    possible. Standard output gets the plan in the form that `wdmoe-node bs --placement` reads, standard error says
    what it brings.

    \b
    Examples:
      wdmoe-node trace default gate.npz
      wdmoe-node place gate.npz --device kit=200MiB,2ms --device desk=1GiB,1ms --expert-size 1.3MB > placement.json
      wdmoe-node place gate.npz --devices devices.json --expert-size 1.3MB --replicas 2 --exact --time-limit 5min
      wdmoe-node bs default --placement placement.json

    \b
    devices.json:
      {"kit": {"memory": "200MiB", "token": "2ms"}, "desk": {"memory": "1GiB", "token": "1ms"}}
    """
    from wdmoe.results.gate_trace import GateTrace
    from wdmoe.solver.placement.file import placement_of, write_placement

    refuse_idle("time_limit", exact, "--exact")
    devices = _devices(flags, file)
    recorded = GateTrace.load(trace)
    problem = _problem(recorded, devices, expert_size, replicas)
    plan = _solve(problem, exact, time_limit)
    names = [device.name for device in devices]
    if plan.status in ("infeasible", "not_found"):
        experts = recorded.gate.shape[0] * recorded.expert_count
        need, have = (format_quantity(n, "size") for n in (experts * expert_size, problem.memory_bytes.sum()))
        raise ConfigError(f"{experts} experts of {need} together do not fit on devices of {have} together")
    _tell(problem, plan, names)
    click.echo(write_placement(placement_of(plan.held, names, recorded.layers.tolist())), nl=False)


def _devices(flags: tuple[Place, ...], file: Path | None) -> tuple[Place, ...]:
    if bool(flags) == (file is not None):
        raise click.UsageError("state each device with --device, or all of them with one --devices FILE")
    devices = flags if file is None else _read_devices(file)
    names = [device.name for device in devices]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"device {twice[0]!r} is stated twice")
    return devices


def _read_devices(file: Path) -> tuple[Place, ...]:
    try:
        stated = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"devices file {file} cannot be read: {error}") from error
    if not isinstance(stated, dict) or not stated:
        raise ConfigError(f"devices file {file} must be an object of devices by name")
    for name, values in stated.items():
        if not isinstance(values, dict) or set(values) != {"memory", "token"}:
            raise ConfigError(f'devices file {file}: {name!r} needs exactly "memory" and "token"')
    try:
        return tuple(_place(name, str(values["memory"]), str(values["token"])) for name, values in stated.items())
    except ConfigError as error:
        raise ConfigError(f"devices file {file}: {error}") from error


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object whose keys are all different: of two alike the first would do nothing."""
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]!r} stands twice in one object")
    return dict(pairs)


def _place(name: str, memory: str, time: str) -> Place:
    place = Place(name, parse_quantity(memory, "size"), parse_quantity(time, "time"))
    if place.token_s <= 0:
        raise ConfigError(f"device {name!r}: the time of a token must be positive, as in 2ms")
    return place


def _problem(trace: GateTrace, devices: tuple[Place, ...], expert_bytes: float, replicas: int) -> PlacementProblem:
    import numpy as np

    from wdmoe.solver.placement.problem import PlacementProblem

    if expert_bytes <= 0:
        raise ConfigError("--expert-size must be positive, as in 1.3MB")
    return PlacementProblem(
        trace.activation_frequency(),
        np.array([device.token_s for device in devices]),
        np.array([device.memory_bytes for device in devices]),
        np.full(len(trace.layers), expert_bytes),
        replicas,
    )


def _solve(problem: PlacementProblem, exact: bool, time_limit_s: float) -> Plan:
    from wdmoe.cli.progress import StageProgress
    from wdmoe.solver.placement.greedy import place_greedily

    with StageProgress("place") as progress:
        if not exact:
            return place_greedily(problem, progress.reach)
        if time_limit_s <= 0:
            raise ConfigError("--time-limit must be positive, as in 60s")
        with needs_extra("sim"):
            from wdmoe.solver.placement.exact import place_exactly

            return place_exactly(problem, time_limit_s, progress=progress.reach)


def _tell(problem: PlacementProblem, plan: Plan, names: list[str]) -> None:
    """What the plan brings, on standard error: standard output is the file."""
    from wdmoe.solver.placement.problem import device_loads

    layers, experts, _ = problem.shape
    loads = device_loads(problem, plan.share)
    parts = loads.sum(axis=0) / max(loads.sum(), 1e-300)
    counts = plan.held.sum(axis=(0, 1))
    for name, count, part in zip(names, counts.tolist(), parts, strict=True):
        size = format_quantity(count * problem.expert_bytes[0], "size")
        click.echo(f"{name}: {count} experts, {size}, {part:.0%} of the load", err=True)
    copies = f", {counts.sum() - layers * experts} of them copies" if counts.sum() > layers * experts else ""
    above = plan.latency_s / max(plan.lower_bound_s, 1e-300) - 1
    proved = "the optimum" if plan.status == "optimal" else f"at most {above:.2%} above the optimum"
    click.echo(
        f"{counts.sum()} experts placed{copies}; a token's time in the experts of all layers: "
        f"{format_quantity(plan.latency_s, 'time')}, {proved}",
        err=True,
    )
