"""The command that simulates: `simulate`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from wdmoe.cli.failures import needs_extra
from wdmoe.cli.params import refuse_idle

if TYPE_CHECKING:
    from wdmoe.simulation.statistics import Summary


@click.command()
@click.argument("scenario")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the results.  [default: the scenario's name and -results]",
)
@click.option("--draws", type=click.IntRange(min=1), help="Number of channel draws.  [default: the scenario's]")
@click.option("--seed", type=click.IntRange(min=0), help="Seed of all randomness.  [default: the scenario's]")
@click.option("--workers", type=click.IntRange(min=1), help="Number of processes.  [default: one for each core]")
@click.option(
    "--backend",
    help="Where draws are computed: loky (this machine), dask:ADDRESS or ray:ADDRESS.  [default: the scenario's]",
)
def simulate(
    scenario: str, out: Path | None, draws: int | None, seed: int | None, workers: int | None, backend: str | None
) -> None:
    """Simulate a network of devices over many channel draws.

    SCENARIO is a TOML file, or the name of a shipped one: bridge, decode, journal, moving, multicast, prefill,
    wifi-room. Every draw places the devices, fades their links and replays recorded gates. All variants of the
    scenario meet the same draws. The same seed gives the same digits on any number of workers.

    The results folder gets all draws and a summary as CSV, figures as PNG and SVG, and a manifest.

    \b
    Examples:
      wdmoe-node simulate journal                      # writes ./journal-results
      wdmoe-node simulate wifi-room --draws 1000 --out room
      wdmoe-node simulate my.toml --backend dask:tcp://10.0.0.5:8786
      wdmoe-node verify journal-results                # runs it again and compares every digit
    """
    with needs_extra("sim"):
        from wdmoe.simulation.results import save_results
        from wdmoe.simulation.scenario_file import load_scenario, with_changes
        from wdmoe.simulation.study import run_study
    from wdmoe.cli.progress import CountProgress

    setup = with_changes(load_scenario(scenario), draws=draws, seed=seed, backend=backend)
    refuse_idle("workers", not setup.backend.startswith("dask"), "other backends than dask: a cluster has its own")
    folder = out or Path(f"{setup.name}-results")
    with CountProgress(f"simulate {setup.name}", "draws") as progress:
        study = run_study(setup, workers or -1, progress.reach)
    summaries = save_results(study, folder)
    click.echo(setup.about)
    _print(summaries)
    click.echo(f"{folder}: {setup.draws} draws of {len(setup.variants)} variants, seed {setup.seed}")


def _print(summaries: list[Summary]) -> None:
    from wdmoe.cli.tables import print_table

    rows = [
        (
            each.variant,
            None if math.isnan(each.latency_s) else f"{1e3 * each.latency_s:.4g} ± {1e3 * each.latency_ci_s:.2g}",
            None if math.isnan(each.median_s) else f"{1e3 * each.median_s:.4g}",
            "baseline" if number == 0 else _saved(each),
            f"{100 * each.dropped_weight:.1f}",
            f"{each.experts_per_token:.2f}",
            f"{each.link_bits / 8e6:.3g}",
            f"{100 * each.outage:.0f}" if each.outage else None,
        )
        for number, each in enumerate(summaries)
    ]
    columns = (
        "variant",
        "latency, ms",
        "median, ms",
        "saved, %",
        "dropped weight, %",
        "experts a token",
        "MB on air",
        "outage, %",
    )
    print_table(columns, rows, right=1)
    for each in summaries:
        if each.outage == 1:
            click.echo(f"{each.variant}: a device with work was out of reach on every draw, so there is no latency")


def _saved(each: Summary) -> str | None:
    return None if math.isnan(each.saving) else f"{100 * each.saving:.1f} ± {100 * each.saving_ci:.1f}"
