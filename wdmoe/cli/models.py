"""The commands that make, record and check models: `split`, `export`, `trace` and `verify`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import click

from wdmoe.cli.failures import needs_extra
from wdmoe.cli.params import DIRECTORY, FILE, refuse_idle
from wdmoe.config import PRECISIONS
from wdmoe.results.folder import BROADCAST_KIND, LOSSES_KIND, SIMULATION_KIND, kind_of
from wdmoe.units import format_quantity

Verified: TypeAlias = "tuple[str, Mapping[str, object]]"  # what is sound: as a line, and as fields


@click.command()
@click.argument("model", type=DIRECTORY)
@click.argument("bundle", type=DIRECTORY)
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default="fp32",
    show_default=True,
    help="Number type of the experts' weights. fp16 halves their size, int8 quarters it.",
)
@click.option("--name", default="", help="Model name that clients see.  [default: the name of the folder]")
def export(model: Path, bundle: Path, precision: str, name: str) -> None:
    """Turn a Mixture-of-Experts checkpoint into a bundle.

    The folder MODEL holds config.json and safetensors, as transformers saves them. The command never needs more
    memory than the largest layer does. After an interruption, run it again with the same arguments to go on.

    \b
    Examples:
      wdmoe-node export ./Mixtral-8x7B-v0.1 ./mixtral-bundle --precision int8
      wdmoe-node export ./OLMoE-1B-7B ./olmoe-bundle --name olmoe
    """
    with needs_extra("export"):
        from wdmoe.backbone.export.export import ExportSettings, export_bundle
    from wdmoe.cli.progress import ByteProgress

    settings = ExportSettings(precision=precision, name=name)
    with ByteProgress(f"export {model.name}") as progress:
        made = export_bundle(model, bundle, settings, progress)
    size = sum(file.size for file in made.experts)
    layers = len(made.moe_layers)
    click.echo(
        f"{bundle}: {made.model}, {len(made.experts)} experts in {layers} layers, "
        f"{format_quantity(size, 'size')} of {made.precision} for the devices"
    )


@click.command()
@click.argument("dense", type=click.Path(path_type=Path))
@click.argument("moe", type=DIRECTORY)
@click.option("--experts", type=click.IntRange(min=2), default=8, show_default=True, help="Experts per layer.")
@click.option(
    "--shared",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.5,
    show_default=True,
    help="Share of each layer's neurons that stays at the base station: the strongest ones.",
)
@click.option(
    "--top-k", type=click.IntRange(min=1), default=4, show_default=True, help="Experts that serve one token in a layer."
)
@click.option(
    "--calibration",
    type=FILE,
    multiple=True,
    help="Text file to fit the router on; may be repeated.  [default: the shipped text]",
)
@click.option(
    "--held-out",
    type=FILE,
    multiple=True,
    help="Text file to measure perplexity on; may be repeated.  [default: other shipped text]",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the clustering.")
def split(
    dense: Path,
    moe: Path,
    experts: int,
    shared: float,
    top_k: int,
    calibration: tuple[Path, ...],
    held_out: tuple[Path, ...],
    seed: int,
) -> None:
    """Split a dense model into experts.

    DENSE is a Llama-like checkpoint: a folder of safetensors, or a GGUF file. The command writes a Mixture-of-Experts
    checkpoint into the folder MOE. transformers loads it, and `wdmoe-node export` takes it. The command prints the
    perplexity of both models on text that the split was not fitted on.

    \b
    Examples:
      wdmoe-node split ./SmolLM2-135M-Instruct.gguf ./smol-moe
      wdmoe-node split ./Llama-3.2-1B ./llama-moe --experts 16 --top-k 6 --shared 0.4
      wdmoe-node split ./Llama-3.2-1B ./llama-moe --calibration mine.txt --held-out other.txt
    """
    with needs_extra("export"):
        from wdmoe.backbone.split.settings import SplitSettings
        from wdmoe.backbone.split.split import split_checkpoint
    from wdmoe.cli.progress import StageProgress

    settings = SplitSettings(
        experts=experts, shared=shared, top_k=top_k, calibration=calibration, held_out=held_out, seed=seed
    )
    with StageProgress(f"split {dense.name}") as progress:
        report = split_checkpoint(dense, moe, settings, progress.reach)
    click.echo(
        f"{moe}: {settings.top_k} of {settings.experts} experts a token; perplexity on {report.tokens} tokens "
        f"{report.split_perplexity:.2f}, dense {report.dense_perplexity:.2f}, ratio {report.ratio:.3f}"
    )


@click.command()
@click.argument("model")
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--text",
    type=FILE,
    multiple=True,
    help="Text file that the model reads; may be repeated.  [default: the shipped text]",
)
@click.option("--tokens", type=click.IntRange(min=1), default=1024, show_default=True, help="Number of tokens in all.")
@click.option("--window", type=click.IntRange(min=1), default=256, show_default=True, help="Tokens of one sequence.")
@click.option("--similarity", is_flag=True, help="Also record the similarity of neighbouring tokens' hidden states.")
@click.option(
    "--expert-similarity",
    is_flag=True,
    help="Also measure the similarity of experts, which says how well one replaces another.",
)
def trace(
    model: str, out: Path, text: tuple[Path, ...], tokens: int, window: int, similarity: bool, expert_similarity: bool
) -> None:
    """Record which experts a model's gates choose.

    MODEL is the folder of a Mixture-of-Experts checkpoint, or the word default. The model reads text on this machine.
    The file OUT (.npz) gets the scores and choices of every gate, and no text. Simulations replay it.

    \b
    Examples:
      wdmoe-node trace default gate.npz
      wdmoe-node trace ./OLMoE-1B-7B olmoe.npz --text book.txt --tokens 4096
      wdmoe-node trace default gate.npz --expert-similarity    # for replacing far experts by near ones
    """
    with needs_extra("export"):
        from wdmoe.backbone.default.model import default_checkpoint
        from wdmoe.backbone.record_trace import record_trace
    from wdmoe.cli.progress import StageProgress

    with StageProgress("trace") as progress:
        folder = default_checkpoint(progress.reach) if model == "default" else Path(model)
        made = record_trace(
            folder, text, tokens, window, similarity, progress.reach, expert_similarity=expert_similarity
        )
    made.save(out)
    layers, count, experts = made.gate.shape
    size = format_quantity(out.stat().st_size, "size")
    click.echo(f"{out}: {made.model}, {count} tokens through {layers} layers of {experts} experts, {size}")


@click.command()
@click.argument("folder", type=DIRECTORY)
@click.option(
    "--draws",
    type=click.IntRange(min=1),
    help="For results: run only this many draws again, from the first on.  [default: all]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, and nothing else.")
def verify(folder: Path, draws: int | None, as_json: bool) -> None:
    """Check a bundle's files and graphs, or results of a simulation or of the broadcast comparison.

    A bundle is sound if every file has the hash that the manifest states and every expert's graph is valid.

    Results of `wdmoe-node simulate` are sound if no file has changed and a second run of the scenario gives the same
    figures. The same holds for results of tools/study/broadcast_region and tools/study/broadcast_losses; there --draws
    counts pairs of pictures.

    With --json: folder, kind (bundle, simulation, broadcast or losses), sound (always true: what is not sound ends
    with a line and exit code 1), and what was checked, by kind. bundle: model, digest, precision, experts,
    station_files. simulation: scenario, seed, draws, draws_run_again. broadcast and losses: pairs, settings, and
    systems for losses.

    \b
    Examples:
      wdmoe-node verify ./mixtral-bundle
      wdmoe-node verify ./journal-results --draws 10     # a sample; without it every draw
    """
    checks = {SIMULATION_KIND: _verify_results, BROADCAST_KIND: _verify_broadcast, LOSSES_KIND: _verify_losses}
    line, fields = checks.get(kind_of(folder), _verify_bundle)(folder, draws)
    if as_json:
        click.echo(json.dumps({"folder": str(folder), "sound": True, **fields}, indent=2, ensure_ascii=False))
    else:
        click.echo(f"{folder} is sound: {line}")


def _verify_results(folder: Path, draws: int | None) -> Verified:
    with needs_extra("sim"):
        from wdmoe.simulation.results import verify_results
    from wdmoe.cli.progress import CountProgress

    with CountProgress(f"verify {folder.name}", "draws") as progress:
        scenario, again = verify_results(folder, progress=progress.reach, draws=draws)
    of = "" if again == scenario.draws else f" of {scenario.draws}"
    line = f"{again}{of} draws of {scenario.name}, run again with seed {scenario.seed}, are the same"
    fields = {"scenario": scenario.name, "seed": scenario.seed, "draws": scenario.draws, "draws_run_again": again}
    return line, {"kind": "simulation", **fields}


def _verify_broadcast(folder: Path, pairs: int | None) -> Verified:
    with needs_extra("broadcast"):
        from wdmoe.broadcast.study.verify import verify_results
    from wdmoe.cli.progress import StageProgress

    with StageProgress(f"verify {folder.name}") as progress:
        again = verify_results(folder, pairs, progress.reach)
    photographs = " and of the photographs" if again.photographs else ""
    line = f"{again.pairs} pairs of each of {again.settings} settings{photographs}, run again, are the same"
    return line, {"kind": "broadcast", "pairs": again.pairs, "settings": again.settings}


def _verify_losses(folder: Path, pairs: int | None) -> Verified:
    with needs_extra("broadcast"):
        from wdmoe.broadcast.study.loss_results import verify_losses
    from wdmoe.cli.progress import StageProgress

    with StageProgress(f"verify {folder.name}") as progress:
        again = verify_losses(folder, pairs, progress.reach)
    if again.systems:
        ran = (
            f"{', '.join(again.systems)}, run again on {again.pairs} pairs of each of {again.settings} settings, agree"
        )
    else:
        ran = "nothing was run again, since the folder has no weights"
    fields = {"pairs": again.pairs, "settings": again.settings, "systems": list(again.systems)}
    return f"its tables follow from its figures of every pair; {ran}", {"kind": "losses", **fields}


def _verify_bundle(folder: Path, _: int | None) -> Verified:
    refuse_idle("draws", False, "results of draws; this is a bundle, and all of it is checked")
    with needs_extra("bs"):
        import onnx  # noqa: F401 - the check of graphs needs it, far below

        from wdmoe.backbone.format.bundle import Bundle
    from wdmoe.cli.progress import ByteProgress

    opened = Bundle.open(folder)
    with ByteProgress(f"verify {folder.name}") as progress:
        opened.verify(progress.reach)
    manifest = opened.manifest
    line = (
        f"{manifest.model}, {len(manifest.experts)} experts ({manifest.precision}), "
        f"{len(manifest.station)} files of the base station, digest {manifest.digest[:16]}"
    )
    return line, {
        "kind": "bundle",
        "model": manifest.model,
        "digest": manifest.digest,
        "precision": manifest.precision,
        "experts": len(manifest.experts),
        "station_files": len(manifest.station),
    }
