"""`demo`: everything on this machine, over emulated links, in one command."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from wdmoe.cli.bundles import find_bundle
from wdmoe.cli.failures import needs_extra
from wdmoe.cli.params import (
    DIRECTORY,
    FILE,
    FREQUENCY,
    RATES,
    SHARE,
    TIME,
    check_rank_flags,
    chosen_policy,
    refuse_idle,
)
from wdmoe.config import POLICIES, RANKS, cache_home
from wdmoe.transport.descriptors import raise_descriptor_limit

if TYPE_CHECKING:
    from wdmoe.nodes.demo.phases import Phases
    from wdmoe.nodes.demo.plan import DemoSettings
    from wdmoe.nodes.demo.run import OpenStage

_BANDWIDTH_HZ = 10e6
_MAX_DROPPED = 0.03
_PROMPT = "Tell me a short story about a lighthouse keeper."


@click.command()
@click.argument("prompt", default=_PROMPT)
@click.option("--devices", type=click.IntRange(1, 64), default=8, show_default=True, help="Number of devices.")
@click.option("--tokens", type=click.IntRange(min=1), default=20, show_default=True, help="Longest answer.")
@click.option(
    "--policy",
    type=click.Choice(POLICIES),
    help="How the first run chooses experts.  [default: budget]",
)
@click.option(
    "--budget", "budget_s", type=TIME, default=0, help="For --policy budget: time of one token in all experts ..."
)
@click.option(
    "--budget-per-token",
    "budget_per_token_s",
    type=TIME,
    default=0,
    help="... plus this for each further token of a prompt.",
)
@click.option(
    "--max-dropped",
    type=SHARE,
    help="For --policy budget, in place of a time: share of the experts' worth that it may drop.  [default: 3%]",
)
@click.option(
    "--rank",
    type=click.Choice(("auto", *RANKS)),
    default="auto",
    show_default=True,
    help="How that policy ranks experts. auto: as the bundle says.",
)
@click.option(
    "--whole-layers",
    type=click.IntRange(min=0),
    help="Number of leading MoE layers that never drop experts.  [default: 1 with --policy budget, else 0]",
)
@click.option(
    "--bandwidth",
    "bandwidth_hz",
    type=FREQUENCY,
    help="Radio band that the devices share, over links whose strengths differ by 30 dB.  [default: 10MHz]",
)
@click.option(
    "--links",
    "rates_bps",
    type=RATES,
    help="Links with rates of their own in place of a shared band, alike in both directions: one rate for each device, "
    "or two as the ends of a geometric row, or one for all. 0 emulates no link.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed that decides which device has which link.")
@click.option(
    "--model", "bundle", default="default", show_default=True, help="Folder of a bundle, or the word default."
)
@click.option(
    "--compare/--no-compare",
    default=True,
    help="Also run plain top-k, with the best shares of the band and with equal ones.",
)
@click.option("--cache", type=DIRECTORY, help="Folder that keeps experts for the next start. All devices share it.")
@click.option(
    "--no-view", is_flag=True, help="Print plain text, as the command also does where the output is no terminal."
)
@click.option("--json", "as_json", is_flag=True, help="Print all figures as one JSON document, and nothing else.")
@click.option("--picture", type=FILE, help="Save the last frame of the first run and the table as an SVG image.")
@click.option("--installed-in", "installed_s", type=TIME, default=0, hidden=True, help="What tools/demo tells.")
def demo(
    prompt: str,
    devices: int,
    tokens: int,
    policy: str | None,
    budget_s: float,
    budget_per_token_s: float,
    rank: str,
    max_dropped: float | None,
    whole_layers: int | None,
    rates_bps: tuple[float, ...] | None,
    bandwidth_hz: float | None,
    seed: int,
    bundle: str,
    compare: bool,
    cache: Path | None,
    no_view: bool,
    as_json: bool,
    picture: Path | None,
    installed_s: float,
) -> None:
    """Run a base station and devices on this machine, and watch them answer PROMPT.

    Every part is a process of its own, all traffic is encrypted, and the radio is emulated: the devices share one
    band, and some are near, some far. Three answers come over the same radio: by the best policy, by plain top-k, and
    by top-k with equal shares of the band. A table compares them; its last line says what the policy won and what it
    cost. The command makes the default model on first use and keeps experts in the cache. Ctrl-C ends everything at
    any time.

    \b
    Examples:
      wdmoe-node demo
      wdmoe-node demo "Why is the sky blue?" --tokens 100
      wdmoe-node demo --bandwidth 20MHz --max-dropped 10%
      wdmoe-node demo --bandwidth 20MHz --budget 150ms --budget-per-token 50ms
      wdmoe-node demo --devices 4 --links 100Mbit/s,50Mbit/s,20Mbit/s,5Mbit/s
      wdmoe-node demo --model ./mixtral-bundle --links 0 --json > figures.json
    """
    policy = policy or "budget"
    if max_dropped is None:
        max_dropped = _MAX_DROPPED if policy == "budget" and not (budget_s or budget_per_token_s) else 0.0
    policy = chosen_policy(policy, budget_s, budget_per_token_s, policy, max_dropped)
    check_rank_flags(policy, rank, whole_layers or 0)
    for bound in ("budget_s", "budget_per_token_s", "max_dropped"):
        refuse_idle(bound, policy == "budget", "--policy budget")
    refuse_idle("seed", not rates_bps or len(rates_bps) not in (1, devices), "links that are dealt out, not stated")
    if bandwidth_hz and rates_bps:
        raise click.UsageError("--links states rates, --bandwidth lets devices share a band: give only one of them")
    if bandwidth_hz is None:
        bandwidth_hz = 0.0 if rates_bps else _BANDWIDTH_HZ
    from wdmoe.nodes.demo.phases import Phases

    raise_descriptor_limit()
    phases = Phases()  # before the imports that take time
    if installed_s:
        phases.add("installing", installed_s)
    from wdmoe.nodes.demo.plan import DemoSettings

    settings = DemoSettings(
        cache=cache or cache_home() / "experts",
        prompt=prompt,
        devices=devices,
        tokens=tokens,
        policy=policy,
        rank=rank,
        whole_layers=whole_layers or 0,
        budget_s=budget_s,
        budget_per_token_s=budget_per_token_s,
        max_dropped=max_dropped,
        rates_bps=rates_bps or (),
        bandwidth_hz=bandwidth_hz,
        seed=seed,
        compare=compare,
    )
    first_whole = whole_layers is None and policy == "budget"
    output = _Output(plain=no_view, as_json=as_json, picture=picture)
    _show(settings, bundle, phases, first_whole=first_whole, output=output)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Output:
    plain: bool
    as_json: bool
    picture: Path | None


def _show(settings: DemoSettings, bundle: str, phases: Phases, *, first_whole: bool, output: _Output) -> None:
    """Run it and print what came of it. `first_whole`: the first of several MoE layers drops nothing."""
    signal.signal(signal.SIGTERM, _end)
    from wdmoe.backbone.format.bundle import Bundle
    from wdmoe.nodes.demo.figures import as_document
    from wdmoe.nodes.demo.report import report, save_picture
    from wdmoe.nodes.demo.run import run_demo
    from wdmoe.nodes.demo.verdict import verdict

    if bundle == "default" and not sys.stderr.isatty():  # where it is, a bar says so
        click.echo("default model: taken from the cache, or made now, which takes a while", err=True)
    with needs_extra("bs"):
        opened = Bundle.open(find_bundle(bundle))
    if first_whole and len(opened.manifest.moe_layers) > 1:
        settings = replace(settings, whole_layers=1)
    phases.end("the model")
    views, open_stage = _stages(plain=output.plain, quiet=output.as_json)
    runs = run_demo(settings, opened, open_stage, phases)
    phases.end("ending")
    if output.picture is not None:
        save_picture(output.picture, [views[0], report(runs, phases)], "wdmoe-node demo")
    if output.as_json:
        document = as_document(opened.manifest.model, settings.prompt, settings.seed, runs, phases)
        click.echo(json.dumps({**document, "verdict": verdict(runs)}, indent=2))
    else:
        _console().print(report(runs, phases))


def _stages(*, plain: bool, quiet: bool) -> tuple[list[Any], OpenStage]:
    """How runs are shown, and a list that their views will be in."""
    from wdmoe.nodes.demo.plan import RunPlan
    from wdmoe.nodes.demo.stage import LiveStage, PlainStage, Stage
    from wdmoe.nodes.demo.view import DemoView

    views: list[Any] = []
    console = _console()
    live = console.is_terminal and not (console.is_dumb_terminal or plain or quiet)

    def open_stage(view: DemoView, plan: RunPlan) -> Stage:
        views.append(view)
        if live:
            return LiveStage(view, console)
        return PlainStage(view, plan.name, sys.stderr, None if quiet else sys.stdout)

    return views, open_stage


def _console() -> Any:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = 120
    return console


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)  # as a shell reports it; what is open is closed on the way
